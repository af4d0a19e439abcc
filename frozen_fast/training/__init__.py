"""Training: from a config to a finished run folder.

The entry points are training.run.train and training.run.evaluate_checkpoint. Importing this package alone is fast.
"""
