"""Reports of finished and running runs, read from the run folder only."""
