"""A few optimizer steps at one batch size on synthetic data, in a separate process, which may run out of memory.

    python -m frozen_fast.training.trial --config FILE --frames T --batch-size B --output FILE [key.path=value ...]

`frozen-fast find-batch-size` starts this module. Captions have model.text.max_tokens tokens, so that the step needs the
most memory. Weights are random unless model.checkpoint is set.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frozen_fast.common.files import write_json
from frozen_fast.config import ExperimentConfig, load_config
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder
from frozen_fast.optimizers import build_optimizer
from frozen_fast.parallel.start import start_parallel
from frozen_fast.profiling import peak_memory_bytes
from frozen_fast.records.environment import device_description
from frozen_fast.training import compiling
from frozen_fast.training.parts import build_frozen_model
from frozen_fast.training.stages import expand_frames
from frozen_fast.training.step import forward_backward, update
from frozen_fast.training.task import build_task

STEPS = 3
"""The optimizer's state exists after the first update, so the second step needs the most memory; the third is timed."""


def stage_overrides(frames: int, batch_size: int) -> list[str]:
    """Return the experiment with one stage."""
    stage = f"[{{frames: {frames}, global_batch_size: {batch_size}, steps: 1}}]"
    return ["curriculum.budget_epochs=null", "curriculum.budget_clips=null", f"curriculum.stages={stage}"]


def run_steps(config: ExperimentConfig, memory_bytes: int | None) -> dict[str, Any]:
    """Run the steps of the config's one stage on this process's device.

    Args:
        config: an experiment of one stage.
        memory_bytes: limit of the CUDA allocator; None: the device's memory.

    Returns:
        {"frames", "batch_size", "peak_memory_bytes", "clips_per_second", "device", "precision"}.
    """
    stage = config.curriculum.stages[0]
    parallel = start_parallel(config)
    try:
        if memory_bytes is not None and parallel.device.type == "cuda":
            whole = torch.cuda.get_device_properties(parallel.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / whole), parallel.device)
        model = build_frozen_model(config, parallel.device)
        if config.training.compile:
            compiling.compile_towers(model)
        parallel.prepare(model, build_optimizer(model, config.optimizer))
        expand_frames(parallel, model, stage.frames, config.model.expansion)
        batch_size = stage.global_batch_size
        compiling.begin_stage(
            model,
            {stage.frames: batch_size},
            device=parallel.device,
            precision=parallel.precision,
            compiled=config.training.compile,
        )
        side = model.video_model.resolution
        video_BTCHW = torch.randn(batch_size, stage.frames, 3, side, side, device=parallel.device)
        task = build_task(config)
        text = _longest_captions(model, batch_size, parallel.device)
        for _ in range(STEPS):
            parallel.synchronize()
            started = time.perf_counter()
            forward_backward(parallel, video_BTCHW, text, task)
            update(parallel, config.optimizer.gradient_clip_norm)
        parallel.synchronize()
        return {
            "frames": stage.frames,
            "batch_size": batch_size,
            "peak_memory_bytes": peak_memory_bytes(parallel.device),
            "clips_per_second": batch_size / (time.perf_counter() - started),
            "device": device_description(parallel.device),
            "precision": parallel.precision,
        }
    finally:
        parallel.close()


def _longest_captions(model: DualEncoder, batch_size: int, device: torch.device) -> dict[str, Tensor]:
    assert model.text_model.tokenizer is not None, "build_model refuses a tower without a tokenizer"
    length, vocabulary = model.text_model.tokenizer.max_tokens, model.text_model.vocabulary_size
    input_ids_BL = torch.randint(0, vocabulary, (batch_size, length), device=device)
    return {"input_ids": input_ids_BL, "attention_mask": torch.ones_like(input_ids_BL)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps and write the results; return 2 for a mistake in the config. Running out of memory raises."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--memory-bytes", type=int)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args(arguments)
    try:
        stage = stage_overrides(options.frames, options.batch_size)
        config = load_config(options.config, [*options.overrides, *stage])
        if config.model.checkpoint is None:
            video = replace(config.model.video, weights="none")
            text = replace(config.model.text, weights="random")
            config = replace(config, model=replace(config.model, video=video, text=text))
        write_json(options.output, run_steps(config, options.memory_bytes))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
