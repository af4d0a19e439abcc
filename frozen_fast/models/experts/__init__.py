"""Models that read pre-computed expert features: Collaborative Experts, Mixture of Embedding Experts, concatenation."""
