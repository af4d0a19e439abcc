"""The released model of Frozen in Time written again for tests: plain, slow, and built on another idea than ours.

Divided attention here is ordinary attention over all S tokens under a mask that says which token a query may see.
That shares no code and no regrouping with frozen_kernels, so an error in one shows against the other. Parameter
names are the released ones.
"""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

HEAD_WIDTH = 64


def divided_mask(frames: int, patches: int, axis: str) -> Tensor:
    """[S, S], True where the row's query may see the column's key."""
    frame = torch.arange(frames).repeat_interleave(patches)
    place = torch.arange(patches).repeat(frames)
    group = place if axis == "time" else frame
    mask = torch.ones(1 + frames * patches, 1 + frames * patches, dtype=torch.bool)
    mask[1:, 1:] = group[:, None] == group[None, :]
    return mask


class MaskedAttention(nn.Module):
    """qkv, attention under a mask, projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = (
            part.reshape(batch, tokens, self.heads, HEAD_WIDTH).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = (query @ key.transpose(-1, -2)) / HEAD_WIDTH**0.5
        probabilities = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return self.proj((probabilities @ value).transpose(1, 2).reshape(batch, tokens, width))


class PlainBlock(nn.Module):
    """One space-time block, whose space residual adds to the block's input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.attn = MaskedAttention(width)
        self.timeattn = MaskedAttention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, time_mask: Tensor, space_mask: Tensor, timesformer: bool) -> Tensor:
        after_time = x + self.timeattn(self.norm3(x), time_mask)
        after_space = (after_time if timesformer else x) + self.attn(self.norm1(after_time), space_mask)
        hidden = self.mlp["fc1"](self.norm2(after_space))
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        return after_space + self.mlp["fc2"](gelu)


class PlainVideoTower(nn.Module):
    """Frames -> CLS after the last norm; temporal_embed has max_frames rows, of which a clip uses the first."""

    def __init__(self, width: int, depth: int, patch: int, side: int, max_frames: int, timesformer: bool) -> None:
        super().__init__()
        self.timesformer = timesformer
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.temporal_embed = nn.Parameter(torch.zeros(1, max_frames, width))
        self.blocks = nn.ModuleList(PlainBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, video: Tensor) -> Tensor:
        batch, frames = video.shape[:2]
        patches = self.pos_embed.shape[1] - 1
        rows = [self.cls_token.expand(batch, 1, -1) + self.pos_embed[:, :1]]
        for index in range(frames):
            tokens = self.patch_embed["proj"](video[:, index]).flatten(2).transpose(1, 2)
            rows.append(tokens + self.pos_embed[:, 1:] + self.temporal_embed[:, index : index + 1])
        x = torch.cat(rows, dim=1)
        time_mask, space_mask = (divided_mask(frames, patches, axis).to(x.device) for axis in ("time", "space"))
        for block in self.blocks:
            x = block(x, time_mask, space_mask, self.timesformer)
        return self.norm(x)[:, 0]


class ReleasedModel(nn.Module):
    """The released dual encoder: returns raw embeddings (video, text)."""

    def __init__(
        self,
        *,
        width: int = 128,
        depth: int = 2,
        patch: int = 16,
        side: int = 2,
        max_frames: int = 4,
        text: str = "distilbert",
        timesformer: bool = False,
        vocabulary: int = 140,
        text_width: int = 128,
        embedding_width: int = 256,
        dropout: float = 0.0,
    ) -> None:
        """Draw random weights (a few times larger than at a training's start, so that every part matters).

        Args:
            width: of the video tower, a multiple of 64.
            depth: of the video tower.
            patch: pixels.
            side: patches along a frame's edge.
            max_frames: rows of temporal_embed.
            text: "distilbert" or "bert".
            timesformer: the other block form.
            vocabulary: of the text tower.
            text_width: a multiple of 64.
            embedding_width: of the common space.
            dropout: of the text tower.
        """
        super().__init__()
        self.kind = text
        self.resolution = patch * side
        heads = text_width // HEAD_WIDTH
        if text == "distilbert":
            self.text_model: nn.Module = DistilBertModel(
                DistilBertConfig(
                    vocab_size=vocabulary,
                    dim=text_width,
                    hidden_dim=2 * text_width,
                    n_layers=2,
                    n_heads=heads,
                    max_position_embeddings=64,
                    dropout=dropout,
                    attention_dropout=dropout,
                    attn_implementation="eager",
                )
            )
        else:
            self.text_model = BertModel(
                BertConfig(
                    vocab_size=vocabulary,
                    hidden_size=text_width,
                    intermediate_size=2 * text_width,
                    num_hidden_layers=2,
                    num_attention_heads=heads,
                    max_position_embeddings=64,
                    hidden_dropout_prob=dropout,
                    attention_probs_dropout_prob=dropout,
                    attn_implementation="eager",
                )
            )
        self.video_model = PlainVideoTower(width, depth, patch, side, max_frames, timesformer)
        self.txt_proj = nn.Sequential(nn.ReLU(), nn.Linear(text_width, embedding_width))
        self.vid_proj = nn.Sequential(nn.Linear(width, embedding_width))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name.lower() and name.endswith("weight"):
                    parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.06 * torch.randn_like(parameter))

    def forward(self, video: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = self.text_model(**text)
        pooled = output.pooler_output if self.kind == "bert" else output.last_hidden_state[:, 0]
        text_embedding = self.txt_proj(pooled)
        return self.vid_proj(self.video_model(video)), text_embedding


def released_temporal_embedding(embed_1TD: Tensor, num_frames: int, method: str) -> Tensor:
    """What the released code's loading does with temporal embeddings for another number of frames.

    It treats [1, 1, T, D] as a picture of T rows and resizes it to num_frames rows with torch's interpolate, whose
    align_corners it leaves at the default (off).
    """
    learned = embed_1TD.shape[1]
    if num_frames <= learned:
        return embed_1TD[:, :num_frames]
    if method == "zero":
        return torch.cat([embed_1TD, torch.zeros(1, num_frames - learned, embed_1TD.shape[2])], dim=1)
    picture = embed_1TD[None]
    return torch.nn.functional.interpolate(picture, (num_frames, embed_1TD.shape[2]), mode=method)[0]


@contextmanager
def config_parser_class() -> Iterator[type]:
    """A class parse_config.ConfigParser that exists only inside the block, as it does in the released code's tree."""
    module = types.ModuleType("parse_config")
    config_parser = type("ConfigParser", (), {"__module__": "parse_config"})
    module.ConfigParser = config_parser  # type: ignore[attr-defined]
    sys.modules["parse_config"] = module
    try:
        yield config_parser
    finally:
        del sys.modules["parse_config"]


def write_released_checkpoint(
    path: Path, model: nn.Module, *, prefix: str = "module.", zip_layout: bool = True, drop: tuple[str, ...] = ()
) -> Path:
    """Write a checkpoint of the released form: weights, an optimizer's state, and an unknown class's config object.

    Args:
        path: the .pth or .pth.tar file.
        model: its state dict is stored.
        prefix: of every name, as data-parallel training leaves it.
        zip_layout: torch's layout since 1.6, or the one before.
        drop: names to leave out.
    """
    state = OrderedDict((prefix + name, value) for name, value in model.state_dict().items() if name not in drop)
    weight = next(iter(state.values()))
    optimizer = {
        "state": {0: {"step": 7, "exp_avg": torch.zeros_like(weight)}},
        "param_groups": [{"lr": 3e-5, "betas": (0.9, 0.999), "params": [0]}],
    }
    with config_parser_class() as config_parser:
        config = config_parser()
        config.__dict__.update(
            _config={"arch": {"type": "FrozenInTime", "args": {"video_params": {"num_frames": 4}}}},
            resume=Path("exps/models/latest.pth"),
            _save_dir=Path("exps/models"),
            _log_dir=Path("exps/logs"),
        )
        content = {
            "arch": "FrozenInTime",
            "epoch": 3,
            "state_dict": state,
            "optimizer": optimizer,
            "monitor_best": 1.25,
            "config": config,
        }
        torch.save(content, path, _use_new_zipfile_serialization=zip_layout)
    return path
