"""Data loading: batches of decoded clips on the device, for training and for evaluation."""
