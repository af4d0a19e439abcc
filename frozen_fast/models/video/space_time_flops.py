"""FLOPs of the space-time transformer, computed from its sizes.

Axis letters: T frames, P patches per frame, S = 1 + T*P tokens, D width.
"""

from __future__ import annotations

from frozen_fast.config.video_sizes import VideoSize


def embedding_flops(size: VideoSize, frames: int) -> float:
    """Forward FLOPs of the patch embedding for one clip of T frames."""
    return 2.0 * frames * size.patches_per_frame * 3 * size.patch**2 * size.width


def space_time_flops(
    size: VideoSize, frames: int, *, executed: bool = False, skip_time_attention_at_one_frame: bool = False
) -> float:
    """Forward FLOPs of the tower for one clip: matrix products only, a multiply-add counts as 2.

    Args:
        size: sizes of the tower.
        frames: T.
        executed: exclude queries, projections and MLP of all tokens but CLS in the last block, whose outputs are
            unused. False: count every block in full, as in the paper.
        skip_time_attention_at_one_frame: as in the config.
    """
    width, per_frame = size.width, size.patches_per_frame
    patches = frames * per_frame
    tokens = 1 + patches
    linear = 2.0 * width * width
    # A patch query attends to CLS and its group, the CLS query to all tokens: scores and weighted values.
    time_pairs = patches * (frames + 1) + tokens
    space_pairs = patches * (per_frame + 1) + tokens
    time = 4 * linear * tokens + 4.0 * width * time_pairs
    if frames == 1 and skip_time_attention_at_one_frame:
        time = 0.0
    space = 4 * linear * tokens + 4.0 * width * space_pairs
    mlp = 2 * size.mlp_ratio * linear * tokens
    last = space + mlp
    if executed:
        # Keys and values of all tokens; query, projection and MLP of CLS.
        last = 2 * linear * tokens + 2 * linear + 4.0 * width * tokens + 2 * size.mlp_ratio * linear
    return embedding_flops(size, frames) + size.depth * time + (size.depth - 1) * (space + mlp) + last
