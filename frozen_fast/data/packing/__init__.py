"""Writing shards: frame extraction, tar writers, index tables and the worker pool."""
