"""Divided attention: every backend, both axes, beside the floor that this machine's own copy and product set.

    python benchmarks/attention.py --output results/h200
    python benchmarks/attention.py --frames 1=8,4=2 --dtypes fp32 --device cpu
    python benchmarks/attention.py --tune       tile shapes of the Triton kernels, for this GPU's architecture

For each axis, number of frames and dtype: forward, and forward + backward, of every backend that runs here, timed
alternately in one process; peak memory of a training step; the bytes that any form must move and the FLOPs that it
must do, the floor that follows (the larger of bytes / copy bandwidth and FLOPs / product peak, both measured in the
same run), and how many times the floor a backend takes. `reference` stands for the released code's way of
computing. Writes attention.json, attention.md and attention.svg. On a CPU the sizes are small and the table says so.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_tiles import tune
from measure import (
    DTYPES,
    cause,
    describe_machine,
    measured_peak,
    peak_step_bytes,
    pick_device,
    time_in_turns,
    write_result,
)
from torch import Tensor

from frozen_fast.common.files import write_atomically
from frozen_kernels import BACKEND_NAMES, divided_attention, unavailable_backends

AXES = ("time", "space")
BATCHES = {"cuda": "1=96,4=24,8=16", "cpu": "1=8,4=2,8=1"}
DEFAULT_DTYPES = {"cuda": "bf16", "cpu": "fp32"}


@dataclass(frozen=True)
class Case:
    """One line of the table, without the backend."""

    axis: str
    frames: int
    batch: int
    patches: int
    heads: int
    head_width: int
    dtype: str

    @property
    def tokens(self) -> int:
        """S."""
        return 1 + self.frames * self.patches


def least_bytes(case: Case, *, backward: bool) -> int:
    """Bytes that any form moves: q, k, v read and the result written; backward eight rows of D more per token.

    The backward pass reads q, k, v, the result and its gradient and writes three gradients.
    """
    rows = case.batch * case.tokens * (12 if backward else 4)
    return rows * case.heads * case.head_width * DTYPES[case.dtype].itemsize


def least_flops(case: Case, *, backward: bool) -> int:
    """FLOPs of scores and weighted sums (2 per multiply-add); backward twice the forward, without recomputation."""
    group = case.frames if case.axis == "time" else case.patches
    pairs = (case.tokens - 1) * (group + 1) + case.tokens
    forward = 4 * case.batch * case.heads * case.head_width * pairs
    return 3 * forward if backward else forward


def floor_seconds(case: Case, peak: dict[str, Any], *, backward: bool) -> tuple[float, str]:
    """The least time on a machine with this peak, and what sets it."""
    moving = least_bytes(case, backward=backward) / peak["bytes_per_second"]
    computing = least_flops(case, backward=backward) / peak["flops_per_second"]
    return (moving, "memory") if moving >= computing else (computing, "compute")


def forward_step(backend: str, qkv: Tensor, case: Case) -> None:
    """One forward pass without gradients."""
    with torch.no_grad():
        divided_attention(qkv, case.frames, case.axis, backend=backend)


def training_step(backend: str, qkv: Tensor, grad: Tensor, case: Case) -> None:
    """One forward and backward pass."""
    out = divided_attention(qkv, case.frames, case.axis, backend=backend)
    torch.autograd.grad(out, qkv, grad)


def measure_case(case: Case, backends: list[str], device: torch.device, peak: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one case, a row per backend and direction; what fails has a row with the cause."""
    rows: list[dict[str, Any]] = []
    try:
        generator = torch.Generator(device).manual_seed(0)
        shape = (case.batch, case.tokens, 3, case.heads, case.head_width)
        qkv = torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype]).requires_grad_()
        grad = torch.ones(case.batch, case.tokens, case.heads * case.head_width, device=device, dtype=qkv.dtype)
    except Exception as error:  # the case itself does not fit
        return [{**asdict(case), "backend": backend, "failed": cause(error)} for backend in backends]
    for direction in ("forward", "forward+backward"):
        backward = direction != "forward"
        steps = {
            name: partial(training_step, name, qkv, grad, case) if backward else partial(forward_step, name, qkv, case)
            for name in backends
        }
        timings, failed = time_in_turns(steps, device)
        rows += [
            {**asdict(case), "backend": name, "direction": direction, "failed": reason}
            for name, reason in failed.items()
        ]
        floor, bound = floor_seconds(case, peak, backward=backward)
        for name, timing in timings.items():
            label = {**asdict(case), "backend": name, "direction": direction}
            try:
                peak_bytes = peak_step_bytes(steps[name], device)
            except Exception as error:
                rows.append({**label, "failed": cause(error)})
                continue
            rows.append(
                {
                    **label,
                    "seconds": asdict(timing),
                    "speedup_over_reference": _ratio(timings, "reference", name),
                    "peak_bytes": peak_bytes,
                    "least_bytes": least_bytes(case, backward=backward),
                    "least_flops": least_flops(case, backward=backward),
                    "floor_seconds": floor,
                    "bound": bound,
                    "times_floor": timing.median / floor,
                }
            )
    return rows


def _ratio(timings: dict[str, Any], over: str, name: str) -> float | None:
    return timings[over].median / timings[name].median if over in timings else None


def table(
    rows: list[dict[str, Any]],
    device: torch.device,
    peaks: dict[str, dict[str, Any]],
    machine: dict[str, Any] | None = None,
) -> str:
    """The rows as Markdown; `machine` is what describe_machine said when they were measured."""
    lines = ["# Divided attention", ""]
    if device.type != "cuda":
        lines += ["Measured on a CPU at small sizes; not representative of a GPU.", ""]
    if machine and device.type == "cpu" and machine["load_average"] > 0.5 * machine["cores"] + machine["threads"]:
        other = f"Other work was running (load average {machine['load_average']:.1f} on {machine['cores']} cores)"
        lines += [f"{other}: compare within a row's case only.", ""]
    for dtype, peak in peaks.items():
        speed, width = peak["flops_per_second"] / 1e12, peak["bytes_per_second"] / 1e9
        lines.append(f"Peak in {dtype}: {speed:.2f} TFLOP/s, {width:.1f} GB/s ({peak['source']}).")
    lines += ["", "| axis | T | B | dtype | pass | backend | ms (p20-p80) | x reference | x floor | bound | peak MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        head = f"| {row['axis']} | {row['frames']} | {row['batch']} | {row['dtype']} |"
        if "failed" in row:
            lines.append(f"{head} {row.get('direction', '')} | {row['backend']} | failed: {row['failed']} | | | | |")
            continue
        seconds = row["seconds"]
        spread = f"{1e3 * seconds['median']:.3f} ({1e3 * seconds['p20']:.3f}-{1e3 * seconds['p80']:.3f})"
        faster = "" if row["speedup_over_reference"] is None else f"{row['speedup_over_reference']:.2f}"
        lines.append(
            f"{head} {row['direction']} | {row['backend']} | {spread} | {faster} | {row['times_floor']:.1f} | "
            f"{row['bound']} | {row['peak_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Forward + backward as multiples of the floor, a panel per axis and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [row for row in rows if row.get("direction") == "forward+backward" and "failed" not in row]
    panels = sorted({(row["axis"], row["dtype"]) for row in drawn}, reverse=True)
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), layout="constrained", squeeze=False)
    for (axis, dtype), panel in zip(panels, axes[0], strict=True):
        chosen = [row for row in drawn if (row["axis"], row["dtype"]) == (axis, dtype)]
        for backend in dict.fromkeys(row["backend"] for row in chosen):
            points = [(row["frames"], row["times_floor"]) for row in chosen if row["backend"] == backend]
            panel.plot(*zip(*points, strict=True), "o-", label=backend)
        panel.set(title=f"{axis} axis, {dtype}", xlabel="frames", ylabel="time / floor", yscale="log")
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)


def read_pairs(text: str) -> list[tuple[int, int]]:
    """frames=batch pairs, comma-separated."""
    pairs = []
    for part in text.split(","):
        frames, _, batch = part.partition("=")
        if not (frames.isdigit() and batch.isdigit() and int(frames) and int(batch)):
            raise SystemExit(f"--frames: got {part!r}; allowed: FRAMES=BATCH, both at least 1")
        pairs.append((int(frames), int(batch)))
    return pairs


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--frames", default=None, help="frames=batch pairs, e.g. 1=96,4=24 (default by device)")
    parser.add_argument("--dtypes", default=None, help="fp32,bf16,fp16 (default: bf16 on CUDA, fp32 on a CPU)")
    parser.add_argument("--backends", default=None, help="comma-separated; default: all that run here")
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: PyTorch's own choice")
    parser.add_argument("--tune", action="store_true", help="sweep the Triton kernels' tile shapes on this GPU instead")
    parser.add_argument("--output", type=Path, default=Path("attention_results"), help="folder for the results")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the files."""
    options = parse(arguments)
    device = pick_device(options.device)
    if options.tune and not (device.type == "cuda" and torch.cuda.is_available()):
        print("error: --tune: needs a CUDA GPU, and this machine has none", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    pairs = read_pairs(options.frames or BATCHES[device.type])
    dtypes = (options.dtypes or DEFAULT_DTYPES[device.type]).split(",")
    rows: list[dict[str, Any]] = []
    peaks: dict[str, dict[str, Any]] = {}
    left_out: dict[str, dict[str, str]] = {}
    options.output.mkdir(parents=True, exist_ok=True)
    if options.tune:
        tune(options, device, pairs, dtypes)
        return 0
    for dtype in dtypes:
        peaks[dtype] = measured_peak(device, dtype)
        left_out[dtype] = unavailable_backends(device, DTYPES[dtype])
        wanted = options.backends.split(",") if options.backends else list(BACKEND_NAMES)
        backends = [name for name in wanted if name not in left_out[dtype]]
        for axis in AXES:
            for frames, batch in pairs:
                sizes = (options.patches, options.heads, options.head_width)
                rows += measure_case(Case(axis, frames, batch, *sizes, dtype), backends, device, peaks[dtype])
                # after every case, so that a run that is stopped leaves what it measured
                write_files(options, device, {"peaks": peaks, "left_out": left_out, "rows": rows})
    plot(rows, options.output / "attention.svg", note_for(device) or "fwd + bwd over the measured floor")
    print((options.output / "attention.md").read_text(encoding="utf-8"))
    for dtype, missing in left_out.items():
        for name, reason in missing.items():
            print(f"left out in {dtype}: {name}: {reason}")
    return 0


def note_for(device: torch.device) -> str:
    """What a result says about itself."""
    return "" if device.type == "cuda" else "CPU at small sizes; not representative of a GPU"


def write_files(options: argparse.Namespace, device: torch.device, result: dict[str, Any]) -> None:
    """The JSON and the table of what has been measured so far."""
    whole = {"note": note_for(device), "operators": xformers_operators(), **result}
    write_result(options.output / "attention.json", device, vars(options), whole)
    text = table(result["rows"], device, result["peaks"], describe_machine(device))
    write_atomically(options.output / "attention.md", text)


def xformers_operators() -> dict[str, str]:
    """Which of xformers' operators ran, where any did."""
    module = sys.modules.get("frozen_kernels.attention.xformers")
    return dict(module.OPERATORS_USED) if module else {}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
