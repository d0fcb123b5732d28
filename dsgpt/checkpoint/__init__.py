"""Checkpoints: committed by one rename, written as safetensors partitions, readable without torch up to their index."""
