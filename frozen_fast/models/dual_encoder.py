"""The dual encoder: a video tower and a text tower, each with a projection to a common embedding space.

Axis letters: B batch, T frames, C channels, H and W pixels, L text tokens, D width of the common space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.common.similarity import cosine_similarities
from frozen_fast.config.extensions import text_towers, video_towers
from frozen_fast.config.schema import ModelConfig
from frozen_fast.errors import UserError
from frozen_fast.models.hub import checkpoint_path
from frozen_fast.models.learned_scale import LearnedScale
from frozen_fast.models.pretrained import StoredModel, load_weights, read_model, read_run, write_model
from frozen_fast.models.retrieval_model import Features, TextInput, VideoInput
from frozen_fast.models.text.text_tower import TextTower
from frozen_fast.models.text.tokenizer import Tokenizer
from frozen_fast.models.text.transformers_tower import default_max_tokens
from frozen_fast.models.video.video_tower import IMAGENET_MEAN, IMAGENET_STD, VideoTower
from frozen_fast.models.video_side import VideoSide, stored_tower

TextActivation = Literal["relu", "none"]

NORM_EPS = 1e-8
"""Smallest norm in normalisation, as in the released code."""

PROJECTION_STD = 0.02
"""Standard deviation of the truncated normal distribution of the projections' initial weights."""


class DualEncoder(VideoSide):
    """Maps clips and captions to a common embedding space. Parameter names are those of the released checkpoints."""

    kind = "frozen"

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
        """Initialise from two towers.

        Args:
            video_model: the video tower.
            text_model: the text tower.
            embedding_width: D; 0: no projections, for towers that already have a common space (CLIP's).
            text_activation: activation before the text projection: "relu" as released, "none" as in the paper.
            learned_frames: None: the tower's max_frames.
            mean: mean of the training data's pixels, RGB in [0, 1].
            std: their standard deviation.
            loss_scale: learned scale of the similarities in the loss; None: a fixed temperature.
        """
        super().__init__(video_model, learned_frames=learned_frames, mean=mean, std=std)
        self.projected = embedding_width != 0
        if not self.projected and text_model.width != video_model.width:
            got = f"got 0 with a text tower of width {text_model.width} and a video tower of {video_model.width}"
            raise UserError(f"model.embedding_width: {got}; allowed: 1 or more, or towers of one width")
        embedding_width = embedding_width or video_model.width
        if embedding_width < 1:
            raise UserError(f"model.embedding_width: got {embedding_width}; allowed: 0 or more")
        if text_activation not in ("relu", "none"):
            raise UserError(f"model.text_activation: got {text_activation!r}; allowed: relu, none")
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
        self.loss_scale = loss_scale  # last, as in training: results depend on the order of parameters in the last bits

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The text tower's tokenizer."""
        return self.text_model.tokenizer

    def text_features(self, text: TextInput) -> Features:
        """Return {"embedding": [Q, D]}, not normalised; see encode_text."""
        return {"embedding": self.encode_text(text, normalize=False)}

    def video_features(self, video: VideoInput) -> Features:
        """Return {"embedding": [V, D]}, not normalised; see encode_video."""
        if not isinstance(video, Tensor):
            raise ValueError(f"video: got {type(video).__name__}; allowed: a tensor [B, T, 3, H, W]")
        return {"embedding": self.encode_video(video, normalize=False)}

    def pair_similarities(self, text: Features, video: Features) -> Tensor:
        """Return cosine similarities [1, Q, V]."""
        return cosine_similarities(text["embedding"], video["embedding"])[None]

    @property
    def vector_width(self) -> int:
        """The width of the common space."""
        return self.embedding_width

    def vectors(self, features: Features) -> Tensor:
        """Return the normalised embeddings [N, D]."""
        return F.normalize(features["embedding"].float(), dim=-1)

    def encode_video(self, video_BTCHW: Tensor, normalize: bool = True) -> Tensor:
        """Embed clips; follows train() and eval(), differentiable.

        Args:
            video_BTCHW: [B, T, 3, R, R] with the tower's resolution R and 1 <= T <= learned_frames; normalised floats,
                or uint8 pixels, which this method normalises.
            normalize: divide by the L2 norm.

        Returns:
            [B, D].

        Raises:
            ValueError: for another shape or dtype, or more frames than there are learned temporal embeddings for.
        """
        raw_BD = self.vid_proj(self.tower_output(video_BTCHW))
        return F.normalize(raw_BD, dim=-1, eps=NORM_EPS) if normalize else raw_BD

    def encode_text(self, texts: Sequence[str] | Mapping[str, Tensor], normalize: bool = True) -> Tensor:
        """Embed captions; follows train() and eval(), differentiable.

        Args:
            texts: a list of strings, or a dict of input_ids and attention_mask [B, L] (other keys of a tokenizer, such
                as token_type_ids, are ignored).
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
        """Return ids and mask on the device of the weights."""
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

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks of both towers, the units of sharding."""
        return [*self.video_model.repeated_blocks(), *self.text_model.repeated_blocks()]

    def compiled_parts(self) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
        """Return the video tower's blocks, and the text tower, whose caption lengths change between batches."""
        return self.video_model.repeated_blocks(), [self.text_model]

    def architecture(self) -> dict[str, Any]:
        """Return the content of config.json: what from_pretrained needs in addition to weights and tokenizer."""
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
        """Write model.safetensors, config.json and the tokenizer, from which from_pretrained loads without the Hub.

        Args:
            folder: created if missing.
            state: weights by name to write instead of the model's own (gathered from shards).
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
        """Load a checkpoint; the model is in eval mode.

        Args:
            path: a folder of save_pretrained or training, a released .pth or .pth.tar file, or ORG/NAME on the Hugging
                Face Hub (hub.checkpoint_path).
            num_frames: number of frames; None: as many as the checkpoint learned. Fewer frames keep the first temporal
                embeddings, more frames expand them.
            expansion: "zero", "nearest" or "bilinear".
            tokenizer: transformers name, local folder or package:MODULE/FOLDER; None: the checkpoint's own (released
                files have none, and then accept token ids only).
            max_frames: rows of the frame embeddings to allocate; None: num_frames. The rows above num_frames are 0, or
                with num_frames None the checkpoint's initial values.
            max_tokens: captions are truncated to this many tokens; None: the checkpoint's value.
            config: keys that select how the towers compute (attention, checkpointed blocks, frozen layers, a released
                file's attention heads); None: defaults.

        Raises:
            UserError: for a missing, damaged or unsupported checkpoint.
        """
        path = checkpoint_path(path)
        config = config or ModelConfig()
        heads = {"video_heads": config.video.heads, "text_heads": config.text.heads}
        stored = read_model(path, tokenizer, max_tokens, **heads)
        model = cls.from_stored(stored, path, num_frames, expansion, max_frames=max_frames, config=config)
        model.run = read_run(path)
        return model

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
        """Build the model of from_pretrained from the result of read_model(path), which it consumes."""
        told = stored.architecture
        try:
            tower = video_towers.load(told["video"]["tower"])
            video, learned = stored_tower(tower, told, num_frames, max_frames, config.video)
            text_tower = text_towers.load(told["text"]["tower"])
            text = text_tower.from_architecture(told["text"], stored.tokenizer, config.text)
        except (KeyError, TypeError) as error:
            raise UserError(f"checkpoint: got {path}, whose architecture is incomplete ({error})") from error
        keys = ("embedding_width", "text_activation", "mean", "std")
        options: dict[str, Any] = {key: told[key] for key in keys if key in told}
        if "loss_scale" in told:
            options["loss_scale"] = LearnedScale.from_settings(told["loss_scale"])
        model = cls(video, text, learned_frames=learned, **options)
        model.fit_frame_rows(stored.state, told["learned_frames"], num_frames, expansion, path)
        load_weights(model, stored.state, path)
        return model.eval()
