"""Training of Collaborative Experts on MSR-VTT's shapes, beside a plain form of the same model, data and optimizer.

    python benchmarks/expert_step.py [--rounds 4] [--threads N] [--output benchmarks/results/expert_step.json]

Both forms begin with the same weights and train on the same synthetic features (the experts, widths, lengths and batch
size of configs/experts/msrvtt_full_ce.yaml). A step is whole: batch, forward, max margin loss, backward, Ranger.

- plain: features in dicts, copied video by video; a module for each expert's unit; the reasoning layers once for each
  of the M x M pairs, on the two vectors side by side; similarities summed expert by expert; Ranger parameter by
  parameter.
- frozen_fast: the loader, the step and the optimizer of `frozen-fast train`: a memory-mapped store read in a thread.

The two forms alternate in rounds of six steps, one of which moves the slow weights. Seconds an epoch are the mean step
times 6,513 / 64 steps; evaluation and checkpoints are left out of both.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import ROOT, write_result
from frozen_fast.config import ExperimentConfig, load_config
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data import Batch
from frozen_fast.data.features.feature_store import FeatureStore, write_expert, write_store, write_text
from frozen_fast.data.plan.samplers import DataPosition, plan_steps
from frozen_fast.data.sources import read_source
from frozen_fast.models.experts.expert_model import CollaborativeExperts
from frozen_fast.optimizers import build_optimizer
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.start import start_parallel
from frozen_fast.training.parts import build_training_loader
from frozen_fast.training.retrieval_task import RetrievalTask
from frozen_fast.training.step import forward_backward, update

CONFIG = ROOT / "configs" / "experts" / "msrvtt_full_ce.yaml"
TRAINING_VIDEOS = 6513
CAPTIONS = 2
ROUND = 6
"""Steps of a round: Ranger's slow weights move at every sixth."""


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


class PlainRanger:
    """RAdam with decoupled decay and Lookahead, one parameter after the other."""

    def __init__(self, parameters: Iterator[nn.Parameter], config: ExperimentConfig) -> None:
        """Begin at step 0."""
        self.parameters = list(parameters)
        self.rate, self.betas = config.optimizer.learning_rate, config.optimizer.betas
        self.eps, self.decay = config.optimizer.eps, config.optimizer.weight_decay
        self.state: dict[nn.Parameter, dict[str, Any]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update and clear the gradients."""
        first, second = self.betas
        longest = 2 / (1 - second) - 1
        for p in self.parameters:
            if p.grad is None:
                continue
            state = self.state.setdefault(p, {"step": 0})
            if not state["step"]:
                state.update(mean=torch.zeros_like(p), square=torch.zeros_like(p), slow=p.clone())
            state["step"] += 1
            step, mean, square = state["step"], state["mean"], state["square"]
            square.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
            mean.mul_(first).add_(p.grad, alpha=1 - first)
            length = longest - 2 * step * second**step / (1 - second**step)
            p.add_(p, alpha=-self.decay * self.rate)
            if length > 5:
                ratio = (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
                size = (ratio * (1 - second**step)) ** 0.5 / (1 - first**step)
                p.addcdiv_(mean, square.sqrt().add_(self.eps), value=-size * self.rate)
            else:
                p.add_(mean, alpha=-self.rate / (1 - first**step))
            if step % ROUND == 0:
                state["slow"].add_(p - state["slow"], alpha=0.5)
                p.copy_(state["slow"])
            p.grad = None


class PlainReader:
    """Features in dicts in memory, and batches that are filled video by video."""

    def __init__(self, store: FeatureStore, config: ExperimentConfig) -> None:
        """Read everything."""
        self.section = config.model.experts
        self.videos = list(store.captions)
        self.experts: dict[str, dict[str, np.ndarray | float]] = {}
        for expert in self.section.experts:
            arrays = {name: np.array(value) for name, value in store.expert(expert.name).items()}
            ends = arrays["ends"]
            self.experts[expert.name] = {
                video: arrays["vectors"][ends[row] : ends[row + 1]] if arrays["available"][row] else float("nan")
                for row, video in enumerate(self.videos)
            }
        self.text = {
            video: list(map(np.array, store.caption_tokens(self.section.text, video))) for video in self.videos
        }

    def batch(self, chosen: list[int], rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Caption tokens and expert features of some videos."""
        videos = [self.videos[index] for index in chosen]
        found = {}
        for expert in self.section.experts:
            shape = (expert.max_vectors, expert.width) if expert.clusters else (expert.width,)
            rows = np.zeros((len(videos), *shape), dtype=np.float32)
            for place, video in enumerate(videos):
                value = self.experts[expert.name][video]
                if isinstance(value, float):
                    rows[place] = np.nan
                elif expert.clusters:
                    rows[place, : len(value)] = value[: expert.max_vectors]
                else:
                    rows[place] = value[0]
            found[expert.name] = torch.from_numpy(rows)
        tokens = np.zeros((len(videos), self.section.max_text_tokens, self.section.text_width), dtype=np.float32)
        for place, video in enumerate(videos):
            own = self.text[video][int(rng.integers(CAPTIONS))][: self.section.max_text_tokens]
            tokens[place, : len(own)] = own
        return torch.from_numpy(tokens), found


def max_margin(sim: Tensor, margin: float) -> Tensor:
    """The loss of the equations, both directions."""
    own = sim.diagonal()[:, None]
    others = ~torch.eye(len(sim), dtype=torch.bool, device=sim.device)
    rows, columns = F.relu(margin - own + sim), F.relu(margin - own + sim.T)
    return (rows[others].mean() + columns[others].mean()) / 2


def write_synthetic_store(folder: Path, config: ExperimentConfig, videos: int) -> None:
    """Random features of the config's shapes; a tenth of the videos lack an expert."""
    rng = np.random.default_rng(0)
    section = config.model.experts
    experts = []
    for place, expert in enumerate(section.experts):
        most = max(1, expert.max_vectors)
        drawn = [int(number) for number in rng.integers(1, most + 1, videos)]
        lengths = [None if place and rng.random() < 0.1 else number for number in drawn]
        blocks = [rng.standard_normal((one, expert.width), dtype=np.float32) for one in lengths if one is not None]
        kind: Any = "set" if expert.clusters else "vector"
        experts.append(write_expert(folder, expert.name, kind, expert.width, lengths, lambda b=blocks: iter(b)))
    words = [[int(rng.integers(6, section.max_text_tokens + 1)) for _ in range(CAPTIONS)] for _ in range(videos)]
    tokens = [rng.standard_normal((one, section.text_width), dtype=np.float32) for own in words for one in own]
    texts = [write_text(folder, section.text, section.text_width, words, lambda: iter(tokens))]
    write_store(folder, {f"video{n}": ["a caption"] * CAPTIONS for n in range(videos)}, experts, texts, [])


Step = Callable[[], dict[str, float]]
"""Takes one optimizer step; seconds of its parts."""


def plain_step(model: nn.Module, reader: PlainReader, config: ExperimentConfig, device: torch.device) -> Step:
    """The plain form."""
    optimizer, rng = PlainRanger(model.parameters(), config), np.random.default_rng(1)
    size = config.curriculum.stages[0].global_batch_size

    def step() -> dict[str, float]:
        times = [time.perf_counter()]
        tokens, video = reader.batch(rng.permutation(len(reader.videos))[:size].tolist(), rng)
        tokens, video = tokens.to(device), {name: x.to(device) for name, x in video.items()}
        times.append(now(device))
        max_margin(model(tokens, video), config.loss.margin).backward()
        times.append(now(device))
        optimizer.step()
        times.append(now(device))
        return parts_of(times)

    return step


def own_step(parallel: Parallel, batches: Iterator[Batch], config: ExperimentConfig) -> Step:
    """The form of frozen-fast train."""
    task = RetrievalTask.from_config(config)

    def step() -> dict[str, float]:
        times = [time.perf_counter()]
        batch = next(batches)
        times.append(now(parallel.device))
        forward_backward(parallel, batch.video, batch.text, task)
        times.append(now(parallel.device))
        update(parallel, config.optimizer.gradient_clip_norm)
        times.append(now(parallel.device))
        return parts_of(times)

    return step


def now(device: torch.device) -> float:
    """The time when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def parts_of(times: list[float]) -> dict[str, float]:
    """Seconds of a step and of its parts."""
    data, compute, optimizer = (last - first for first, last in zip(times, times[1:], strict=False))
    return {"data": data, "compute": compute, "optimizer": optimizer, "step": times[-1] - times[0]}


def summary(steps: list[dict[str, float]], batch_size: int) -> dict[str, Any]:
    """Median, p20 and p80 of each part, and seconds an epoch."""
    found: dict[str, Any] = {}
    for part in steps[0]:
        seconds = sorted(one[part] for one in steps)
        found[f"{part}_seconds"] = {
            "median": statistics.median(seconds),
            "p20": seconds[len(seconds) // 5],
            "p80": seconds[-1 - len(seconds) // 5],
        }
    mean = statistics.fmean(one["step"] for one in steps)
    return {**found, "mean_step_seconds": mean, "epoch_seconds": mean * TRAINING_VIDEOS / batch_size}


def main() -> None:
    """Time both forms and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="of six steps, after one that is not counted")
    parser.add_argument("--config", type=Path, default=CONFIG, help="an experiment of collaborative_experts")
    parser.add_argument("--videos", type=int, default=512, help="of the synthetic store")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of frozen_fast's form")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        device, result = measure(options, Path(folder))
    print(json.dumps(result, indent=2))
    if options.output:
        write_result(options.output, device, vars(options), result)


def measure(options: argparse.Namespace, folder: Path) -> tuple[torch.device, dict[str, Any]]:
    """Build both forms on one store, check that they agree, and time them."""
    path = json.dumps(str(folder))
    config = load_config(
        options.config,
        [f"data.sources[0].path={path}", "data.sources[0].split=''", f"training.precision={options.precision}"],
    )
    write_synthetic_store(folder, config, options.videos)
    parallel = start_parallel(config)
    device, size = parallel.device, config.curriculum.stages[0].global_batch_size
    torch.manual_seed(0)
    model = CollaborativeExperts.from_config(config.model).to(device)
    assert isinstance(model, CollaborativeExperts)
    plain = PlainCollaborativeExperts(copy.deepcopy(model)).to(device)
    reader = PlainReader(FeatureStore(folder), config)
    tokens, video = reader.batch(list(range(size)), np.random.default_rng(2))
    with torch.no_grad():
        own_sim = model.eval().similarity({"tokens": tokens}, video)
        difference = (
            plain.eval()(tokens.to(device), {name: x.to(device) for name, x in video.items()}) - own_sim
        ).abs()
    plain.train(), model.train()
    parallel.prepare(model, build_optimizer(model, config.optimizer))
    source = read_source(SourceConfig(name="train", format="features", path=str(folder), split=""))
    loader = build_training_loader(config, {"train": source}, model, device)
    specs = plan_steps(
        {"train": len(source)},
        {"train": 1.0},
        "round_robin",
        0,
        batch_sizes={"train": size},
        frames=1,
        num_steps=ROUND * (options.rounds + 1) + 1,
        start=DataPosition(),
    )
    forms = {
        "plain": plain_step(plain, reader, config, device),
        "frozen_fast": own_step(parallel, loader.batches(specs), config),
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for number in range(options.rounds + 1):
        for name, step in forms.items():
            found = [step() for _ in range(ROUND)]
            seconds[name] += found if number else []
    loader.close()
    parallel.close()
    result: dict[str, Any] = {
        "precision": {"plain": "fp32", "frozen_fast": parallel.precision},
        "batch_size": size,
        "steps": ROUND * options.rounds,
        "largest_difference": float(difference.max()),
        **{name: summary(steps, size) for name, steps in seconds.items()},
    }
    result["ratio"] = result["plain"]["mean_step_seconds"] / result["frozen_fast"]["mean_step_seconds"]
    return device, result


if __name__ == "__main__":
    main()
