"""divided_attention: the one entry point, and the table of its backends.

Axis letters: see frozen_kernels.layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from frozen_kernels.attention_batched import attention_batched
from frozen_kernels.attention_reference import attention_reference, cls_reference
from frozen_kernels.attention_sdpa import attention_sdpa, cls_sdpa
from frozen_kernels.layout import Layout, read_layout


@dataclass(frozen=True)
class Backend:
    """One way to compute divided attention: all tokens, and the CLS row alone."""

    full: Callable[[Tensor, Layout, str], Tensor]
    cls_only: Callable[[Tensor, Layout], Tensor]


BACKENDS: dict[str, Backend] = {
    "reference": Backend(attention_reference, cls_reference),
    "sdpa": Backend(attention_sdpa, cls_sdpa),
    "batched": Backend(attention_batched, cls_sdpa),
}


def divided_attention(
    qkv_BS3ND: Tensor,
    num_frames: int,
    axis: str,
    *,
    backend: str = "auto",
    cls_only: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """Attention of Frozen in Time's space-time blocks (section 3.2 of the paper): over time or over space.

    The CLS query attends to all S tokens. A patch query attends to CLS and to its group: the same position in
    all frames (axis "time", T+1 keys) or its own frame (axis "space", P+1 keys). Scores are scaled by D^-0.5.

    Args:
        qkv_BS3ND: [B, S, 3, N, D], queries, keys and values of S = 1 + num_frames * P tokens, CLS first, then
            frame by frame; fp32, bf16 or fp16, any strides.
        num_frames: T.
        axis: "time" or "space".
        backend: "auto" or one of BACKENDS.
        cls_only: compute the CLS row alone.
        deterministic: gradients must not depend on the order of atomic additions.

    Returns:
        [B, S, E] in qkv's dtype, E = N*D; [B, 1, E] with cls_only.

    Raises:
        ValueError: for shapes that do not fit, or a backend that is unknown or cannot run here (with the reason).
    """
    layout = read_layout(qkv_BS3ND, num_frames, axis)
    name = "reference" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}; allowed: auto, {', '.join(BACKENDS)}")
    chosen = BACKENDS[name]
    return chosen.cls_only(qkv_BS3ND, layout) if cls_only else chosen.full(qkv_BS3ND, layout, axis)
