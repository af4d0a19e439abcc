"""GPU-hours of the rows of the paper's Table 4 on this machine, from measured windows.

    python benchmarks/throughput.py                                    all rows, clips it renders itself
    python benchmarks/throughput.py --rows "1=>4=>8" --data clips.jsonl --output results/h200
    python benchmarks/throughput.py --small --modes model,end_to_end    a smoke run for a CPU, marked as such
    python benchmarks/throughput.py --compare reference,sdpa,xformers,triton --batch-sizes 1=512,4=128,8=64

Each stage (frames, batch size, attention backend) is measured once, in `accelerate launch` processes of its own
(throughput_stage.py): the model alone on a synthetic batch, the input alone, and both end to end from encoded clips.
Batch sizes and shares are those of configs/pretrain/webvid_*.yaml. What comes out are projections from measured
windows to the 2.5 million clips of a row: throughput.json, report.md, report.html and a plot in --output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clips import DATA, data_manifest
from throughput_report import write_throughput_report

from frozen_fast.common.files import write_atomically, write_json
from frozen_fast.config import load_config
from frozen_fast.errors import UserError
from frozen_fast.profiling.paper import HARDWARE_NOTE, table_4
from frozen_fast.sweep.outcome import classify, telling_line
from frozen_fast.sweep.process import free_port, run_limited

ROOT = Path(__file__).resolve().parent.parent
ROW_CONFIGS = {
    "1": "webvid_1.yaml",
    "4": "webvid_4.yaml",
    "1=>4": "webvid_1_4.yaml",
    "8": "webvid_8.yaml",
    "1=>4=>8": "webvid_1_4_8.yaml",
}
MODES = ("model", "input", "end_to_end")
SMALL = ("model.video.size=nano_patch16_64",)
SMALL_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class StageKey:
    """What is measured once, whichever rows need it."""

    frames: int
    batch_size: int
    attention: str


def row_stages(rows: Sequence[str]) -> dict[str, list[tuple[int, int, float]]]:
    """Each row's (frames, batch size, share of the clips), from its experiment file."""
    stages = {}
    for row in rows:
        config = load_config(ROOT / "configs/pretrain" / ROW_CONFIGS[row])
        assert config.paper_row == row, f"{ROW_CONFIGS[row]} says paper_row {config.paper_row}"
        stages[row] = [(s.frames, s.global_batch_size, float(s.share or 0.0)) for s in config.curriculum.stages]
    return stages


def with_batch_sizes(
    stages: dict[str, list[tuple[int, int, float]]], given: dict[int, int], small: bool
) -> dict[str, list[tuple[int, int, float]]]:
    """The rows with other batch sizes: those given by frames, and a small one for all in a smoke run."""

    def size(frames: int, batch_size: int) -> int:
        return given.get(frames, SMALL_BATCH if small else batch_size)

    return {row: [(f, size(f, b), share) for f, b, share in entries] for row, entries in stages.items()}


def settings(options: argparse.Namespace, manifest: Path, attention: str) -> list[str]:
    """Overrides that make the experiment file what is measured: its model and engine on these clips."""
    return [
        f"model.video.attention={attention}",
        *(SMALL if options.small else ()),
        f"data.sources=[{{name: clips, format: manifest, path: {json.dumps(str(manifest))}, split: train}}]",
        "model.video.weights=none",
        "model.text.weights=random",
        f"model.text.max_tokens={options.text_tokens}",
        "evaluation.sources=[]",
        *options.overrides,
    ]


def launched(options: argparse.Namespace, script: Path, *arguments: str) -> list[str]:
    """The command that starts a script on the processes that --accelerate names."""
    config_file = ["--config_file", str(options.accelerate)] if options.accelerate else []
    port = ["--main_process_port", str(free_port())]
    return [sys.executable, "-m", "accelerate.commands.launch", *config_file, *port, str(script), *arguments]


def measure_stage(key: StageKey, options: argparse.Namespace, manifest: Path, folder: Path) -> dict[str, Any]:
    """Measure one stage in processes of its own; a failure is a result with its cause."""
    name = f"T{key.frames}_B{key.batch_size}_{key.attention}"
    output = folder / f"{name}.json"
    windows = ["--windows", str(options.windows), "--warmup-steps", str(options.warmup_steps)]
    windows += ["--window-steps", str(options.window_steps)] if options.window_steps else []
    command = launched(
        options,
        ROOT / "benchmarks/throughput_stage.py",
        "--config",
        str(options.config),
        "--frames",
        str(key.frames),
        "--batch-size",
        str(key.batch_size),
        "--modes",
        ",".join(options.modes),
        "--window-seconds",
        str(options.window_seconds),
        *windows,
        "--text-tokens",
        str(options.text_tokens),
        *(["--measure-peak"] if options.measure_peak else []),
        "--output",
        str(output),
        *settings(options, manifest, key.attention),
    )
    log = folder / f"{name}.log"
    result = run_limited(
        command,
        folder=Path.cwd(),
        environment={"HF_HUB_OFFLINE": "1"},
        log=log,
        seconds=options.stage_seconds,
        memory_bytes=None,
    )
    identity = {"frames": key.frames, "batch_size": key.batch_size, "attention": key.attention}
    text = log.read_text(errors="replace")
    cause = classify(result.exit_code, text, timed_out=result.timed_out, over_memory=False)
    if cause == "refused":
        raise UserError(telling_line(text).removeprefix("error: "))
    if cause != "ok":
        write_atomically(options.logs / log.name, text)
        return {**identity, "cause": cause, "message": telling_line(text)}
    return {**json.loads(output.read_text()), **identity, "cause": "ok"}


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured and for how long; throughput_agreement.py measures its stages in the same way."""
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs/benchmarks/throughput.yaml",
        help="experiment file whose model, engine and decoding are measured",
    )
    parser.add_argument("--accelerate", type=Path, help="Accelerate config file")
    parser.add_argument("--data", default="render", help=DATA)
    parser.add_argument("--windows", type=int, default=5, help="measured windows per mode, at least 5 for a result")
    parser.add_argument("--window-seconds", type=float, default=5.0, help="length of a window")
    parser.add_argument("--window-steps", type=int, help="steps of a window, instead of its length")
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--text-tokens", type=int, default=32, help="tokens of a synthetic caption")
    parser.add_argument("--stage-seconds", type=float, default=900.0, help="limit for one stage's processes")
    parser.add_argument("--measure-peak", action="store_true", help="MFU against a peak measured here too")
    parser.add_argument("--small", action="store_true", help="a tiny model and batch: exercises every line on a CPU")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="keys of the experiment file")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="all", help=f"comma-separated rows of Table 4: {', '.join(ROW_CONFIGS)}")
    parser.add_argument("--modes", default=",".join(MODES), help=f"some of {','.join(MODES)}")
    parser.add_argument("--compare", default="auto", help="attention backends side by side, comma-separated")
    parser.add_argument("--batch-sizes", default="", help="FRAMES=CLIPS,...: other batch sizes than the paper's")
    parser.add_argument("--output", type=Path, default=Path("runs/throughput"))
    add_stage_arguments(parser)
    options = parser.parse_args(arguments)
    options.rows = list(ROW_CONFIGS) if options.rows == "all" else options.rows.split(",")
    options.modes, options.logs = options.modes.split(","), options.output / "logs"
    for field, values, allowed in (("--rows", options.rows, ROW_CONFIGS), ("--modes", options.modes, MODES)):
        unknown = [value for value in values if value not in allowed]
        if unknown:
            parser.error(f"{field}: got {unknown[0]!r}; allowed: {', '.join(allowed)}")
    try:
        pairs = (pair.split("=") for pair in options.batch_sizes.split(",") if pair)
        options.batch_sizes = {int(frames): int(size) for frames, size in pairs}
    except ValueError:
        parser.error(f"--batch-sizes: got {options.batch_sizes!r}; allowed: FRAMES=CLIPS,..., as in 1=512,4=128")
    return options


def run(options: argparse.Namespace) -> Path:
    """Measure every stage that the rows need, then write the result; returns report.md."""
    stages = with_batch_sizes(row_stages(options.rows), options.batch_sizes, options.small)
    needed = {(frames, size) for entries in stages.values() for frames, size, _ in entries}
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        manifest = data_manifest(options.data, Path(scratch), small=options.small)
        keys = [
            StageKey(frames=frames, batch_size=size, attention=attention)
            for (frames, size), attention in itertools.product(sorted(needed), options.compare.split(","))
        ]
        for number, key in enumerate(keys, start=1):
            print(f"[{number}/{len(keys)}] {key.frames} frames, batch {key.batch_size}, {key.attention}", flush=True)
            rows.append(measure_stage(key, options, manifest, Path(scratch)))
            if rows[-1]["cause"] != "ok":
                print(f"    {rows[-1]['cause']}: {rows[-1]['message']}", flush=True)
            report = write_measured(options, stages, rows)  # a run that is stopped leaves what it measured
    return report


def write_measured(options: argparse.Namespace, stages: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write the result of the stages measured so far; returns report.md."""
    result = {
        "command": ["python", "benchmarks/throughput.py", *sys.argv[1:]],
        "small": options.small,
        "data": options.data,
        "clips_per_row": table_4().clips,
        "paper_hardware": HARDWARE_NOTE,
        "row_stages": stages,
        "stages": rows,
    }
    write_json(options.output / "throughput.json", result)
    return write_throughput_report(options.output, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; 2 for a mistake in the arguments, the config or the data."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a stage's processes are in a session of their own
    try:
        report = run(options)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(report.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
