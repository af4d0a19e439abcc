"""Joins the process group under the strategy of the launch."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from frozen_fast.config import ExperimentConfig, extensions
from frozen_fast.errors import UserError
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.launch_settings import check_precision, requested_strategy
from frozen_fast.parallel.precision import choose_precision
from frozen_fast.parallel.restarts import use_a_new_store


def start_parallel(config: ExperimentConfig) -> Parallel:
    """Join the other processes under the launch's strategy, and check the number of processes.

    Raises:
        UserError: the device or the number of processes differs from the request, or the launch contradicts the
            experiment.
    """
    training = config.training
    strategy = requested_strategy(os.environ)
    check_gradient_exchange(training.gradient_exchange, strategy)
    check_gpus_are_there(os.environ, training.device, strategy)
    cpu = wants_cpu(training.device)
    check_precision(os.environ, training)
    device = torch.device("cpu") if cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    precision = choose_precision(training.precision, device)
    use_a_new_store(os.environ)
    kind: type[Parallel] = extensions.strategies.load(strategy)
    accelerator = kind.accelerator_for(config, cpu, precision[0])
    check_world(accelerator.num_processes, training.expected_world_size)
    if accelerator.distributed_type.name not in kind.accelerate_types:
        raise UserError(
            f"accelerate config: got distributed type {accelerator.distributed_type.value} for {strategy}; "
            f"allowed: {', '.join(kind.accelerate_types)}"
        )
    return kind(accelerator, config, precision)


def wants_cpu(requested: str) -> bool:
    """Return whether to run on the CPU; `accelerate launch --cpu` sets ACCELERATE_USE_CPU."""
    told_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if requested == "cuda":
        if not torch.cuda.is_available():
            raise UserError("training.device: got 'cuda', but PyTorch finds no CUDA device; allowed: auto, cpu")
        if told_cpu:
            raise UserError("training.device: got 'cuda', but accelerate was launched with use_cpu; make them agree")
        return False
    return requested == "cpu" or told_cpu or not torch.cuda.is_available()


def check_gpus_are_there(environ: Mapping[str, str], device: str, strategy: str) -> None:
    """Refuse an accelerate config for several GPUs on a machine without a GPU, unless training.device is cpu.

    DeepSpeed and FSDP2 are exempt, because their accelerate configs for the CPU also have use_cpu false.

    Raises:
        UserError: naming the config for CPU processes.
    """
    told = environ.get("ACCELERATE_USE_CPU", "").lower()
    processes = int(environ.get("WORLD_SIZE", "1"))
    wants_gpus = strategy == "ddp" and device == "auto" and processes > 1 and told in ("false", "0", "no")
    if wants_gpus and not torch.cuda.is_available():
        raise UserError(
            f"accelerate config: got use_cpu false and {processes} processes, but PyTorch finds no CUDA device; "
            "allowed: configs/accelerate/cpu_2.yaml (CPU processes), or training.device=cpu"
        )


def check_gradient_exchange(dtype: str, strategy: str) -> None:
    """Refuse training.gradient_exchange under a strategy with its own gradient reduction.

    Raises:
        UserError: bf16 with ZeRO or FSDP2.
    """
    if dtype != "fp32" and strategy != "ddp":
        raise UserError(f"training.gradient_exchange: got {dtype!r} with {strategy}; allowed: fp32, or DDP")


def check_world(num_processes: int, expected: int | None) -> None:
    """Check the number of processes against the launcher's and training.expected_world_size."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise UserError(
            f"number of processes: got {num_processes} where the launcher started {launched} (WORLD_SIZE); "
            "launch with torchrun or an accelerate config from configs/accelerate/"
        )
    if expected is not None and expected != num_processes:
        raise UserError(f"training.expected_world_size: got {num_processes} process(es); allowed: {expected}")
