"""An attention backend: scores and probabilities in fp32, whatever the dtype of a run."""

from torch import Tensor

from frozen_kernels import Backend
from frozen_kernels.attention.qkv_layout import Layout
from frozen_kernels.attention.reference import attention_reference, cls_reference


def fp32_attention(qkv_BS3ND: Tensor, layout: Layout, axis: str) -> Tensor:
    """Divided attention of all tokens: [B, S, 3, N, D] -> [B, S, N*D] in qkv's dtype."""
    return attention_reference(qkv_BS3ND.float(), layout, axis).to(qkv_BS3ND.dtype)


def fp32_cls(qkv_BS3ND: Tensor, layout: Layout) -> Tensor:
    """The CLS row alone: [B, S, 3, N, D] -> [B, 1, N*D]."""
    return cls_reference(qkv_BS3ND.float(), layout).to(qkv_BS3ND.dtype)


FP32 = Backend(full=fp32_attention, cls_only=fp32_cls)
