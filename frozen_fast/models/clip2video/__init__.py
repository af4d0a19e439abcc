"""CLIP2Video: CLIP with temporal differences and temporal alignment, two similarities per pair."""
