"""What stands before a run: the hardware found, the environment checked, the launcher started. Never imports torch."""
