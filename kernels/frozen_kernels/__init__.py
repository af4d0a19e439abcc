"""Attention and fused ops of the space-time transformer, each beside its plain-PyTorch reference."""

from frozen_kernels.attention import divided_attention, resolve_backend
from frozen_kernels.availability import BACKEND_NAMES, unavailable_backends
from frozen_kernels.selection import chosen_backends

__all__ = ["BACKEND_NAMES", "chosen_backends", "divided_attention", "resolve_backend", "unavailable_backends"]
