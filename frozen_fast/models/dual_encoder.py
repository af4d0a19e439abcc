"""The dual encoder: a video tower and a text tower, each with a projection into one common space.

Axis letters: B batch, T frames, C channels, H and W pixels, L text tokens, D width of the common space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.common.similarity import cosine_similarities
from frozen_fast.config.extensions import text_towers, video_towers
from frozen_fast.config.schema import ModelConfig
from frozen_fast.errors import UserError
from frozen_fast.models.hub import checkpoint_path
from frozen_fast.models.learned_scale import LearnedScale
from frozen_fast.models.pretrained import StoredModel, load_weights, read_model, write_model
from frozen_fast.models.retrieval_model import Features, RetrievalModel, TextInput, VideoInput
from frozen_fast.models.text.text_tower import TextTower
from frozen_fast.models.text.tokenizer import Tokenizer
from frozen_fast.models.text.transformers_tower import default_max_tokens
from frozen_fast.models.video.temporal import expand_temporal_embedding
from frozen_fast.models.video.video_tower import IMAGENET_MEAN, IMAGENET_STD, VideoTower, frames_in_words

TextActivation = Literal["relu", "none"]


NORM_EPS = 1e-8
"""Smallest norm that a raw embedding is divided by (the released code's)."""

PROJECTION_STD = 0.02
"""Standard deviation of the truncated normal that the projections are drawn from."""

LARGEST_NORMALISED = 10.0
"""A normalised pixel is within the range that mean and std give; this many times beyond it, floats are raw pixels."""


class DualEncoder(RetrievalModel):
    """Video and captions -> one common space. State dict names are those of the released checkpoints.

    Attributes:
        learned_frames: most frames per clip that the model takes now: rows of the video tower's frame embeddings that
            hold learned values (or are being learned), and the frames it was trained with where it has none.
        mean, std: RGB normalisation of the training data, in [0, 1]; encode_video applies it to uint8 clips.
    """

    kind = "frozen"
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        video_model: VideoTower,
        text_model: TextTower,
        *,
        embedding_width: int = 256,
        text_activation: TextActivation = "relu",
        learned_frames: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        loss_scale: LearnedScale | None = None,
    ) -> None:
        """Join two towers.

        Args:
            video_model: the video tower.
            text_model: the text tower.
            embedding_width: D; 0: no projections, the towers' outputs are compared as they are (CLIP's towers).
            text_activation: before the text projection: "relu" as released, "none" as in the paper.
            learned_frames: None: as many as the tower takes.
            mean: of the training data's pixels, RGB in [0, 1].
            std: likewise.
            loss_scale: the scale that the loss learns with the model; None: a fixed temperature.
        """
        super().__init__()
        self.projected = embedding_width != 0
        if not self.projected and text_model.width != video_model.width:
            got = f"got 0 with a text tower of width {text_model.width} and a video tower of {video_model.width}"
            raise UserError(f"model.embedding_width: {got}; allowed: 1 or more, or towers of one width")
        embedding_width = embedding_width or video_model.width
        if embedding_width < 1:
            raise UserError(f"model.embedding_width: got {embedding_width}; allowed: 0 or more")
        if text_activation not in ("relu", "none"):
            raise UserError(f"model.text_activation: got {text_activation!r}; allowed: relu, none")
        self.video_model = video_model
        self.text_model = text_model
        self.embedding_width = embedding_width
        self.text_activation: TextActivation = text_activation
        self.txt_proj, self.vid_proj = nn.Sequential(), nn.Sequential()
        if self.projected:
            self.txt_proj.append(nn.ReLU() if text_activation == "relu" else nn.Identity())
            for projection, width in ((self.txt_proj, text_model.width), (self.vid_proj, video_model.width)):
                linear = nn.Linear(width, embedding_width)
                nn.init.trunc_normal_(linear.weight, std=PROJECTION_STD)
                nn.init.zeros_(linear.bias)
                projection.append(linear)
        self.learned_frames = video_model.max_frames if learned_frames is None else learned_frames
        if not 1 <= self.learned_frames <= video_model.max_frames:
            raise UserError(f"learned_frames: got {self.learned_frames}; allowed: 1 to {video_model.max_frames}")
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean, std: got {self.mean}, {self.std}; allowed: three numbers each, std above 0")
        self.loss_scale = loss_scale  # last, where training adds it too: the order of parameters decides the last bits

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The text tower's tokenizer."""
        return self.text_model.tokenizer

    @property
    def resolution(self) -> int:
        """R: frames are R x R pixels."""
        return self.video_model.resolution

    def text_features(self, text: TextInput) -> Features:
        """{"embedding": [Q, D]}, not normalised; see encode_text."""
        return {"embedding": self.encode_text(text, normalize=False)}

    def video_features(self, video: VideoInput) -> Features:
        """{"embedding": [V, D]}, not normalised; see encode_video."""
        if not isinstance(video, Tensor):
            raise ValueError(f"video: got {type(video).__name__}; allowed: a tensor [B, T, 3, H, W]")
        return {"embedding": self.encode_video(video, normalize=False)}

    def pair_similarities(self, text: Features, video: Features) -> Tensor:
        """Cosine similarities [1, Q, V]."""
        return cosine_similarities(text["embedding"], video["embedding"])[None]

    def encode_video(self, video_BTCHW: Tensor, normalize: bool = True) -> Tensor:
        """Embed clips; follows train() and eval(), differentiable.

        Args:
            video_BTCHW: [B, T, 3, R, R] with the tower's resolution R and 1 <= T <= learned_frames; floats that are
                normalised already, or uint8 pixels, which are normalised here.
            normalize: divide by the L2 norm.

        Returns:
            [B, D].

        Raises:
            ValueError: for another shape or dtype, or more frames than there are learned temporal embeddings for.
        """
        if not isinstance(video_BTCHW, Tensor):
            raise ValueError(f"video: got {type(video_BTCHW).__name__}; allowed: a tensor [B, T, 3, H, W]")
        if video_BTCHW.dim() == 5 and self.learned_frames < video_BTCHW.shape[1]:
            raise ValueError(
                f"video: got {video_BTCHW.shape[1]} frames; allowed: up to {self.learned_frames}, those with a learned "
                "temporal embedding (from_pretrained(..., num_frames=T) or expand_frames(T, method) makes more)"
            )
        self.video_model.check_video(video_BTCHW)
        raw_BD = self.vid_proj(self.video_model(self._normalised(video_BTCHW)))
        return F.normalize(raw_BD, dim=-1, eps=NORM_EPS) if normalize else raw_BD

    def _normalised(self, video_BTCHW: Tensor) -> Tensor:
        """Move a clip batch to the weights' device, as floats of their dtype, uint8 pixels normalised."""
        dtype = next(self.parameters()).dtype
        self._check_range(video_BTCHW)
        video = video_BTCHW.to(self.device)
        if video.is_floating_point():
            return video.to(dtype)
        if video.dtype != torch.uint8:
            raise ValueError(f"video: got dtype {video.dtype}; allowed: normalised floats, or uint8")
        mean = torch.tensor(self.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(3, 1, 1)
        return (video.float().div_(255).sub_(mean).div_(std)).to(dtype)

    def _check_range(self, video: Tensor) -> None:
        """Refuse float pixels that were not normalised; on a CUDA device only outside training, which it would stop."""
        if not video.is_floating_point() or (video.is_cuda and torch.is_grad_enabled()):
            return
        if torch.compiler.is_exporting():  # a program cannot look at values
            return
        bound = max(max(mean, 1 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))
        largest = float(video.detach().abs().amax())
        if largest > LARGEST_NORMALISED * bound:
            raise ValueError(
                f"video: got floats up to {largest:.4g}; allowed: floats normalised with the model's mean and std "
                f"(up to about {bound:.2g}), or uint8 pixels, which are normalised here"
            )

    def encode_text(self, texts: Sequence[str] | Mapping[str, Tensor], normalize: bool = True) -> Tensor:
        """Embed captions; follows train() and eval(), differentiable.

        Args:
            texts: a list of strings, or a dict of input_ids and attention_mask [B, L] (other keys that a tokenizer
                may add, such as token_type_ids, say nothing about single captions and are left out).
            normalize: divide by the L2 norm.

        Returns:
            [B, D].

        Raises:
            ValueError: for other types or shapes, or more tokens than the tower has positions.
        """
        tokens = texts if isinstance(texts, Mapping) else self.text_model.tokenize(texts)
        ids_BL, mask_BL = self._checked_tokens(tokens)
        raw_BD = self.txt_proj(self.text_model(ids_BL, mask_BL))
        return F.normalize(raw_BD, dim=-1, eps=NORM_EPS) if normalize else raw_BD

    def _checked_tokens(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Ids and mask on the weights' device."""
        absent = [key for key in ("input_ids", "attention_mask") if not isinstance(tokens.get(key), Tensor)]
        if absent:
            raise ValueError(f"text: got no tensor {absent[0]!r}; allowed: a dict of input_ids and attention_mask")
        ids_BL, mask_BL = tokens["input_ids"], tokens["attention_mask"]
        if ids_BL.dim() != 2 or 0 in ids_BL.shape or ids_BL.shape != mask_BL.shape or ids_BL.is_floating_point():
            raise ValueError(
                f"text: got input_ids {list(ids_BL.shape)} {ids_BL.dtype} and attention_mask {list(mask_BL.shape)}; "
                "allowed: two whole-number tensors [B, L] of one shape"
            )
        longest = self.text_model.max_positions
        if longest is not None and ids_BL.shape[1] > longest:
            raise ValueError(f"text: got {ids_BL.shape[1]} tokens; allowed: up to {longest}")
        return ids_BL.to(self.device), mask_BL.to(self.device)

    def frame_embeddings(self) -> list[str]:
        """Names in this model of the parameters [1, max_frames, D] that grow with the number of frames."""
        return [f"video_model.{name}" for name in self.video_model.frame_embeddings]

    def expand_frames(self, num_frames: int, method: str = "zero") -> None:
        """Fill rows learned_frames.. of the frame embeddings in place, and count them as learned from now on.

        From one frame, "nearest" and "bilinear" give every frame the same row and "zero" none but the first: what the
        new rows were drawn as (temporal_init_std; 0 unless asked for) is added, so that frames differ from the start.

        Args:
            num_frames: up to the tower's max_frames; fewer than learned_frames or as many changes nothing.
            method: "zero", "nearest" or "bilinear" (temporal.expand_temporal_embedding).

        Raises:
            UserError: for more frames than the tower was built for.
        """
        if not 1 <= num_frames <= self.video_model.max_frames:
            allowed = f"1 to {self.video_model.max_frames}, the tower's max_frames"
            raise UserError(f"num_frames: got {num_frames}; allowed: {allowed}")
        if num_frames <= self.learned_frames:
            return
        with torch.no_grad():
            for name in self.frame_embeddings():
                embed = self.get_parameter(name)
                expanded = expand_temporal_embedding(embed[:, : self.learned_frames], num_frames, method)
                if self.learned_frames == 1:
                    expanded[:, 1:] += embed[:, 1:num_frames]
                embed[:, :num_frames] = expanded
        self.learned_frames = num_frames

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks of both towers: units of sharding."""
        return [*self.video_model.repeated_blocks(), *self.text_model.repeated_blocks()]

    def kernels_used(self, device: torch.device, *, compiled: bool) -> dict[str, Any]:
        """The video tower's."""
        return self.video_model.kernels_used(device, compiled=compiled)

    def architecture(self) -> dict[str, Any]:
        """What config.json holds: all that from_pretrained needs beside the weights and the tokenizer."""
        video, text = self.video_model, self.text_model
        longest = default_max_tokens(text.max_positions) if text.tokenizer is None else text.tokenizer.max_tokens
        return {
            "video": {"tower": video.name, **video.architecture(), "max_frames": video.max_frames},
            "text": {"tower": text.name, **text.architecture(), "max_tokens": longest},
            "embedding_width": self.embedding_width if self.projected else 0,
            "text_activation": self.text_activation,
            "learned_frames": self.learned_frames,
            "mean": list(self.mean),
            "std": list(self.std),
            **({} if self.loss_scale is None else {"loss_scale": self.loss_scale.settings()}),
        }

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write model.safetensors, config.json and the tokenizer, from which from_pretrained needs no hub.

        Args:
            folder: made if missing.
            state: weights to write instead of the model's own (gathered from shards), under the same names.
        """
        weights = self.state_dict() if state is None else state
        write_model(Path(folder), weights, self.architecture(), self.text_model.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        num_frames: int | None = None,
        expansion: str = "zero",
        tokenizer: str | None = None,
        *,
        max_frames: int | None = None,
        max_tokens: int | None = None,
        config: ModelConfig | None = None,
    ) -> DualEncoder:
        """Load a checkpoint; the model comes in eval mode.

        Args:
            path: a folder that save_pretrained or training wrote, a released .pth or .pth.tar file, or ORG/NAME of the
                Hugging Face Hub (hub.checkpoint_path).
            num_frames: frames that the model takes; None: those that the checkpoint learned. Fewer keep the first
                temporal embeddings, more expand them.
            expansion: "zero", "nearest" or "bilinear".
            tokenizer: transformers name, local folder or package:MODULE/FOLDER; None: the checkpoint's own (released
                files have none: they then take token ids only).
            max_frames: rows of the frame embeddings to allocate; None: num_frames. The rows above num_frames are 0,
                or, with num_frames None, the values that the run drew for them.
            max_tokens: captions are cut to this many tokens; None: the checkpoint's value.
            config: says how the towers compute (attention, recomputed blocks, frozen layers, a released file's
                attention heads); None: defaults.

        Raises:
            UserError: for a missing, damaged or foreign checkpoint.
        """
        path = checkpoint_path(path)
        config = config or ModelConfig()
        heads = {"video_heads": config.video.heads, "text_heads": config.text.heads}
        stored = read_model(path, tokenizer, max_tokens, **heads)
        return cls.from_stored(stored, path, num_frames, expansion, max_frames=max_frames, config=config)

    @classmethod
    def from_stored(
        cls,
        stored: StoredModel,
        path: Path,
        num_frames: int | None = None,
        expansion: str = "zero",
        *,
        max_frames: int | None = None,
        config: ModelConfig,
    ) -> DualEncoder:
        """from_pretrained, from what read_model(path) has given; `stored` is used up."""
        told = stored.architecture
        learned = told["learned_frames"] if num_frames is None else num_frames
        if learned < 1:
            raise UserError(f"num_frames: got {learned}; allowed: 1 or more")
        rows = max(learned, max_frames or learned)
        try:
            tower = video_towers.load(told["video"]["tower"])
            video = tower.from_architecture(told["video"], max_frames=rows, section=config.video)
            text_tower = text_towers.load(told["text"]["tower"])
            text = text_tower.from_architecture(told["text"], stored.tokenizer, config.text)
        except (KeyError, TypeError) as error:
            raise UserError(f"checkpoint: got {path}, whose architecture is incomplete ({error})") from error
        keys = ("embedding_width", "text_activation", "mean", "std")
        options: dict[str, Any] = {key: told[key] for key in keys if key in told}
        if "loss_scale" in told:
            options["loss_scale"] = LearnedScale.from_settings(told["loss_scale"])
        if learned not in video.frames:
            allowed = frames_in_words(video.frames)
            raise UserError(f"num_frames: got {learned}; allowed: {allowed}, which the checkpoint's tower takes")
        model = cls(video, text, learned_frames=learned, **options)
        for name in model.frame_embeddings():
            rows_1TD = stored.state.get(name)
            if rows_1TD is None or rows_1TD.dim() != 3 or not 1 <= told["learned_frames"] <= rows_1TD.shape[1]:
                shape = None if rows_1TD is None else list(rows_1TD.shape)
                got = f"{name} has shape {shape} and {told['learned_frames']} learned frames"
                raise UserError(f"checkpoint: got {path}, where {got}")
            if num_frames is not None:
                rows_1TD = expand_temporal_embedding(rows_1TD[:, : told["learned_frames"]], learned, expansion)
            stored.state[name] = expand_temporal_embedding(rows_1TD, rows, "zero")
        load_weights(model, stored.state, path)
        return model.eval()
