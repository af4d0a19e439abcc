"""A training step of the model beside the same step computed as the released code computes it.

    python benchmarks/model_step.py --output results/model_step_cpu.json
    python benchmarks/model_step.py --frames 1=8,4=2 --contenders released,auto,auto+compile --precisions fp32 --whole
    python benchmarks/model_step.py --model clip2video,clip4clip,frozen --frames 12=2 --precisions bf16 --whole

One run: the same weights and the same batch for all, taking turns window by window. The step is the video side's
forward and backward pass; with --whole it is the model's: both sides, the loss and AdamW. `released` is the model as
its released code computes it (benchmarks/released_tower.py, released_clip.py). Other contenders name an attention
backend of frozen_kernels (auto takes the fastest) in our form; +compile compiles its blocks, +plain has PyTorch's own
operators for residual norms and GELU, +whole computes the last block's patch outputs, which nothing reads (frozen).
Every contender runs in every precision (bf16: autocast over fp32 weights); its ratio to `released` in fp32 and in bf16
says how many times faster it is. MFU is the published model's FLOPs over the step's time and the device's peak.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import DTYPES, Timing, cause, measured_peak, peak_step_bytes, pick_device, time_in_turns, write_result
from step_forms import DEFAULT_SIZES, FORMS, SIZES, Case, How, draw_text, resolution_of, step_flops
from torch import Tensor

from frozen_fast.errors import unknown_name
from frozen_kernels import BACKEND_NAMES, chosen_backends, unavailable_backends

RELEASED = "released"
COMPILED, PLAIN, WHOLE = "+compile", "+plain", "+whole"
PRECISIONS = ("fp32", "bf16")
BATCHES = {"cuda": "1=96,4=24,8=16", "cpu": "1=8,4=2,8=1"}
LEARNING_RATE = 3e-5


class Contender:
    """One way to compute the step, with weights that all contenders share at the start."""

    def __init__(self, name: str, case: Case, max_frames: int, device: torch.device) -> None:
        """Build the model.

        Args:
            name: "released", or an attention backend, with or without +compile, +plain and +whole.
            case: the batch.
            max_frames: rows of temporal_embed.
            device: where it runs.
        """
        backend = backend_of(name)
        how = How(
            released=backend == RELEASED,
            attention="auto" if backend == RELEASED else backend,
            fused_ops="plain" if PLAIN in name else "auto",
            full_last_block=WHOLE in name,
        )
        with torch.device(device):  # drawn where they are used: a base-size tower takes seconds on a CPU
            torch.manual_seed(0)
            form = FORMS[case.model](case, how, max_frames)
        self.device = device
        self.model = form.model.to(device).train()
        self.loss = form.loss
        self.optimizer: torch.optim.Optimizer | None = None
        if case.whole:
            fused = None if how.released else True
            self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=0, fused=fused)
        if COMPILED in name:
            for block in form.blocks:
                block.compile()

    def drop_gradients(self) -> None:
        """Free the last step's gradients, which the next step's memory is counted without."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def step(self, precision: str, video_BTCHW: Tensor, text: dict[str, Tensor]) -> None:
        """One step; gradients are dropped first, as a training loop drops them."""
        self.drop_gradients()
        half = torch.autocast(self.device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
        with half:
            loss = self.loss(video_BTCHW, text)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()


def measure_case(
    case: Case, options: argparse.Namespace, max_frames: int, device: torch.device, peaks: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of one case: a row per contender and precision; what fails or cannot run has a row with the cause."""
    torch.compiler.reset()  # the code of an earlier case would count against the limit of recompilations
    resolution = resolution_of(case)
    generator = torch.Generator(device).manual_seed(1)
    shape = (case.batch, case.frames, 3, resolution, resolution)
    text = draw_text(case, device, generator)
    video = torch.randn(shape, generator=generator, device=device)
    flops = step_flops(case, max_frames)
    steps: dict[str, Callable[[], None]] = {}
    rows: list[dict[str, Any]] = []
    contenders = []
    for name in options.contenders.split(","):
        labels = {f"{name} {key}": {**asdict(case), "contender": name, "precision": key} for key in precisions(options)}
        try:
            contenders.append(Contender(name, case, max_frames, device))
        except Exception as error:
            rows += [{**label, "failed": cause(error)} for label in labels.values()]
            continue
        for key, label in labels.items():
            reason = why_not(name, label["precision"], device)
            rows.append({**label, "left_out": reason} if reason else label)
            if not reason:
                steps[key] = partial(contenders[-1].step, label["precision"], video, text)
    timings, failed = time_in_turns(
        steps, device, windows=options.windows, window_seconds=options.window_seconds, warmup=options.warmup
    )
    for row in rows:
        key = f"{row['contender']} {row['precision']}"
        if key in failed:
            row["failed"] = failed[key]
        elif key in timings:
            for contender in contenders:
                contender.drop_gradients()
            try:
                row.update(figures(key, timings, case.batch), peak_bytes=peak_step_bytes(steps[key], device))
                if flops is not None:
                    per_second = flops / timings[key].median
                    peak = peaks[row["precision"]]["flops_per_second"]
                    row.update(model_flops=flops, model_flops_per_second=per_second, mfu=per_second / peak)
            except Exception as error:
                row["failed"] = cause(error)
    return rows


def precisions(options: argparse.Namespace) -> list[str]:
    """Those asked for."""
    return options.precisions.split(",")


def figures(key: str, timings: dict[str, Timing], batch: int) -> dict[str, Any]:
    """A contender's speed, and its ratios to the released code's."""
    timing = timings[key]
    ratios = {
        f"times_released_{precision}": timings[f"{RELEASED} {precision}"].median / timing.median
        for precision in PRECISIONS
        if f"{RELEASED} {precision}" in timings
    }
    return {"seconds": asdict(timing), "clips_per_second": batch / timing.median, **ratios}


def why_not(name: str, precision: str, device: torch.device) -> str:
    """Why a contender cannot run here; empty if it can."""
    return unavailable_backends(device, DTYPES[precision]).get(backend_of(name), "")


def table(rows: list[dict[str, Any]], device: torch.device) -> str:
    """The rows as Markdown."""
    head = (
        "step | T | B | contender | precision | s (p20-p80) | clips/s | x released fp32 | x released bf16 | MiB | MFU"
    )
    lines = [f"| {head} |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        step = f"{row.get('model', 'frozen')}, {'whole' if row['whole'] else 'video side'}"
        head = f"| {step} | {row['frames']} | {row['batch']} | {row['contender']} | {row['precision']} |"
        if "left_out" in row or "failed" in row:
            what = f"failed: {row['failed']}" if "failed" in row else f"left out: {row['left_out']}"
            lines.append(f"{head} {what} | | | | | |")
            continue
        seconds = row["seconds"]
        ratios = " | ".join(
            f"{row[f'times_released_{precision}']:.2f}" if f"times_released_{precision}" in row else ""
            for precision in PRECISIONS
        )
        lines.append(
            f"{head} {seconds['median']:.3f} ({seconds['p20']:.3f}-{seconds['p80']:.3f}) | "
            f"{row['clips_per_second']:.2f} | {ratios} | {row['peak_bytes'] / 2**20:.0f} | "
            f"{format(row['mfu'], '.1%') if 'mfu' in row else 'n/a'} |"
        )
    note = (
        f"Measured on {device.type}; memory is that of one step without the weights. MFU: FLOPs of the published "
        "model over time and the matrix-product peak measured in the same run and precision."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def backend_of(contender: str) -> str:
    """Backend of a contender, without its suffixes."""
    return contender.split("+")[0]


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
    """The command line, its names checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--model", default="frozen", help=f"comma-separated: {', '.join(FORMS)}")
    parser.add_argument("--size", default=None, help="of VIDEO_SIZES (frozen) or CLIP_SIZES; default: base, ViT-B/32")
    parser.add_argument("--frames", default=None, help="frames=batch pairs, e.g. 1=96,4=24 (default by device)")
    parser.add_argument("--contenders", default="released,auto,sdpa", help="released, attention backends, +compile")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--whole", action="store_true", help="time the dual encoder's step, not the video tower's")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--window-seconds", type=float, default=2.0, help="at least one step")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each contender before anything is timed")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: PyTorch's default")
    parser.add_argument("--output", type=Path, default=Path("model_step.json"), help="result file")
    options = parser.parse_args(arguments)
    known = (RELEASED, "auto", *BACKEND_NAMES)
    try:
        for name in options.contenders.split(","):
            if backend_of(name) not in known or not set(name.split("+")[1:]) <= {"compile", "plain", "whole"}:
                raise unknown_name("--contenders", name, known)
        for name in options.precisions.split(","):
            if name not in PRECISIONS:
                raise unknown_name("--precisions", name, PRECISIONS)
        for name in options.model.split(","):
            if name not in FORMS:
                raise unknown_name("--model", name, FORMS)
            if options.size is not None and options.size not in SIZES[name]:
                raise unknown_name("--size", options.size, SIZES[name])
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the file."""
    options = parse(arguments)
    device = pick_device(options.device)
    # past the limit of recompilations Dynamo would run a contender eagerly and its row would say "compile"
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if options.threads:
        torch.set_num_threads(options.threads)
    pairs = read_pairs(options.frames or BATCHES[device.type])
    max_frames = max(frames for frames, _ in pairs)
    peaks = {name: measured_peak(device, name) for name in precisions(options)}
    rows: list[dict[str, Any]] = []
    cases = [
        Case(model, frames, batch, options.whole, options.size or DEFAULT_SIZES[model])
        for model in options.model.split(",")
        for frames, batch in pairs
    ]
    for case in cases:
        try:
            rows += measure_case(case, options, max_frames, device, peaks)
        except Exception as error:  # the batch itself does not fit
            names = [(name, key) for name in options.contenders.split(",") for key in precisions(options)]
            rows += [
                {**asdict(case), "contender": name, "precision": key, "failed": cause(error)} for name, key in names
            ]
        print(f"{case.model}, {case.frames} frames, batch {case.batch}: measured", file=sys.stderr)
        # after every case, so that a run that is stopped leaves what it measured
        result = {"rows": rows, "attention": chosen_backends(), "peaks": peaks}
        write_result(options.output, device, vars(options), result)
    print(table(rows, device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
