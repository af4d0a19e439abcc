"""Attention and fused ops of the space-time transformer, each beside its plain-PyTorch reference."""

from frozen_kernels.attention import divided_attention

__all__ = ["divided_attention"]
