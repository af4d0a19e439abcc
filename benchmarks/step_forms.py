"""The models that model_step.py times, each in our form and as its released code computes it.

A form is a module and the loss of one step. All forms of a model share parameter names, so that every contender starts
from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from released_clip import ReleasedCaptions, ReleasedClip2Video, ReleasedClip4Clip
from released_tower import ReleasedTower
from torch import Tensor, nn

from frozen_fast.losses import contrastive_loss
from frozen_fast.models import VIDEO_SIZES, DualEncoder, SpaceTimeTransformer, TransformersTower
from frozen_fast.models.clip.clip_captions import ClipCaptions
from frozen_fast.models.clip.clip_frames import ClipFrames
from frozen_fast.models.clip.clip_towers import CLIP_SIZES
from frozen_fast.models.clip2video.clip2video_model import DEFAULT_CENTERS, TEMPORAL_DEPTH, Clip2Video
from frozen_fast.models.counted_flops import counted_flops
from frozen_fast.models.text.transformers_tower import KNOWN_ARCHITECTURES, model_from_config

TEXT = "distilbert-base-uncased"
TEXT_TOKENS = 32
CLIP_TEMPERATURE = 0.01
START_OF_TEXT, END_OF_TEXT = 49406, 49407


@dataclass(frozen=True)
class Case:
    """One batch of one model; whole: both sides, the loss and the optimizer, not the video side alone."""

    model: str
    frames: int
    batch: int
    whole: bool
    size: str


@dataclass(frozen=True)
class How:
    """How a form computes the model; released: as the released code does."""

    released: bool
    attention: str
    fused_ops: str
    full_last_block: bool


class Form(NamedTuple):
    """A module and its loss on (video, text); blocks are what +compile compiles."""

    model: nn.Module
    loss: Callable[[Tensor, dict[str, Tensor]], Tensor]
    blocks: list[nn.Module]


def frozen_form(case: Case, how: How, max_frames: int) -> Form:
    """Frozen in Time: the space-time transformer, with DistilBERT where the step is whole."""
    size = VIDEO_SIZES[case.size]
    ours = SpaceTimeTransformer(
        size,
        max_frames,
        attention=how.attention,
        fused_ops="plain" if how.fused_ops == "plain" else "auto",
        full_last_block=how.full_last_block,
        time_init="random",
    )
    model = model_from_config(KNOWN_ARCHITECTURES[TEXT]()) if case.whole else None
    encoder = DualEncoder(ours, TransformersTower(model, None, "auto")) if model is not None else None
    tower: nn.Module = ours
    if how.released:  # last: all forms draw the same weights
        tower = ReleasedTower(size, max_frames)
        tower.load_state_dict(ours.state_dict())
    blocks = list(tower.blocks)  # type: ignore[arg-type]
    if encoder is None:
        return Form(tower, lambda video, text: summed(tower(video)), blocks)
    encoder.video_model = tower  # type: ignore[assignment]
    return Form(encoder, lambda video, text: dual_loss(encoder, video, text), blocks)


def clip4clip_form(case: Case, how: How, max_frames: int) -> Form:
    """CLIP4Clip's meanP: CLIP's towers, the mean of the frames."""
    refuse_full_last_block(how)
    size = CLIP_SIZES[case.size]
    frames = ClipFrames(size, attention=how.attention, fused_ops=how.fused_ops)
    encoder = DualEncoder(frames, ClipCaptions(size), embedding_width=0, text_activation="none") if case.whole else None
    tower: nn.Module = ReleasedClip4Clip(size) if how.released else frames
    tower.load_state_dict(frames.state_dict())
    blocks = list(tower.visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]
    if encoder is None:
        return Form(tower, lambda video, text: summed(tower(video)), blocks)
    if how.released:
        released = ReleasedCaptions(size)
        released.load_state_dict(encoder.text_model.state_dict())
        encoder.video_model, encoder.text_model = tower, released  # type: ignore[assignment]
    return Form(encoder, lambda video, text: dual_loss(encoder, video, text, CLIP_TEMPERATURE), blocks)


def clip2video_form(case: Case, how: How, max_frames: int) -> Form:
    """CLIP2Video with masks, all frames valid; both of its losses where the step is whole."""
    refuse_full_last_block(how)
    size = CLIP_SIZES[case.size]
    ours = Clip2Video(size, attention=how.attention, fused_ops=how.fused_ops)
    frame_mask = torch.ones(case.batch, case.frames)
    if not how.released:

        def sides(video: Tensor, text: dict[str, Tensor] | None) -> list[Tensor]:
            features = ours.video_features(video, frame_mask)
            if text is None:
                return list(features.values())
            return list(ours.pair_similarities(ours.text_features(text), features))

        return Form(ours, lambda video, text: two_losses(case, sides, video, text), list(ours.repeated_blocks()))
    released = ReleasedClip2Video(size, DEFAULT_CENTERS, TEMPORAL_DEPTH)
    released.load_state_dict(ours.state_dict())

    def released_sides(video: Tensor, text: dict[str, Tensor] | None) -> list[Tensor]:
        if text is None:
            return list(released.clip_vectors(video, frame_mask))
        return list(released(video, frame_mask, text["input_ids"], text["attention_mask"]))

    blocks = [module for module in released.modules() if type(module).__name__ == "ReleasedBlock"]
    return Form(released, lambda video, text: two_losses(case, released_sides, video, text), blocks)


FORMS = {"frozen": frozen_form, "clip4clip": clip4clip_form, "clip2video": clip2video_form}
"""Model -> its forms; a name of --model."""

SIZES = {"frozen": VIDEO_SIZES, "clip4clip": CLIP_SIZES, "clip2video": CLIP_SIZES}
DEFAULT_SIZES = {"frozen": "base_patch16_224", "clip4clip": "ViT-B/32", "clip2video": "ViT-B/32"}


def summed(embeddings: Tensor) -> Tensor:
    """A loss for one side alone."""
    return embeddings.float().square().sum()


def dual_loss(encoder: DualEncoder, video: Tensor, text: dict[str, Tensor], temperature: float = 0.05) -> Tensor:
    """The contrastive loss of both towers' embeddings."""
    text_BD = encoder.txt_proj(encoder.text_model(text["input_ids"], text["attention_mask"]))
    return contrastive_loss(encoder.vid_proj(encoder.video_model(video)), text_BD, temperature)


def two_losses(case: Case, sides: Callable[..., list[Tensor]], video: Tensor, text: dict[str, Tensor]) -> Tensor:
    """The mean over both similarities and both directions of the cross-entropy, or the sum of the video side."""
    if not case.whole:
        return torch.stack([summed(vectors) for vectors in sides(video, None)]).sum()
    own = torch.arange(case.batch, device=video.device)
    losses = [nn.functional.cross_entropy(sim, own) for pair in sides(video, text) for sim in (pair, pair.t())]
    return torch.stack(losses).mean()


def refuse_full_last_block(how: How) -> None:
    """+whole is Frozen in Time's."""
    if how.full_last_block:
        raise ValueError("+whole: got a CLIP model; allowed: frozen")


def resolution_of(case: Case) -> int:
    """Pixels along a frame's edge."""
    return int(SIZES[case.model][case.size].resolution)


def draw_text(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    """Random captions of full length; CLIP's begin and end with its special tokens."""
    ids = torch.randint(1000, 20000, (case.batch, TEXT_TOKENS), generator=generator, device=device)
    if case.model != "frozen":
        ids[:, 0], ids[:, -1] = START_OF_TEXT, END_OF_TEXT
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def step_flops(case: Case, max_frames: int) -> float | None:
    """FLOPs of one step's matrix products, three times the forward pass of the model as published."""
    one = Case(case.model, case.frames, 1, case.whole, case.size)
    side = resolution_of(case)

    class Forward(nn.Module):
        """The released form's loss as a module without parameters of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.form = FORMS[case.model](one, How(True, "sdpa", "plain", False), max_frames)

        def forward(self, video: Tensor, ids: Tensor) -> Tensor:
            return self.form.loss(video, {"input_ids": ids.long(), "attention_mask": torch.ones_like(ids)})

    forward = counted_flops(Forward, (1, case.frames, 3, side, side), (1, TEXT_TOKENS))
    return None if forward is None else 3 * case.batch * forward
