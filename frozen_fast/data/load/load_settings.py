"""Loader settings: data.decode, with defaults by device."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from frozen_fast.common.machine import available_cores
from frozen_fast.config.schema import DecodeConfig

MOST_WORKERS = 16


@dataclass(frozen=True)
class LoadSettings:
    """Numbers of one rank's loader.

    Attributes:
        workers: loader processes; 0: a background thread.
        threads: decoding threads of each.
        prefetch_batches: batches read ahead; parts of batches where data.decode.prefetch_batches is null.
    """

    workers: int
    threads: int
    prefetch_batches: int


def load_settings(decode: DecodeConfig, device: torch.device, *, cores: int | None = None) -> LoadSettings:
    """Fill in the defaults of data.decode.

    On a CPU the model needs the cores: one background thread with two decoding threads, two batches ahead. On a GPU
    a thread of the training process would share its interpreter lock with the thread that launches the kernels, so
    loader processes of one thread each read, one for each core of this rank but one, and two parts of a batch for
    each are read ahead. The backend dali decodes on the GPU, which takes the background thread.

    Args:
        decode: the config's section.
        device: the model's.
        cores: number of cores for this rank; None: the cores of this process divided by the ranks of this machine.
    """
    workers, threads, ahead = decode.workers, decode.threads, decode.prefetch_batches
    if cores is None:
        cores = available_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if workers is None:
        workers = max(1, min(MOST_WORKERS, cores - 1)) if device.type == "cuda" and decode.backend != "dali" else 0
    if threads is None:
        threads = 1 if workers and decode.workers is None else 2
    return LoadSettings(workers, threads, ahead if ahead is not None else max(2, 2 * workers))
