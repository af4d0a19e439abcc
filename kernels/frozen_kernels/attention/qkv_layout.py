"""The packed token layout that every attention backend reads, and its checks.

Axis letters: B batch, T frames, P patches per frame, S = 1 + T*P tokens (CLS first, then frame by frame),
N heads, D head width (in qkv_BS3ND), E = N*D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from frozen_kernels.availability import FLOAT_DTYPES

Axis = Literal["time", "space"]
AXES: tuple[Axis, ...] = ("time", "space")


@dataclass(frozen=True)
class Layout:
    """The sizes of one packed qkv tensor."""

    batch: int
    frames: int
    patches: int
    heads: int
    head_width: int

    @property
    def tokens(self) -> int:
        """S, tokens of a clip with CLS."""
        return 1 + self.frames * self.patches

    @property
    def width(self) -> int:
        """E = N*D."""
        return self.heads * self.head_width

    @property
    def scale(self) -> float:
        """The factor on the scores, D^-0.5."""
        return self.head_width**-0.5


def read_layout(qkv_BS3ND: Tensor, num_frames: int, axis: str) -> Layout:
    """Check a packed qkv tensor and return its sizes.

    Raises:
        ValueError: for another rank, dtype, a token count that is not 1 + num_frames * P, or an unknown axis.
    """
    if axis not in AXES:
        raise ValueError(f"axis: got {axis!r}; allowed: {', '.join(AXES)}")
    if qkv_BS3ND.dim() != 5 or qkv_BS3ND.shape[2] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv_BS3ND.shape)}; allowed: [B, S, 3, N, D]")
    if qkv_BS3ND.dtype not in FLOAT_DTYPES:
        raise ValueError(f"qkv: got dtype {qkv_BS3ND.dtype}; allowed: float32, bfloat16, float16")
    batch, tokens, _, heads, head_width = qkv_BS3ND.shape
    if batch < 1 or heads < 1 or head_width < 1:  # not min(): torch.export would fix the batch size
        raise ValueError(f"qkv: got shape {tuple(qkv_BS3ND.shape)}; allowed: sizes of at least 1")
    if num_frames < 1 or tokens < 1 + num_frames or (tokens - 1) % num_frames:
        raise ValueError(f"num_frames: got {num_frames} for {tokens} tokens; allowed: S = 1 + num_frames * P, P >= 1")
    return Layout(batch, num_frames, (tokens - 1) // num_frames, heads, head_width)


def patch_view(tokens_BSND: Tensor, layout: Layout) -> Tensor:
    """The patches of [B, S, N, D] as a view [B, T, P, N, D] (no copy, any strides)."""
    return tokens_BSND[:, 1:].unflatten(1, (layout.frames, layout.patches))
