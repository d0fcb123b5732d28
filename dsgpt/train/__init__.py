"""Training: `resolve` (what will run), `state` and `step` (one step), `loop` (the run), `worker` (one process)."""
