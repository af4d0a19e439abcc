"""Measure one stage of the curriculum on the processes that launched this: started by throughput.py, or by hand.

    accelerate launch benchmarks/throughput_stage.py --config EXPERIMENT.yaml --frames 4 --batch-size 24 \
        --modes model,input,end_to_end --output stage.json [key.path=value ...]

model: a synthetic batch that stays on the device. input: the loader alone. end_to_end: the loader and the step, as in
training. Every mode runs in windows after warm-up; a window ends with a synchronisation and has enough steps that it
lasts about --window-seconds (or exactly --window-steps). With several processes the model is timed once more without
gradient exchange, which gives the cost of communication.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from frozen_fast.common.files import write_json
from frozen_fast.common.logs import set_up_logging
from frozen_fast.config import ExperimentConfig, check_for_training, load_config
from frozen_fast.data import Batch, DataPosition, Source, plan_steps
from frozen_fast.errors import UserError
from frozen_fast.optimizers import build_optimizer
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.start import start_parallel
from frozen_fast.profiling import measure_peak, peak_memory_bytes, reset_peak_memory
from frozen_fast.profiling.peak import device_peak
from frozen_fast.records.environment import describe, device_description
from frozen_fast.training import compiling
from frozen_fast.training.parts import build_model, build_training_loader, flops_counter, read_training_sources
from frozen_fast.training.stages import expand_frames
from frozen_fast.training.step import forward_backward, update
from frozen_fast.training.task import build_task
from frozen_kernels import chosen_backends

MODES = ("model", "input", "end_to_end")
MOST_WINDOW_STEPS = 10_000


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How long to measure."""

    count: int
    seconds: float
    steps: int | None
    warmup_steps: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every mode needs."""

    config: ExperimentConfig
    parallel: Parallel
    sources: dict[str, Source]
    model: Any
    frames: int
    batch_size: int
    text_tokens: int
    windows: Windows


def time_windows(step: Callable[[], float | None], setup: Setup) -> list[dict[str, float]]:
    """Run steps in windows; every rank runs equally many.

    Args:
        step: one step; may return seconds it waited for input.
        setup: how long, and the device to wait for.

    Returns:
        Per window: steps, clips over all ranks, seconds, stall_seconds (of this rank).
    """
    parallel, windows = setup.parallel, setup.windows
    for _ in range(windows.warmup_steps):
        step()
    parallel.synchronize()
    started = time.perf_counter()
    step()
    parallel.synchronize()
    seconds = max(parallel.gather_objects(time.perf_counter() - started))
    steps = windows.steps or min(MOST_WINDOW_STEPS, max(1, round(windows.seconds / seconds)))
    rows = []
    for _ in range(windows.count):
        parallel.gather_objects(None)  # all ranks begin a window together
        started = time.perf_counter()
        stall = sum(step() or 0.0 for _ in range(steps))
        parallel.synchronize()
        seconds = max(parallel.gather_objects(time.perf_counter() - started))
        rows.append({"steps": steps, "clips": steps * setup.batch_size, "seconds": seconds, "stall_seconds": stall})
    return rows


def measure_model(setup: Setup, *, exchange: bool = True) -> list[dict[str, float]]:
    """The whole optimizer step on a synthetic batch: both towers, loss, backward, update."""
    parallel, config = setup.parallel, setup.config
    generator = torch.Generator().manual_seed(config.seed + parallel.rank)
    side, rows = setup.model.video_model.resolution, setup.batch_size // parallel.world_size
    video_BTCHW = torch.randn(rows, setup.frames, 3, side, side, generator=generator).to(parallel.device)
    vocabulary = setup.model.text_model.vocabulary_size
    input_ids = torch.randint(0, vocabulary, (rows, setup.text_tokens), generator=generator).to(parallel.device)
    text = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    task = build_task(config)

    def step() -> None:
        forward_backward(parallel, video_BTCHW, text, task, last=exchange)
        update(parallel, config.optimizer.gradient_clip_norm)

    return time_windows(step, setup)


def planned_batches(setup: Setup) -> tuple[Any, Iterator[Batch]]:
    """The loader, and its endless batches of the stage's first source."""
    config, parallel = setup.config, setup.parallel
    loader = build_training_loader(config, setup.sources, setup.model, parallel.device)
    sizes = dict.fromkeys(setup.sources, setup.batch_size)
    specs = plan_steps(
        {name: len(source) for name, source in setup.sources.items()},
        {source.name: source.weight for source in config.data.sources},
        config.data.order,
        config.seed,
        batch_sizes=sizes,
        frames=setup.frames,
        accumulation=1,
        num_steps=setup.windows.warmup_steps + 1 + setup.windows.count * (setup.windows.steps or MOST_WINDOW_STEPS),
        start=DataPosition(),
        rank=parallel.rank,
        world_size=parallel.world_size,
    )
    return loader, loader.batches(specs)


def measure_input(setup: Setup) -> list[dict[str, float]]:
    """The loader alone: read, decode, crop, normalise, tokenise, move to the device."""
    loader, batches = planned_batches(setup)
    try:
        return time_windows(lambda: waited(batches)[1], setup)
    finally:
        loader.close()


def measure_end_to_end(setup: Setup) -> list[dict[str, float]]:
    """The loader and the step."""
    loader, batches = planned_batches(setup)
    parallel, config = setup.parallel, setup.config
    task = build_task(config)

    def step() -> float:
        batch, seconds = waited(batches)
        forward_backward(parallel, batch.video, batch.text, task)
        update(parallel, config.optimizer.gradient_clip_norm)
        return seconds

    try:
        return time_windows(step, setup)
    finally:
        loader.close()


def waited(batches: Iterator[Batch]) -> tuple[Batch, float]:
    """The next batch and the seconds it took to come."""
    started = time.perf_counter()
    batch = next(batches)
    return batch, time.perf_counter() - started


def measure(options: argparse.Namespace, config: ExperimentConfig, parallel: Parallel) -> dict[str, Any]:
    """All modes asked for, one after the other in this process."""
    sources = read_training_sources(config)
    model = build_model(config, parallel.device)
    flops_per_clip = flops_counter(model, [options.frames])
    if config.training.compile:
        compiling.compile_towers(model)
    parallel.prepare(model, build_optimizer(model, config.optimizer))
    expand_frames(parallel, model, options.frames, config.model.expansion)
    compiling.begin_stage(
        model,
        {options.frames: options.batch_size // parallel.world_size},
        device=parallel.device,
        precision=parallel.precision,
        compiled=config.training.compile,
    )
    setup = Setup(
        config=config,
        parallel=parallel,
        sources=sources,
        model=model,
        frames=options.frames,
        batch_size=options.batch_size,
        text_tokens=options.text_tokens,
        windows=Windows(
            count=options.windows,
            seconds=options.window_seconds,
            steps=options.window_steps,
            warmup_steps=options.warmup_steps,
        ),
    )
    runners = {"model": measure_model, "input": measure_input, "end_to_end": measure_end_to_end}
    measured: dict[str, Any] = {}
    for mode in options.modes:
        reset_peak_memory(parallel.device)
        windows = runners[mode](setup)
        measured[mode] = {"windows": windows, "peak_memory_bytes": peak_memory_bytes(parallel.device)}
    if "model" in options.modes and parallel.world_size > 1:
        measured["model_without_exchange"] = {"windows": measure_model(setup, exchange=False)}
    datasheet = device_peak(device_description(parallel.device), parallel.precision)
    measured_peak = measure_peak(parallel.device, parallel.precision) if options.measure_peak else None
    flops = flops_per_clip(options.frames, options.text_tokens, options.batch_size)
    return {
        "frames": options.frames,
        "batch_size": options.batch_size,
        "text_tokens": options.text_tokens,
        "attention": config.model.video.attention,
        "chosen_attention": chosen_backends(),
        "compile": config.training.compile,
        "precision": parallel.precision,
        "num_devices": parallel.world_size,
        "device": device_description(parallel.device),
        "flops_per_clip": flops.executed if flops else None,
        "nominal_flops_per_clip": flops.nominal if flops else None,
        "peaks": {
            name: asdict(peak) if peak else None
            for name, peak in (("datasheet", datasheet), ("measured_peak", measured_peak))
        },
        "modes": measured,
        "environment": describe(
            devices=[device_description(parallel.device)],
            world_size=parallel.world_size,
            distributed_type=parallel.distributed_type,
            precision=parallel.precision,
            precision_reason=parallel.precision_reason,
        ),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True, help="clips over all processes")
    parser.add_argument("--modes", default=",".join(MODES), help=f"some of {','.join(MODES)}")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--window-seconds", type=float, default=5.0)
    parser.add_argument("--window-steps", type=int, default=None, help="instead of --window-seconds")
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--text-tokens", type=int, default=32, help="tokens of a synthetic caption")
    parser.add_argument("--measure-peak", action="store_true", help="tell MFU against a peak measured here too")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args(arguments)
    options.modes = options.modes.split(",")
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown:
        parser.error(f"--modes: got {unknown[0]!r}; allowed: {', '.join(MODES)}")
    return options


def stage_overrides(options: argparse.Namespace) -> list[str]:
    """The experiment with one stage of these frames, so that the model has frame embeddings for them only."""
    stage = f"[{{frames: {options.frames}, global_batch_size: {options.batch_size}, steps: 1}}]"
    return ["curriculum.budget_epochs=null", "curriculum.budget_clips=null", f"curriculum.stages={stage}"]


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the JSON; 2 for a mistake in the config or the data."""
    options = parse(arguments)
    parallel = None
    try:
        config = load_config(options.config, [*options.overrides, *stage_overrides(options)])
        check_for_training(config)
        if options.batch_size % (world := int(os.environ.get("WORLD_SIZE", "1"))):
            raise UserError(
                f"--batch-size: got {options.batch_size} on {world} processes; allowed: a multiple of {world}"
            )
        parallel = start_parallel(config)
        set_up_logging(rank=parallel.rank)
        row = measure(options, config, parallel)
        if parallel.is_main:
            write_json(options.output, row)
        return 0
    except UserError as error:
        if parallel is None or parallel.is_main:
            sys.stderr.write(f"error: {error}\n")
        return 2
    finally:
        if parallel is not None:
            parallel.close()


if __name__ == "__main__":
    sys.exit(main())
