"""Attention and fused ops of the space-time transformer, each beside its plain-PyTorch reference."""

from frozen_kernels.attention.api import Backend, add_backend, divided_attention, resolve_backend
from frozen_kernels.attention.cls import cls_attention
from frozen_kernels.attention.selection import chosen_backends
from frozen_kernels.availability import BACKEND_NAMES, unavailable_backends
from frozen_kernels.fused.bias_gelu import bias_gelu, gelu_reference
from frozen_kernels.fused.forms import fused_form
from frozen_kernels.fused.layer_norm import add_layer_norm
from frozen_kernels.fused.positions import add_positions

__all__ = [
    "BACKEND_NAMES",
    "Backend",
    "add_backend",
    "add_layer_norm",
    "add_positions",
    "bias_gelu",
    "chosen_backends",
    "cls_attention",
    "divided_attention",
    "fused_form",
    "gelu_reference",
    "resolve_backend",
    "unavailable_backends",
]
