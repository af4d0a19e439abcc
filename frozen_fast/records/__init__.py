"""What a run writes: run folder, checkpoint files, environment."""
