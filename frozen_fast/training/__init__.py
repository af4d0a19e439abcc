"""Training: from a config to a finished run folder.

The entries are training.run.train and training.run.evaluate_checkpoint; this package alone imports nothing heavy.
"""
