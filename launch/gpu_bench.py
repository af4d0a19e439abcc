"""All benchmarks and tests that need a GPU, in one command with a time limit; started by gpu_bench.sh.

    launch/gpu_bench.sh [FOLDER]                     on a GPU: all steps, at most nine minutes
    launch/gpu_bench.sh --cpu FOLDER                 the same lines at tiny sizes (also taken, and said, without a GPU)
    launch/gpu_bench.sh --steps training FOLDER      some steps only
    launch/gpu_bench.sh --rehearse attention=hang@5,model_step=oom@3 FOLDER
                                                     on a CPU; a device fails in these steps after SECONDS

Each step is a process of its own with a log and a time limit; one that fails is recorded in summary.json, and the
next one starts. Time that a step leaves over goes to the steps after it. The figures that count most come first. What a
step has written is copied into the folder every few seconds, so that whatever ends the command, what was measured is
there. The folder gets at most eight flat files: summary.json (steps, what was left out and why, the machine), the
steps' results, logs.txt (the training run's report in it).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_bench_machine import describe_machine, left_out, write_text_tower

from frozen_fast.common.files import write_atomically, write_json
from frozen_fast.sweep.outcome import classify, telling_line
from frozen_fast.sweep.process import run_limited

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 530.0
"""The whole command; under nine minutes, what ending the last step takes included."""
LOG_CHARACTERS = 200_000
"""Of each step's log, the end is kept."""
FILE_BYTES = 16 << 20
"""A lent machine hands back no larger file."""
STOP_SECONDS = 25.0
"""A training run that is told to stop saves a checkpoint and its report first."""
KEEP_SECONDS = 2.0
"""How often what a running step has written is copied into the results folder."""
FAULTS = ("crash", "hang", "oom", "kill")
"""What a device can do in a rehearsal: see failing_step.py; kill ends this whole command."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every step's command depends on.

    Attributes:
        scratch: a folder for what is not kept.
        small: tiny sizes, for a machine without a GPU.
        machine: what describe_machine() found; empty where that failed.
        text: a folder with a tokenizer, and a tiny text tower for small runs.
    """

    scratch: Path
    small: bool
    machine: dict[str, Any]
    text: Path

    @property
    def reads_videos(self) -> bool:
        """Whether clips can be encoded and read here."""
        return "pyav" not in self.machine.get("missing_decoders", {"pyav": ""})

    @property
    def attention(self) -> list[str]:
        """The attention backends to compare."""
        missing = self.machine.get("missing_attention", {})
        return [name for name in ("reference", "sdpa", "xformers", "triton") if name not in missing]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: its command, made when its turn comes, and the files it leaves in the scratch folder.

    Attributes:
        name: in summary.json and of its log.
        seconds: what it may take, beside what earlier steps left over.
        command: made from the bench.
        results: file in the scratch folder -> name in the results folder.
        environment: variables.
        before: a command that prepares it, in the same time.
        logged: files in the scratch folder that are added to its log.
        left_out: why it cannot run here; empty if it can.
    """

    name: str
    seconds: float
    command: Callable[[Bench], list[str]]
    results: dict[str, str] = field(default_factory=dict)
    environment: Callable[[Bench], dict[str, str]] = lambda bench: {}
    before: Callable[[Bench], list[str]] | None = None
    logged: tuple[str, ...] = ()
    left_out: Callable[[Bench], str] = lambda bench: ""


@dataclass(kw_only=True)
class Row:
    """What became of a step."""

    step: str
    cause: str
    message: str = ""
    exit_code: int | None = None
    seconds: float = 0.0
    limit_seconds: float = 0.0
    command: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def tests_command(bench: Bench) -> list[str]:
    """tests/gpu in several processes, since each compiles kernels; every result is written when it is there."""
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") and not bench.small else []
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "pytest_results",
        *parallel,
        "tests/gpu",
    ]


def tests_environment(bench: Bench) -> dict[str, str]:
    """On a GPU a test that is skipped for want of CUDA fails."""
    folders = [str(ROOT / "launch"), *filter(None, [os.environ.get("PYTHONPATH")])]
    results = {"PYTEST_RESULTS": str(bench.scratch / "gpu_tests.jsonl"), "PYTHONPATH": os.pathsep.join(folders)}
    return results if bench.small else {**results, "FAIL_WITHOUT_CUDA": "1"}


def attention_command(bench: Bench) -> list[str]:
    """The attention table: the paper's batches, and ones that fill a large GPU (512 passes the grid limit)."""
    sizes = ["--frames", "1=96,1=512,4=128,8=64"]
    if bench.small:
        sizes = ["--frames", "1=4,4=2", "--patches", "4", "--heads", "2", "--head-width", "16", "--device", "cpu"]
    return [sys.executable, "benchmarks/attention.py", "--output", str(bench.scratch / "attention"), *sizes]


def model_step_command(bench: Bench) -> list[str]:
    """The table of whole steps: the released code, each attention backend, and two of them compiled."""
    output = ["--output", str(bench.scratch / "model_step.json")]
    if bench.small:
        sizes = ["--size", "pico_patch16_32", "--frames", "1=4,4=2", "--contenders", "released,sdpa", "--device", "cpu"]
        windows = ["--precisions", "fp32", "--windows", "2", "--window-seconds", "0.02", "--warmup", "1"]
        return [sys.executable, "benchmarks/model_step.py", *sizes, *windows, *output]
    contenders = ["released", *bench.attention, "sdpa+compile", "auto+compile"]
    sizes = ["--whole", "--frames", "4=64,1=256,8=32", "--contenders", ",".join(contenders)]
    windows = ["--precisions", "bf16", "--windows", "5", "--window-seconds", "0.3"]
    return [sys.executable, "benchmarks/model_step.py", *sizes, *windows, *output]


def common_overrides(bench: Bench) -> list[str]:
    """The tokenizer made here; in small runs the tiny text tower and the CPU too."""
    tower = [f"model.text.name={bench.text}", "model.text.weights=random", "training.device=cpu"] if bench.small else []
    return [*tower, f"model.text.tokenizer={bench.text}"]


def clips_command(bench: Bench) -> list[str]:
    """Clips and shards of them for both throughput steps; without a video encoder stills."""
    kind = "shards" if bench.reads_videos else "stills"
    return [
        sys.executable,
        "benchmarks/clips.py",
        kind,
        str(bench.scratch / "clips"),
        *(["--small"] if bench.small else []),
    ]


def throughput_command(bench: Bench, name: str, *, dali: bool) -> list[str]:
    """Projected GPU-hours of the row 1=>4=>8 from shards, or from videos through DALI; without videos the model's."""
    if bench.small:
        size = ["--small", "--windows", "2", "--window-steps", "1", "--warmup-steps", "1"]
    else:
        size = ["--batch-sizes", "1=512,4=128,8=64", "--window-seconds", "1.5", "--measure-peak"]
    folder = bench.scratch / "clips"
    data = ["--data", str(folder / ("clips/clips.jsonl" if dali else "packed"))]
    if not bench.reads_videos:
        data = ["--data", str(folder / "stills/stills.jsonl"), "--modes", "model"]
    backend = ["data.decode.backend=dali", "data.decode.workers=0"] if dali else []
    return [
        sys.executable,
        "benchmarks/throughput.py",
        "--rows",
        "1=>4=>8",
        *data,
        *size,
        "--output",
        str(bench.scratch / name),
        *common_overrides(bench),
        *backend,
    ]


def without_dali(bench: Bench) -> str:
    """Why nothing can be measured through DALI here; empty if it can."""
    if not bench.reads_videos:
        return "no video encoder"
    return str(bench.machine.get("missing_decoders", {}).get("dali", ""))


def render_command(bench: Bench) -> list[str]:
    """Clips for the training run: the demo's, or stills where no video encoder is installed."""
    folder = str(bench.scratch / "training_data")
    if not bench.reads_videos:
        return [sys.executable, "benchmarks/clips.py", "stills", folder]
    counts = ["--train-pairs", "10", "--test-pairs", "10", "--stills", "2"] if bench.small else ["--stills", "0"]
    processes = str(min(16, os.cpu_count() or 1))
    return [sys.executable, "launch/render_demo.py", "--folder", folder, *counts, "--processes", processes]


def training_command(bench: Bench) -> list[str]:
    """A run of the curriculum through Accelerate."""
    data = bench.scratch / "training_data"
    manifest = data / ("train_videos.jsonl" if bench.reads_videos else "stills/stills.jsonl")
    sources = f"[{{name: clips, path: {json.dumps(str(manifest))}, split: train}}]"
    held_out = f"[{{name: held_out, path: {json.dumps(str(data / 'test.jsonl'))}, split: test}}]"
    evaluation = f"evaluation.sources={held_out}" if bench.reads_videos else "evaluation.every=never"
    tiny = [
        "model.video.size=pico_patch16_32",
        "data.decode.workers=0",
        "data.augmentation.horizontal_flip=0.0",
        "curriculum.stages=[{frames: 1, global_batch_size: 4, steps: 3}, {frames: 4, global_batch_size: 4, steps: 3}, "
        "{frames: 8, global_batch_size: 4, steps: 3}]",
    ]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        *(["--cpu"] if bench.small else []),
        "train.py",
        "--config",
        "configs/benchmarks/gpu_bench.yaml",
        f"run_folder={bench.scratch / 'training'}",
        f"data.sources={sources}",
        evaluation,
        *common_overrides(bench),
        *(tiny if bench.small else []),
    ]


STEPS = (
    Step(name="attention", seconds=70.0, command=attention_command, results={"attention": "attention.json"}),
    Step(
        name="throughput_shards",
        seconds=115.0,
        before=clips_command,
        command=lambda bench: throughput_command(bench, "throughput_shards", dali=False),
        results={"throughput_shards/throughput.json": "throughput_shards.json"},
    ),
    Step(
        name="throughput_dali",
        seconds=75.0,
        command=lambda bench: throughput_command(bench, "throughput_dali", dali=True),
        results={"throughput_dali/throughput.json": "throughput_dali.json"},
        left_out=without_dali,
    ),
    Step(name="model_step", seconds=110.0, command=model_step_command, results={"model_step.json": "model_step.json"}),
    Step(
        name="gpu_tests",
        seconds=60.0,
        command=tests_command,
        results={"gpu_tests.jsonl": "gpu_tests.jsonl"},
        environment=tests_environment,
    ),
    Step(
        name="training",
        seconds=80.0,
        before=render_command,
        command=training_command,
        results={"training/stages.json": "training_stages.json"},
        logged=("training/report.md",),
    ),
)
"""In the order in which a lease that ends early should lose them last."""


def run_step(step: Step, bench: Bench, output: Path, *, limit: float, fault: str = "") -> Row:
    """Run a step, and copy its results to the results folder meanwhile; its row contains any failure."""
    row = Row(step=step.name, cause="ok", limit_seconds=round(limit, 1))
    reason = step.left_out(bench)
    if reason:
        row.cause, row.message = "left_out", reason
        return row
    print(f"[gpu_bench] {step.name}: up to {limit:.0f} s", flush=True)
    started = time.monotonic()
    log = bench.scratch / f"{step.name}.log"
    commands = [step.before(bench)] if step.before else []
    with kept_while_running(step, bench, output):
        for number, command in enumerate([*commands, step.command(bench)]):
            part = bench.scratch / f"{step.name}_{number}.part"
            row.command = command
            if fault and number == len(commands):
                command = [sys.executable, str(ROOT / "launch/failing_step.py"), fault, str(os.getpid()), *command]
            result = run_limited(
                command,
                folder=ROOT,
                environment={"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **step.environment(bench)},
                log=part,
                seconds=max(1.0, limit - (time.monotonic() - started)),
                memory_bytes=None,
                grace_seconds=STOP_SECONDS,
            )
            text = part.read_text(encoding="utf-8", errors="replace")
            with log.open("a", encoding="utf-8") as joined:
                joined.write(f"$ {' '.join(command)}\n{text}\n")
            row.exit_code = result.exit_code
            row.cause = classify(result.exit_code, text, timed_out=result.timed_out, over_memory=False)
            if row.cause != "ok":
                row.message = telling_line(text)
                break
    add_to_log(log, [bench.scratch / name for name in step.logged])
    row.seconds = round(time.monotonic() - started, 1)
    return row


def add_to_log(log: Path, files: Sequence[Path]) -> None:
    """Append files that are there."""
    with log.open("a", encoding="utf-8") as joined:
        for path in files:
            if path.is_file():
                joined.write(f"-- {path.name}\n{path.read_text(encoding='utf-8', errors='replace')}\n")


@contextmanager
def kept_while_running(step: Step, bench: Bench, output: Path) -> Iterator[None]:
    """Copy what the step has written every few seconds, in a thread."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(KEEP_SECONDS):
            for source, target in step.results.items():
                copy_result(bench.scratch / source, output / target)

    thread = threading.Thread(target=work, name=f"keep-{step.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def copy_result(source: Path, target: Path) -> str:
    """Copy a result file, whole or not at all; returns why it was not copied, or nothing."""
    path = next(iter(sorted(source.glob("*.json"))), source / "missing.json") if source.is_dir() else source
    if not path.is_file():
        return f"left no {source.name}"
    if path.stat().st_size >= FILE_BYTES:
        return f"{target.name} is larger than {FILE_BYTES >> 20} MiB and was not kept"
    part = target.with_suffix(".part")
    shutil.copyfile(path, part)
    part.replace(target)
    return ""


def keep_results(step: Step, row: Row, bench: Bench, output: Path) -> None:
    """Copy a step's files into the results folder; a step that should have left one and did not has failed."""
    for source, target in step.results.items():
        problem = "" if row.cause == "left_out" else copy_result(bench.scratch / source, output / target)
        if problem.startswith("left no") and row.cause == "ok":
            row.cause, row.message = "crash", problem
        elif problem and row.cause == "ok":
            row.message = problem
        if (output / target).is_file():
            row.files.append(target)


def run(options: argparse.Namespace) -> int:
    """All steps, then the summary; 0 where every step went well, otherwise 1."""
    deadline = time.monotonic() + options.seconds
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_bench_", ignore_cleanup_errors=True) as scratch:
        machine = describe_machine(ROOT, Path(scratch) / "environment.log")
        small = options.cpu or options.rehearse is not None or machine.get("cuda_device") is None
        if small and not options.cpu and options.rehearse is None:
            print("[gpu_bench] no CUDA device here: tiny sizes on the CPU, and no figure counts", flush=True)
        text = write_text_tower(Path(scratch) / "text")
        bench = Bench(scratch=Path(scratch), small=small, machine=machine, text=text)
        chosen = [step for step in STEPS if step.name in options.steps]
        rows: list[Row] = []
        for number, step in enumerate(chosen):
            later = sum(other.seconds for other in chosen[number + 1 :])
            limit = deadline - time.monotonic() - later
            rows.append(run_step(step, bench, output, limit=max(limit, 1.0), fault=options.faults.get(step.name, "")))
            keep_results(step, rows[-1], bench, output)
            print(
                f"[gpu_bench] {step.name}: {rows[-1].cause} after {rows[-1].seconds} s {rows[-1].message}", flush=True
            )
            write_summary(output, bench, rows, chosen, options)
            join_logs(bench.scratch, output / "logs.txt")
    return 0 if all(row.cause in ("ok", "left_out") for row in rows) else 1


def write_summary(
    output: Path, bench: Bench, rows: Sequence[Row], chosen: Sequence[Step], options: argparse.Namespace
) -> None:
    """summary.json; written after every step, so that a lease that ends early still leaves one."""
    done = {row.step for row in rows}
    missing = left_out(bench.machine, reads_videos=bench.reads_videos)
    missing.update({step.name: "not requested (--steps)" for step in STEPS if step not in chosen})
    missing.update({step.name: "not started" for step in chosen if step.name not in done})
    summary = {
        "command": ["launch/gpu_bench.sh", *options.arguments],
        "small": bench.small,
        "note": "tiny sizes on a CPU: shows that the lines run; no figure counts" if bench.small else "",
        "steps": [asdict(row) for row in rows],
        "left_out": missing,
        "machine": bench.machine,
    }
    write_json(output / "summary.json", summary)


def join_logs(scratch: Path, target: Path) -> None:
    """The end of every step's log, one after the other."""
    parts = []
    for log in sorted(scratch.glob("*.log"), key=lambda path: path.stat().st_mtime):
        text = log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
        parts.append(f"==== {log.stem}\n{text}\n")
    write_atomically(target, "\n".join(parts))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OUT") or "runs/gpu_bench"
    names = [step.name for step in STEPS]
    parser.add_argument("output", nargs="?", type=Path, default=Path(default), help="results ($OUT or runs/gpu_bench)")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU, even if there is a GPU")
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const="",
        metavar="STEP=FAULT@SECONDS,...",
        help=f"as --cpu, with faults of a device: {', '.join(FAULTS)}",
    )
    parser.add_argument("--steps", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything (default %(default)s)")
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    options.output = options.output.resolve()
    options.steps = options.steps.split(",")
    unknown = [name for name in options.steps if name not in names]
    if unknown:
        parser.error(f"--steps: got {unknown[0]!r}; allowed: {', '.join(names)}")
    options.faults = {}
    for text in filter(None, (options.rehearse or "").split(",")):
        step, _, fault = text.partition("=")
        kind, _, seconds = fault.partition("@")
        if step not in names or kind not in FAULTS or not seconds.replace(".", "", 1).isdigit():
            allowed = f"STEP=FAULT@SECONDS with {', '.join(names)} and {', '.join(FAULTS)}"
            parser.error(f"--rehearse: got {text!r}; allowed: {allowed}")
        options.faults[step] = fault
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return run(parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
