"""The equations of Collaborative Experts and its ablations as plain loops, with the released parameter names.

Written from the equations, one expert and one pair at a time, to compare with and to write checkpoints of the released
form. Nothing is shared with frozen_fast.models.experts.
"""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

VLAD_WIDTHS = {"audio": 128, "ocr": 300, "speech": 300}
AVERAGED_WIDTHS = {
    "face": 512,
    "flow": 1024,
    "antoine-rgb": 2048,
    "i3d.i3d.0": 1024,
    "imagenet.resnext101_32x48d.0": 2048,
    "imagenet.senet154.0": 2048,
    "r2p1d.r2p1d-ig65m-kinetics.0": 512,
    "r2p1d.r2p1d-ig65m.0": 512,
    "scene.densenet161.0": 2208,
}


def unit(x: Tensor, dim: int = -1) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True).clamp_min(1e-12)


class PlainVLAD(nn.Module):
    """One set at a time."""

    def __init__(self, width: int, clusters: int, ghosts: int = 0) -> None:
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(width, clusters + ghosts) / width**0.5)
        self.clusters2 = nn.Parameter(torch.randn(1, width, clusters) / width**0.5)
        self.batch_norm = nn.BatchNorm1d(clusters + ghosts)

    def forward(self, sets: Tensor) -> Tensor:
        num_sets, size, width = sets.shape
        scores = self.batch_norm(sets.reshape(num_sets * size, width) @ self.clusters)
        kept = self.clusters2.shape[2]
        shares = torch.softmax(scores, dim=1)[:, :kept].reshape(num_sets, size, kept)
        out = []
        for one, share in zip(sets, shares, strict=True):
            columns = [sum(share[n, k] * (one[n] - self.clusters2[0, :, k]) for n in range(size)) for k in range(kept)]
            out.append(unit(torch.stack([unit(column) for column in columns], dim=1).reshape(-1)))
        return torch.stack(out)


class Gate(nn.Module):
    """Context gating of one expert."""

    def __init__(self, width: int, norms: int = 1) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.batch_norm = nn.BatchNorm1d(width)
        if norms == 2:
            self.batch_norm2 = nn.BatchNorm1d(width)


class Unit(nn.Module):
    """An expert's unit: a linear layer where it changes the width, then a gate."""

    def __init__(self, inputs: int | None, width: int, norms: int = 1) -> None:
        super().__init__()
        if inputs is not None:
            self.fc = nn.Linear(inputs, width)
        self.cg = Gate(width, norms)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x) if hasattr(self, "fc") else x
        return unit(h * torch.sigmoid(self.cg.batch_norm(self.cg.fc(h))))


class Reducer(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, width)


class Mish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(torch.log1p(torch.exp(x)))


class Inner(nn.Module):
    """What the released state dicts hold under `ce.`."""


class PlainExpertModel(nn.Module):
    """CE ("ce"), CE - CG ("no_gating"), MoEE ("moee") or Concat ("concat").

    Args:
        experts: name -> (width, clusters); clusters 0: one vector per video. In the model's order.
    """

    def __init__(
        self,
        design: str,
        experts: dict[str, tuple[int, int]],
        *,
        text: tuple[int, int, int],
        width: int = 16,
        uniform: bool = False,
    ) -> None:
        super().__init__()
        self.design, self.experts, self.uniform = design, experts, uniform
        self.pooling = nn.ModuleDict({e: PlainVLAD(d, k) for e, (d, k) in experts.items() if k})
        self.text_pooling = PlainVLAD(*text)
        text_width = text[0] * text[1]
        self.ce = ce = Inner()
        ce.moe_fc = nn.Linear(text_width, len(experts))
        if design == "concat":
            return
        inputs = [d * (k or 1) for d, k in experts.values()]
        if design == "moee":
            widths = [d for d, _ in experts.values()]
            ce.video_GU = nn.ModuleList(Unit(i, d) for i, d in zip(inputs, widths, strict=True))
        else:
            widths = [width] * len(experts)
            ce.video_dim_reduce = nn.ModuleList(Reducer(i, width) for i in inputs)
            ce.video_GU = nn.ModuleList(Unit(None, width, 2 if design == "ce" else 1) for _ in inputs)
        if design == "ce":
            ce.g_reason_1 = nn.Linear(2 * width, width)
            layers = [nn.BatchNorm1d(width), Mish(), nn.Linear(width, width)] * 1
            layers += [nn.BatchNorm1d(width), Mish(), nn.Linear(width, width)]
            ce.g_reason_shared = nn.Sequential(*layers)
        ce.text_GU = nn.ModuleList(Unit(text_width, d) for d in widths)

    def randomise(self, seed: int) -> PlainExpertModel:
        """Draw batch norms' weights and statistics too, so that a test sees each of them."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in [*self.named_parameters(), *self.named_buffers()]:
                if "running_var" in name:
                    value.copy_(0.5 + torch.rand(value.shape, generator=generator))
                elif "batch_norm" in name and name.endswith("weight") or "g_reason_shared.0.w" in name:
                    value.copy_(0.7 + 0.6 * torch.rand(value.shape, generator=generator))
                elif value.is_floating_point() and ("batch_norm" in name or "running_mean" in name):
                    value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        return self

    def forward(self, tokens: Tensor, video: dict[str, Tensor], *, parallel: bool = False) -> Tensor:
        """sim [Q, V]."""
        names = list(self.experts)
        available, x = {}, {}
        for name in names:
            value = video[name].clone()
            here = torch.tensor([not bool(torch.isnan(row).any()) for row in value])
            value[~here] = 0.0
            available[name] = here.float()
            x[name] = self.pooling[name](value) if name in self.pooling else value
        text = self.text_pooling(tokens)
        if self.design == "concat":
            joined = torch.cat([x[name] for name in names], dim=1)
            size = max(text.shape[1], joined.shape[1])
            padded = [torch.cat([side, torch.zeros(len(side), size - side.shape[1])], 1) for side in (text, joined)]
            return padded[0] @ padded[1].T
        if self.design == "moee":
            x = {name: unit_(x[name]) for name, unit_ in zip(names, self.ce.video_GU, strict=True)}
        else:
            x = {name: unit(r.fc(x[name])) for name, r in zip(names, self.ce.video_dim_reduce, strict=True)}
            if self.design == "ce":
                x = self._collaborate(x, available, parallel)
            else:
                x = {name: unit_(x[name]) for name, unit_ in zip(names, self.ce.video_GU, strict=True)}
        phi = {name: unit_(text) for name, unit_ in zip(names, self.ce.text_GU, strict=True)}
        weights = torch.softmax(self.ce.moe_fc(text), dim=1)
        if self.uniform:
            weights = torch.full_like(weights, 1 / len(names))
        sims = torch.zeros(len(text), len(x[names[0]]))
        for i in range(len(text)):
            for j in range(sims.shape[1]):
                shares = [weights[i, m] * available[name][j] for m, name in enumerate(names)]
                values = [share * (phi[name][i] @ x[name][j]) for share, name in zip(shares, names, strict=True)]
                sims[i, j] = sum(values) / sum(shares)
        return sims

    def _collaborate(self, x: dict[str, Tensor], available: dict[str, Tensor], parallel: bool) -> dict[str, Tensor]:
        gated = dict(x)
        for name, unit_ in zip(x, self.ce.video_GU, strict=True):
            seen = x if parallel else gated
            total, count = 0.0, 0.0
            for other in x:
                pair = torch.cat([seen[name], seen[other]], dim=1)
                both = (available[name] * available[other])[:, None]
                total = total + both * self.ce.g_reason_shared(self.ce.g_reason_1(pair))
                count = count + both
            reason = total / (count + 1e-11)
            gate = unit_.cg.batch_norm(reason) + unit_.cg.batch_norm2(unit_.cg.fc(x[name]))
            gated[name] = unit(x[name] * torch.sigmoid(gate))
        return gated


def random_videos(experts: dict[str, tuple[int, int]], videos: int, seed: int, missing: float = 0.25) -> dict:
    """Features of some videos: zero-padded sets, NaN for missing experts, at least one expert each."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, (name, (width, clusters)) in enumerate(experts.items()):
        if clusters:
            x = torch.zeros(videos, 5, width)
            for j in range(videos):
                length = int(torch.randint(1, 6, (), generator=generator))
                x[j, :length] = torch.randn(length, width, generator=generator)
        else:
            x = torch.randn(videos, width, generator=generator)
        if index:
            x[torch.rand(videos, generator=generator) < missing] = float("nan")
        found[name] = x
    return found


def random_tokens(captions: int, width: int, seed: int, longest: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(captions, longest, width)
    for i in range(captions):
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        tokens[i, :length] = torch.randn(length, width, generator=generator)
    return tokens


def write_upstream_checkpoint(
    path: Path, model: PlainExpertModel, *, zip_layout: bool = False, config: bool = True, extra: dict | None = None
) -> Path:
    """A trained_model.pth as the released code writes it: deprecated keys, a pickled ConfigParser, numpy scalars."""
    state = OrderedDict(model.state_dict())
    for name in ("moe_fc_bottleneck1", "moe_cg", "moe_fc_proj"):
        state[f"ce.{name}.weight"] = torch.zeros(2, 2)
    state.update(extra or {})
    module = types.ModuleType("parse_config")
    config_parser = type("ConfigParser", (), {"__module__": "parse_config"})
    module.ConfigParser = config_parser
    sys.modules["parse_config"] = module
    try:
        parser = config_parser()
        modalities = list(reversed(model.experts))
        plain = {
            "arch": {"type": "CENet", "args": {"freeze_weights": model.uniform}},
            "experts": {"modalities": modalities, "drop_feats": ""},
        }
        parser.__dict__.update(_config=OrderedDict(plain) if config else {}, resume=None, _save_dir=Path("saved"))
        content = {
            "arch": "CENet",
            "epoch": 7,
            "state_dict": state,
            "monitor_best": np.float64(29.5),
            "config": parser,
            "optimizer": {"state": {}, "param_groups": [{"lr": np.float32(0.1)}]},
        }
        torch.save(content, path, _use_new_zipfile_serialization=zip_layout, pickle_protocol=pickle.DEFAULT_PROTOCOL)
    finally:
        del sys.modules["parse_config"]
    return path
