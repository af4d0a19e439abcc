"""Action recognition: a video tower with a linear head over classes.

A class replaces the caption of retrieval: text_features encodes class names, and the similarity of a class and a clip
is the clip's logit for that class.

Axis letters: B batch, T frames, C classes, V clips, Q class names, D width of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.config.extensions import video_towers
from frozen_fast.config.schema import ModelConfig
from frozen_fast.errors import UserError, unknown_name
from frozen_fast.models.hub import checkpoint_path
from frozen_fast.models.model_folder import read_model_folder, write_model_folder
from frozen_fast.models.pretrained import load_weights
from frozen_fast.models.retrieval_model import Features, TextInput, VideoInput
from frozen_fast.models.video.video_tower import IMAGENET_MEAN, IMAGENET_STD, VideoTower
from frozen_fast.models.video_side import VideoSide, stored_tower

HEAD_STD = 0.02
"""Standard deviation of the truncated normal distribution of the head's initial weights."""


@dataclass(frozen=True)
class ClassNames:
    """Converts class names to one-hot rows, in place of a tokenizer; picklable.

    Attributes:
        names: every class, in the order of the logits.
    """

    names: tuple[str, ...]

    def __call__(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Encode B class names: {"class": one-hot fp32 [B, C]}.

        Raises:
            UserError: a name is not a class.
        """
        for name in names:
            if name not in self.names:
                raise unknown_name("class", name, self.names)
        rows_B = torch.tensor([self.names.index(name) for name in names])
        return {"class": F.one_hot(rows_B, len(self.names)).float()}


class Classifier(VideoSide):
    """A video classifier: clips -> a logit for each class.

    Attributes:
        classes: class names in the order of the logits.
        head: the linear layer on the tower's output.
        dropout: dropout of the tower's output in training.
    """

    kind = "classifier"
    task = "classification"

    def __init__(
        self,
        video_model: VideoTower,
        classes: Sequence[str],
        *,
        dropout: float = 0.0,
        learned_frames: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        """Initialise with a tower and a random head.

        Args:
            video_model: the video tower.
            classes: two or more different names.
            dropout: dropout probability of the tower's output.
            learned_frames: None: the tower's max_frames.
            mean: mean of the training data's pixels, RGB in [0, 1].
            std: their standard deviation.

        Raises:
            UserError: fewer than two classes, or a class twice.
        """
        super().__init__(video_model, learned_frames=learned_frames, mean=mean, std=std)
        if len(classes) < 2 or len(set(classes)) < len(classes):
            allowed = "two or more different names"
            raise UserError(f"classes: got {len(classes)}, {len(set(classes))} of them different; allowed: {allowed}")
        self.classes = tuple(classes)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(video_model.width, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    @property
    def tokenizer(self) -> ClassNames:
        """Converts class names to the input of text_features."""
        return ClassNames(self.classes)

    def text_features(self, text: TextInput) -> Features:
        """Return {"class": [Q, C]}, one-hot rows of class names, or of the tokenizer's output."""
        rows = text if isinstance(text, Mapping) else self.tokenizer(text)
        return {"class": rows["class"].to(self.device)}

    def video_features(self, video: VideoInput) -> Features:
        """Return {"logits": [V, C]}; follows train() and eval(), differentiable."""
        if not isinstance(video, Tensor):
            raise ValueError(f"video: got {type(video).__name__}; allowed: a tensor [B, T, 3, H, W]")
        return {"logits": self.head(self.dropout(self.tower_output(video)))}

    def pair_similarities(self, text: Features, video: Features) -> Tensor:
        """Return the logits of some classes for some clips, [1, Q, V]."""
        return (text["class"].float() @ video["logits"].float().T)[None]

    def merge_windows(self, windows: Sequence[Features]) -> Features:
        """Merge the logits of a clip's views: the logarithm of the mean of their probabilities."""
        logits_WC = torch.cat([window["logits"] for window in windows]).float()
        mean_C = logits_WC.log_softmax(dim=-1).logsumexp(dim=0) - torch.tensor(float(len(logits_WC))).log()
        return {"logits": mean_C[None]}

    @torch.no_grad()
    def probabilities(self, video_BTCHW: Tensor) -> Tensor:
        """Return the probability of each class, [B, C] fp32; call eval() first.

        Args:
            video_BTCHW: see VideoSide.tower_output.
        """
        return self.video_features(video_BTCHW)["logits"].float().softmax(dim=-1)

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks of the tower, the units of sharding."""
        return self.video_model.repeated_blocks()

    def architecture(self) -> dict[str, Any]:
        """Return the content of config.json: what from_pretrained needs in addition to the weights."""
        video = self.video_model
        return {
            "video": {"tower": video.name, **video.architecture(), "max_frames": video.max_frames},
            "classes": list(self.classes),
            "dropout": self.dropout.p,
            "learned_frames": self.learned_frames,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write model.safetensors and config.json.

        Args:
            folder: created if missing.
            state: weights by name to write instead of the model's own (gathered from shards).
        """
        weights = self.state_dict() if state is None else state
        write_model_folder(Path(folder), self.kind, weights, self.architecture(), None)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        num_frames: int | None = None,
        expansion: str = "zero",
        *,
        max_frames: int | None = None,
        keep_rows: bool = False,
        config: ModelConfig | None = None,
    ) -> Classifier:
        """Load a checkpoint of save_pretrained or training; the model is in eval mode.

        Args:
            path: checkpoint folder, run folder, or ORG/NAME of the Hugging Face Hub (hub.checkpoint_path).
            num_frames: number of frames; None: as many as the checkpoint learned.
            expansion: "zero", "nearest" or "bilinear", for more frames than the checkpoint learned.
            max_frames: rows of the frame embeddings to allocate; None: num_frames.
            keep_rows: allocate at least as many rows of the frame embeddings as the checkpoint has, learned or not, so
                that the optimizer's state fits.
            config: keys that select how the tower computes; None: defaults.

        Raises:
            UserError: for a missing, damaged or unsupported checkpoint.
        """
        path = checkpoint_path(path)
        needs = ("video", "classes", "learned_frames", "mean", "std")
        state, told = read_model_folder(path, [cls.kind], needs=needs)
        try:
            tower = video_towers.load(told["video"]["tower"])
            max_frames = max(max_frames or 1, told["video"]["max_frames"]) if keep_rows else max_frames
            section = (config or ModelConfig()).video
            video, learned = stored_tower(tower, told, num_frames, max_frames, section)
            options = {key: told[key] for key in ("dropout", "mean", "std") if key in told}
            model = cls(video, told["classes"], learned_frames=learned, **options)
        except (KeyError, TypeError) as error:
            raise UserError(f"checkpoint: got {path}, whose architecture is incomplete ({error})") from error
        model.fit_frame_rows(state, told["learned_frames"], num_frames, expansion, path)
        load_weights(model, state, path)
        return model.eval()

    @classmethod
    def from_config(cls, config: ModelConfig) -> Classifier:
        """Load the classifier of model.checkpoint for evaluation; build_classifier builds one for training.

        Raises:
            UserError: model.checkpoint is not set.
        """
        if config.checkpoint is None:
            raise UserError("model.checkpoint: got none; allowed: a checkpoint folder of a classifier")
        return cls.from_pretrained(config.checkpoint, config=config)
