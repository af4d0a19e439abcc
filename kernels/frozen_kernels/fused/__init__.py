"""Fused elementwise operations: residual add + LayerNorm, bias + GELU, position embeddings; one file per operation."""
