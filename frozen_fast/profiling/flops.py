"""FLOPs of a dual encoder's training step from those of its towers.

A multiply-add counts as 2. Only matrix products count, as in the usual
definition of MFU: no norms, activations, softmax or optimizer. Training costs
3 x forward (the backward pass has two products for each of the forward's);
recomputation is never counted.

Axis letters: E width of the common space.
"""

from __future__ import annotations

from dataclasses import dataclass

TRAINING_OVER_FORWARD = 3


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of the matrix products of one training clip, forward and backward.

    Attributes:
        executed: what this implementation computes; MFU is of these.
        nominal: the published model in full, last block and patch embedding's input gradient included.
    """

    executed: float
    nominal: float

    def __mul__(self, clips: float) -> TrainingFlops:
        """FLOPs of a number of clips."""
        return TrainingFlops(self.executed * clips, self.nominal * clips)

    def __add__(self, other: TrainingFlops) -> TrainingFlops:
        """The sum."""
        return TrainingFlops(self.executed + other.executed, self.nominal + other.nominal)


@dataclass(frozen=True, kw_only=True)
class ClipFlops:
    """Forward FLOPs of one clip with its caption, by part.

    Attributes:
        frozen: the share that has no backward pass.
        of_pixels: the share whose input needs no gradient: its backward pass has one product for each of the forward's.
    """

    video: float
    text: float
    loss: float
    frozen: float = 0.0
    of_pixels: float = 0.0

    @property
    def forward(self) -> float:
        """All parts."""
        return self.video + self.text + self.loss

    @property
    def training(self) -> float:
        """Forward and backward."""
        return TRAINING_OVER_FORWARD * self.forward - (TRAINING_OVER_FORWARD - 1) * self.frozen - self.of_pixels


def clip_flops(
    video: float,
    text: float,
    *,
    widths: tuple[int, int],
    global_batch_size: int,
    embedding_width: int = 256,
    frozen: float = 0.0,
    of_pixels: float = 0.0,
) -> ClipFlops:
    """FLOPs of one clip of a training step: towers, their projections, loss.

    Args:
        video: forward FLOPs of the video tower for one clip (VideoTower.forward_flops).
        text: forward FLOPs of the text tower for one caption (TextTower.forward_flops).
        widths: of the towers' outputs, video and text.
        global_batch_size: clips whose captions are negatives.
        embedding_width: E.
        frozen: the share of video and text that has no backward pass.
        of_pixels: the share of video whose input needs no gradient.
    """
    return ClipFlops(
        video=video + 2.0 * widths[0] * embedding_width,
        text=text + 2.0 * widths[1] * embedding_width,
        loss=2.0 * global_batch_size * embedding_width,
        frozen=frozen,
        of_pixels=of_pixels,
    )
