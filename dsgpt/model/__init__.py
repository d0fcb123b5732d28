"""Models: the native GPT and its conversion to and from Hugging Face checkpoints."""
