"""FLOPs of the dual encoder from its architecture's numbers.

A multiply-add counts as 2. Matrix products only: norms, activations, softmax and optimizer are left out, as in the
usual definition of MFU. Training costs 3 x forward (the backward pass has two products for each of the forward's);
recomputation is never counted.

Axis letters: T frames, P patches per frame, S = 1 + T*P tokens, L text tokens, D width, E width of the common space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from frozen_fast.errors import UserError

TRAINING_OVER_FORWARD = 3


class VideoShape(Protocol):
    """Sizes of a video tower (models.VideoSize has them)."""

    @property
    def resolution(self) -> int:
        """Side of a frame in pixels."""

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def depth(self) -> int:
        """Number of blocks."""

    @property
    def mlp_ratio(self) -> int:
        """Width of the MLP's hidden layer over D."""


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Sizes of a transformer text tower; its first frozen_layers do not learn."""

    width: int
    layers: int
    feed_forward_width: int
    pooler: bool = False
    frozen_layers: int = 0

    @classmethod
    def from_config(cls, config: Any, *, pooler: bool = False, frozen_layers: int = 0) -> TextShape:
        """Read a transformers config (DistilBERT's or BERT's names).

        Raises:
            UserError: the config has neither.
        """
        values = config.to_dict()
        width = values.get("dim") or values.get("hidden_size")
        layers = values.get("n_layers") or values.get("num_hidden_layers")
        hidden = values.get("hidden_dim") or values.get("intermediate_size")
        if not (width and layers and hidden):
            raise UserError(
                f"model.text: got a {type(config).__name__}; allowed: one that names width, layers, hidden width"
            )
        return cls(width=width, layers=layers, feed_forward_width=hidden, pooler=pooler, frozen_layers=frozen_layers)


@dataclass(frozen=True, kw_only=True)
class ClipFlops:
    """Forward FLOPs of one clip with its caption, by part; frozen is the share of text that has no backward pass."""

    video: float
    text: float
    loss: float
    frozen: float = 0.0

    @property
    def forward(self) -> float:
        """All parts."""
        return self.video + self.text + self.loss

    @property
    def training(self) -> float:
        """Forward and backward."""
        return TRAINING_OVER_FORWARD * self.forward - (TRAINING_OVER_FORWARD - 1) * self.frozen


def clip_flops(
    video: VideoShape,
    text: TextShape,
    *,
    frames: int,
    text_tokens: int,
    global_batch_size: int,
    embedding_width: int = 256,
    executed: bool = False,
    skip_time_attention_at_one_frame: bool = False,
) -> ClipFlops:
    """FLOPs of one clip of a training step.

    Args:
        video: sizes of the video tower.
        text: sizes of the text tower.
        frames: T.
        text_tokens: L, padding included where it is computed.
        global_batch_size: clips whose captions are negatives.
        embedding_width: E.
        executed: count what frozen_fast computes: of the last block nothing but the CLS row is read, so its other
            queries, projections and MLP are left out. False: every block in full, as the paper's model is counted.
        skip_time_attention_at_one_frame: as in the config.
    """
    return ClipFlops(
        video=video_forward_flops(
            video,
            frames,
            embedding_width=embedding_width,
            executed=executed,
            skip_time_attention_at_one_frame=skip_time_attention_at_one_frame,
        ),
        text=text_forward_flops(text, text_tokens, embedding_width=embedding_width),
        loss=2.0 * global_batch_size * embedding_width,
        frozen=text.frozen_layers * text_layer_flops(text, text_tokens),
    )


def video_forward_flops(
    shape: VideoShape,
    frames: int,
    *,
    embedding_width: int = 256,
    executed: bool = False,
    skip_time_attention_at_one_frame: bool = False,
) -> float:
    """Forward FLOPs of the video tower and its projection for one clip; arguments as clip_flops."""
    width, per_frame = shape.width, (shape.resolution // shape.patch) ** 2
    patches = frames * per_frame
    tokens = 1 + patches
    linear = 2.0 * width * width
    # A patch query meets CLS and its group, the CLS query meets all tokens: scores and weighted values.
    time_pairs = patches * (frames + 1) + tokens
    space_pairs = patches * (per_frame + 1) + tokens
    time = 4 * linear * tokens + 4.0 * width * time_pairs
    if frames == 1 and skip_time_attention_at_one_frame:
        time = 0.0
    space = 4 * linear * tokens + 4.0 * width * space_pairs
    mlp = 2 * shape.mlp_ratio * linear * tokens
    last = space + mlp
    if executed:
        # Keys and values of all tokens; query, projection and MLP of CLS.
        last = 2 * linear * tokens + 2 * linear + 4.0 * width * tokens + 2 * shape.mlp_ratio * linear
    embedding = 2.0 * patches * 3 * shape.patch**2 * width
    projection = 2.0 * width * embedding_width
    return embedding + shape.depth * time + (shape.depth - 1) * (space + mlp) + last + projection


def text_forward_flops(shape: TextShape, tokens: int, *, embedding_width: int = 256) -> float:
    """Forward FLOPs of the text tower and its projection for one caption of L tokens."""
    layers = shape.layers * text_layer_flops(shape, tokens)
    return layers + shape.pooler * 2.0 * shape.width**2 + 2.0 * shape.width * embedding_width


def text_layer_flops(shape: TextShape, tokens: int) -> float:
    """Forward FLOPs of one layer of the text tower for one caption of L tokens."""
    linear = 2.0 * shape.width * shape.width
    return 4 * linear * tokens + 4.0 * shape.width * tokens**2 + 4.0 * shape.width * shape.feed_forward_width * tokens
