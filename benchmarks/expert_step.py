"""Training steps of Collaborative Experts on MSR-VTT's shapes, beside a plain form of the same model.

    python benchmarks/expert_step.py [--steps 5] [--threads N] [--output benchmarks/results/expert_step.json]

Both forms have the same weights, read the same batch of synthetic features and take the same step (forward, max margin
loss, backward; no optimizer). The plain form is written expert by expert and pair by pair: a module for each expert's
unit, and the reasoning layers once for each of the M x M pairs. Seconds an epoch are the median step times 6,513 / 64
steps. Features come from memory in both, so the figures are those of computing alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.config import load_config
from frozen_fast.losses import build_loss
from frozen_fast.losses.gathered import batch_loss
from frozen_fast.models.experts.expert_model import CollaborativeExperts
from frozen_fast.records.environment import device_description

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "experts" / "msrvtt_full_ce.yaml"
TRAINING_VIDEOS = 6513


class PlainCollaborativeExperts(nn.Module):
    """The equations with a loop over experts and a loop over pairs, in PyTorch's own modules."""

    def __init__(self, model: CollaborativeExperts) -> None:
        """Take the weights of the batched form."""
        super().__init__()
        self.pooling, self.text_pooling, self.mixture = model.pooling, model.text_pooling, model.mixture
        self.names, width = model.sizes.names, model.width
        self.reducers = model.video_linear
        gate = model.video_gate
        count = len(self.names)
        self.first = gate.pair_linear
        shared: list[nn.Module] = []
        for norm, linear in zip(gate.pair_norms, gate.shared_linear, strict=True):
            shared += [_norm(norm, 0, width), nn.Mish(), linear]
        self.shared = nn.Sequential(*shared)
        self.pair_norms = nn.ModuleList(_norm(gate.pair_gate_norm, i * width, width) for i in range(count))
        self.own_norms = nn.ModuleList(_norm(gate.own_gate_norm, i * width, width) for i in range(count))
        self.own = nn.ModuleList(_linear(gate.linear.weight[i], gate.linear.bias, i, width) for i in range(count))
        text = model.text_linear.weight.split(width)
        self.text = nn.ModuleList(_linear(text[i], model.text_linear.bias, i, width) for i in range(count))
        blocks = model.text_gate.linear
        self.text_own = nn.ModuleList(_linear(blocks.weight[i], blocks.bias, i, width) for i in range(count))
        self.text_norms = nn.ModuleList(_norm(model.text_gate.norm, i * width, width) for i in range(count))

    def forward(self, tokens: Tensor, video: dict[str, Tensor]) -> Tensor:
        """sim_QV."""
        available, x = {}, {}
        for name, reducer in zip(self.names, self.reducers, strict=True):
            value = video[name]
            available[name] = (~value.flatten(1).isnan().any(1)).float()
            value = torch.nan_to_num(value)
            pooled = self.pooling[name](value) if name in self.pooling else value
            x[name] = F.normalize(reducer(pooled))
        for index, name in enumerate(self.names):
            total, number = 0.0, 0.0
            for other in self.names:
                both = (available[name] * available[other])[:, None]
                total = total + both * self.shared(self.first(torch.cat([x[name], x[other]], dim=1)))
                number = number + both
            gate = self.pair_norms[index](total / (number + 1e-11)) + self.own_norms[index](self.own[index](x[name]))
            x[name] = F.normalize(x[name] * gate.sigmoid())
        text = self.text_pooling(tokens)
        weights = self.mixture(text).softmax(1)
        total, share = 0.0, 0.0
        for index, name in enumerate(self.names):
            h = self.text[index](text)
            phi = F.normalize(h * self.text_norms[index](self.text_own[index](h)).sigmoid())
            weight = weights[:, index : index + 1] * available[name][None]
            total, share = total + weight * (phi @ x[name].T), share + weight
        return total / share


def _norm(source: Any, start: int, width: int) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(width)
    with torch.no_grad():
        for part in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, part).copy_(getattr(source, part)[start : start + width])
    return norm


def _linear(weight: Tensor, bias: Tensor, index: int, width: int) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], width)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias[index * width : (index + 1) * width])
    return linear


def batch_of(config: Any, size: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Synthetic features of the config's shapes; a tenth of the videos lack an expert."""
    section = config.model.experts
    video = {}
    for index, expert in enumerate(section.experts):
        shape = (size, expert.max_vectors, expert.width) if expert.clusters else (size, expert.width)
        video[expert.name] = torch.randn(shape, device=device)
        if index:
            video[expert.name][torch.rand(size, device=device) < 0.1] = torch.nan
    return torch.randn(size, section.max_text_tokens, section.text_width, device=device), video


def timed(step: Callable[[], Tensor], steps: int, device: torch.device) -> list[float]:
    """Seconds of each step, after one that is not counted."""
    seconds = []
    for index in range(steps + 1):
        started = time.perf_counter()
        step().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index:
            seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Time both forms and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    config = load_config(CONFIG)
    size = config.curriculum.stages[0].global_batch_size
    torch.manual_seed(0)
    batched = CollaborativeExperts.from_config(config.model)
    assert isinstance(batched, CollaborativeExperts)
    plain = PlainCollaborativeExperts(batched).to(device).train()
    batched = batched.to(device).train()
    tokens, video = batch_of(config, size, device)
    loss = build_loss(config.loss)
    with torch.no_grad():
        difference = (plain.eval()(tokens, video) - batched.eval().similarity({"tokens": tokens}, video)).abs().max()
    plain.train(), batched.train()
    forms: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: batch_loss(loss, plain(tokens, video)[None], {}),
        "batched": lambda: batch_loss(loss, batched.similarity({"tokens": tokens}, video)[None], {}),
    }
    result: dict[str, Any] = {
        "device": device_description(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": size,
        "steps": options.steps,
        "largest_difference": float(difference),
    }
    for name, step in forms.items():
        seconds = sorted(timed(step, options.steps, device))
        median = statistics.median(seconds)
        result[name] = {
            "median_seconds": median,
            "p20_seconds": seconds[len(seconds) // 5],
            "p80_seconds": seconds[-1 - len(seconds) // 5],
            "epoch_seconds": median * TRAINING_VIDEOS / size,
        }
    result["ratio"] = result["plain"]["median_seconds"] / result["batched"]["median_seconds"]
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
