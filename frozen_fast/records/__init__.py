"""Files of a run: run folder, checkpoints, environment."""
