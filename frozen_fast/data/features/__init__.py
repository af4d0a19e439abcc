"""Pre-computed expert features: released pickles, a memory-mapped store, and batches from it."""
