"""Jobs on a real SLURM: whichever answers `sinfo`, or the one that cluster.sh makes."""
