"""`auto`: the measured choice of an attention backend per device, dtype and shape, kept on disk.

The first use of a shape times the backends that can run there, forward and backward, on random data of that
shape, on CUDA many of them queued between two events; the choice is written to a JSON file in the user's cache folder
(FROZEN_FAST_CACHE, by default ~/.cache/frozen_fast), so a resumed run computes what the run computed; other kernels are
measured again. Where the folder cannot be written, nothing is measured and the default is taken. A backend that fails
while it is measured is left out, whatever it raises; where all fail, nothing is stored. Of two processes that measure
at once, the first to write decides.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from frozen_kernels.attention.qkv_layout import Layout
from frozen_kernels.availability import unavailable_backends
from frozen_kernels.cache import cache_folder, leads_outside

logger = logging.getLogger(__name__)

CACHE_FILE = "attention_choices.json"
CANDIDATES = {"cpu": ("cpu_c", "sdpa"), "cuda": ("xformers", "triton", "sdpa")}
"""Per device, the default first: another one must beat it by MARGIN."""
MARGIN = 0.05
TOKENS_MEASURED = {"cpu": 2048, "cuda": 32_768}
"""The batch of a measurement is cut to about this number of tokens, on CUDA not that of a stage."""
REPEATS = 3
QUEUED_RUNS = 20
"""Runs of one measurement on CUDA: the device does not wait for the host between them, as in training."""

Compute = Callable[[str, Tensor, int, str], Tensor]
"""(backend, qkv_BS3ND, num_frames, axis) -> out_BSE."""
Measured = tuple[dict[str, float], dict[str, str]]
"""Milliseconds of the backends that ran, and why the others did not."""


@dataclass(frozen=True)
class Case:
    """What a choice depends on."""

    device: str
    dtype: str
    axis: str
    batch: int
    frames: int
    patches: int
    heads: int
    head_width: int
    threads: int
    torch: str
    candidates: str
    sources: str

    @property
    def key(self) -> str:
        """The case as one line, the key in the cache file."""
        return "|".join(f"{name}={value}" for name, value in asdict(self).items())


_chosen: dict[Case, dict[str, Any]] = {}


def chosen_backends() -> list[dict[str, Any]]:
    """What `auto` chose in this process, for the report: one row per case, in order of first use.

    Each row holds the case, "backend", "milliseconds" (forward + backward, by backend; empty where nothing was
    measured), "failed" (backend -> why it was left out) and "how": measured, cached or default.
    """
    return [{**asdict(case), **choice} for case, choice in _chosen.items()]


def forget_choices() -> None:
    """Clear this process's choices; the file on disk does not change."""
    _chosen.clear()
    _case_of.cache_clear()


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What runs where nothing has been measured: xformers on CUDA if it can, cpu_c on a CPU where a C compiler is."""
    return available_candidates(device, dtype)[0]


def available_candidates(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The candidates of `auto` on a device, the default first."""
    missing = unavailable_backends(device, dtype)
    return [name for name in CANDIDATES.get(device.type, ("sdpa",)) if name not in missing]


def choose_backend(qkv_BS3ND: Tensor, layout: Layout, axis: str, compute: Compute, *, whole_batch: bool = False) -> str:
    """The backend for a tensor: remembered, read from disk, or measured now.

    Args:
        qkv_BS3ND: the tensor about to be computed; only its device and dtype are read.
        layout: its sizes.
        axis: "time" or "space".
        compute: runs a named backend.
        whole_batch: on CUDA, measure this very batch; otherwise one that stands for others too.
    """
    device, dtype = qkv_BS3ND.device, qkv_BS3ND.dtype
    on_cpu = device.type == "cpu"
    case = _case_of(device, dtype, layout, axis, torch.get_num_threads() if on_cpu else 0, whole_batch and not on_cpu)
    choice = _chosen.get(case)
    if choice is None:
        candidates = available_candidates(device, dtype)
        choice = _decide(case, candidates, lambda: _measure(candidates, device, dtype, case, compute))
        _chosen[case] = choice
        times = ", ".join(f"{name} {time:.3g} ms" for name, time in choice["milliseconds"].items())
        logger.info(
            "attention auto: %s for the %s axis, %d clips of %d frames in %s on %s (%s%s)",
            choice["backend"],
            axis,
            case.batch,
            case.frames,
            case.dtype,
            case.device,
            choice["how"],
            f": {times}" if times else "",
        )
    return str(choice["backend"])


@lru_cache(maxsize=256)
def _case_of(
    device: torch.device, dtype: torch.dtype, layout: Layout, axis: str, threads: int, whole_batch: bool
) -> Case:
    """The case of a tensor; unless the whole batch counts, it is rounded up to a power of two and cut.

    Kept, because every layer of every step asks for it.
    """
    largest = max(1, TOKENS_MEASURED.get(device.type, 2048) // layout.tokens)
    return Case(
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        axis=axis,
        batch=layout.batch if whole_batch else min(1 << (layout.batch - 1).bit_length(), largest),
        frames=layout.frames,
        patches=layout.patches,
        heads=layout.heads,
        head_width=layout.head_width,
        threads=threads,
        torch=torch.__version__,
        candidates=",".join(available_candidates(device, dtype)),
        sources=_sources_hash(),
    )


@lru_cache(maxsize=1)
def _sources_hash() -> str:
    """Hash the code of all backends; measured times are valid for the same code only."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*")):
        if path.suffix in (".py", ".c", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _decide(case: Case, candidates: list[str], measure: Callable[[], Measured]) -> dict[str, Any]:
    """A choice with how it came about; the first choice on disk for a case stays."""
    default = {"backend": candidates[0], "milliseconds": {}, "failed": {}, "how": "default"}
    if len(candidates) == 1:
        return default
    path = cache_folder() / CACHE_FILE
    stored = _read_choices(path).get(case.key)
    if isinstance(stored, dict) and stored.get("backend") in candidates:
        return {"failed": {}, **stored, "how": "cached"}
    if not _writable(path):
        logger.warning("attention auto: %s cannot be written, so nothing is measured", path)
        return default
    milliseconds, failed = measure()
    if not milliseconds:  # the default then raises its own error where it is used
        logger.warning("attention auto: every backend fails: %s", "; ".join(f"{k}: {v}" for k, v in failed.items()))
        return {**default, "failed": failed}
    fastest = min(milliseconds, key=lambda name: milliseconds[name])
    standing = milliseconds.get(candidates[0])
    if standing is not None and milliseconds[fastest] > (1 - MARGIN) * standing:
        fastest = candidates[0]
    return _store(path, case, {"backend": fastest, "milliseconds": milliseconds, "failed": failed}, candidates)


def _writable(path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path.parent, os.W_OK) and not any(map(leads_outside, (path, _lock_of(path), _temporary_of(path))))


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


def _temporary_of(path: Path) -> Path:
    return path.with_suffix(f".{os.getpid()}.tmp")


def _read_choices(path: Path) -> dict[str, Any]:
    """The file's choices; none where there is no file, or with a warning where it is damaged."""
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("attention auto: %s is not readable (%s), measuring anew", path, error)
        return {}
    return choices if isinstance(choices, dict) else {}


def _store(path: Path, case: Case, choice: dict[str, Any], candidates: list[str]) -> dict[str, Any]:
    """Add a choice to the file under a lock, unless another process was first: then its choice holds."""
    with _lock_of(path).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        choices = _read_choices(path)
        first = choices.get(case.key)
        if isinstance(first, dict) and first.get("backend") in candidates:
            return {"failed": {}, **first, "how": "cached"}
        choices[case.key] = choice
        temporary = _temporary_of(path)
        temporary.write_text(json.dumps(choices, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    return {**choice, "how": "measured"}


def _measure(candidates: list[str], device: torch.device, dtype: torch.dtype, case: Case, compute: Compute) -> Measured:
    """Milliseconds of forward and backward by backend, the shortest of a few runs after one to warm up.

    The backends alternate, so that other load on the machine falls on all of them; one that fails is left out
    with a warning. Every exception counts as a failure: Triton's own (a kernel that does not compile, or needs more
    shared memory or registers than there are) derive from Exception alone.

    Returns:
        Milliseconds by backend, and the cause by backend that fails.

    It runs in a thread of its own: autocast, gradient mode and the hooks of activation checkpointing belong to
    the calling thread and stay out of it, and the random state is a private generator's.
    """
    milliseconds: dict[str, float] = {}
    failed: dict[str, str] = {}

    def fail(name: str, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        failed[name] = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        logger.warning("attention auto: %s fails on %s: %s", name, case.key, failed[name])
        milliseconds.pop(name, None)

    def work() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        generator = torch.Generator().manual_seed(0)
        tokens = 1 + case.frames * case.patches
        shape = (case.batch, tokens, 3, case.heads, case.head_width)
        qkv = torch.randn(shape, generator=generator).to(device=device, dtype=dtype).requires_grad_()
        grad = torch.ones(case.batch, tokens, case.heads * case.head_width, dtype=dtype, device=device)
        steps = {name: partial(_step, compute, name, qkv, grad, case) for name in candidates}
        for repeat in range(1 + REPEATS):
            for name, step in list(steps.items()):
                try:
                    seconds = _time(step, device)
                except Exception as error:
                    fail(name, error)
                    del steps[name]
                    continue
                if repeat:
                    milliseconds[name] = min(1e3 * seconds, milliseconds.get(name, float("inf")))

    def guarded() -> None:
        try:
            work()
        except Exception as error:  # the case's own tensors did not fit
            for name in candidates:
                fail(name, error)

    thread = Thread(target=guarded, name="attention-measurement")
    thread.start()
    thread.join()
    return milliseconds, failed


def _step(compute: Compute, name: str, qkv: Tensor, grad: Tensor, case: Case) -> None:
    torch.autograd.grad(compute(name, qkv, case.frames, case.axis), qkv, grad)


def _time(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run: on CUDA the mean of QUEUED_RUNS between two events of the stream, elsewhere by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(QUEUED_RUNS):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / QUEUED_RUNS
