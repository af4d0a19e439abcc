"""The curriculum result of the paper's Table 4 and Figure 4, on a small data set: accuracy against training hours.

    python benchmarks/curriculum.py                          # the demo's rendered clips, five rows, three seeds
    python benchmarks/curriculum.py --train own.jsonl --test held_out.jsonl --clips 20000 --seeds 0 1 2

Trains the rows 1, 4, 1=>4, 8 and 1=>4=>8 with the same budget of clips (to within a batch of each stage) from the same
seeds, evaluates each at the end at its last number of frames, and writes curriculum.json, curriculum.md and
curriculum.svg. Runs lie under --work, one folder each: a finished one is not trained again, and the same command
continues a stopped one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import ROOT, pick_device, write_result
from frozen_fast.common.files import write_atomically
from frozen_fast.config import load_config
from frozen_fast.errors import UserError
from frozen_fast.profiling.paper import table_4

ROW_CONFIGS = {"1": "webvid_1", "4": "webvid_4", "1=>4": "webvid_1_4", "8": "webvid_8", "1=>4=>8": "webvid_1_4_8"}
"""The paper's row -> its experiment file, from which the shares of the stages come."""

FULL_ROW, CURRICULUM_ROW = "8", "1=>4=>8"
METRICS = {"t2v/R@1": "R@1", "t2v/Geom": "geometric mean of R@1, 5, 10", "twin_accuracy": "twins told apart"}
STOPPED = 75


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path("data/demo")
    parser.add_argument("--train", type=Path, default=demo / "train_videos.jsonl", help="manifest of training clips")
    parser.add_argument("--test", type=Path, default=demo / "test.jsonl", help="manifest of held-out clips")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml", help="model, optimizer and so on")
    parser.add_argument("--clips", type=int, default=18000, help="clips that every row sees in training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROW_CONFIGS), choices=list(ROW_CONFIGS), metavar="ROW")
    parser.add_argument(
        "--batch-sizes",
        default="1=48,4=32,8=32",
        metavar="FRAMES=SIZE,..",
        help="clips per step for each number of frames; an equal budget of clips means as many steps where they agree",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/curriculum"), help="run folders")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the result files go")
    parser.add_argument("--name", default="curriculum", help="of the result files")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config, for every run")
    return parser.parse_args(arguments)


def stages_of(row: str, batch_sizes: dict[int, int]) -> list[dict[str, Any]]:
    """A row's stages with the shares of the paper's experiment file and these batch sizes.

    Raises:
        UserError: a number of frames has no batch size.
    """
    config = load_config(ROOT / "configs/pretrain" / f"{ROW_CONFIGS[row]}.yaml")
    stages = []
    for stage in config.curriculum.stages:
        if stage.frames not in batch_sizes:
            raise UserError(f"--batch-sizes: got none for {stage.frames} frames; allowed: one for each of 1, 4, 8")
        size = batch_sizes[stage.frames]
        stages.append({"frames": stage.frames, "global_batch_size": size, "share": stage.share})
    return stages


def parse_batch_sizes(text: str) -> dict[int, int]:
    """Read 1=48,4=32 as {1: 48, 4: 32}."""
    try:
        sizes = {int(frames): int(size) for frames, _, size in (entry.partition("=") for entry in text.split(","))}
    except ValueError:
        sizes = {}
    if not sizes or min(sizes.values()) < 2:
        raise UserError(f"--batch-sizes: got {text!r}; allowed: FRAMES=SIZE,.. with sizes from 2")
    return sizes


def folder_of(options: argparse.Namespace, row: str, seed: int) -> Path:
    """The run folder of a row and a seed."""
    return options.work / f"{ROW_CONFIGS[row]}_seed{seed}"


def overrides_of(options: argparse.Namespace, row: str, seed: int) -> list[str]:
    """What turns --config into one run."""
    train = {"name": "clips", "path": str(options.train), "split": "", "captions": "random"}
    test = {"name": "held_out", "path": str(options.test), "split": "", "captions": "all"}
    return [
        f"name=curriculum_{ROW_CONFIGS[row]}_seed{seed}",
        f"run_folder={json.dumps(str(folder_of(options, row, seed)))}",
        f"seed={seed}",
        f"data.sources=[{json.dumps(train)}]",
        f"evaluation.sources=[{json.dumps(test)}]",
        "evaluation.every=end",
        f"curriculum.budget_clips={options.clips}",
        f"curriculum.stages={json.dumps(stages_of(row, parse_batch_sizes(options.batch_sizes)))}",
        "optimizer.schedule=constant",  # as in the paper; a decaying rate would leave the later stages the small ones
        *options.overrides,
    ]


def state_of(folder: Path) -> str:
    """What status.json says of a run: none, running, done, stopped or failed."""
    try:
        return str(json.loads((folder / "status.json").read_text(encoding="utf-8")).get("state"))
    except (OSError, ValueError):
        return "none"


def run(options: argparse.Namespace, row: str, seed: int) -> int:
    """Train and evaluate one row from one seed unless that is done; the exit code."""
    folder = folder_of(options, row, seed)
    if state_of(folder) == "done":
        print(f"row {row}, seed {seed}: done already in {folder}", flush=True)
        return 0
    print(f"row {row}, seed {seed}: trains in {folder}", flush=True)
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(options.config), "--resume", "auto"]
    environment = {**os.environ, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    process = subprocess.Popen([*command, *overrides_of(options, row, seed)], env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # a second signal to a run that has got it changes nothing
        process.wait()
        return STOPPED


def measured(folder: Path) -> dict[str, Any]:
    """What a finished run says: hours of its stages, clips, and the metrics of its last evaluation.

    The hours are wall time x processes of training, waiting for data, warm-up and checkpoints; evaluation is apart.
    """
    stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    stages = stages["stages"] if isinstance(stages, dict) else stages
    evaluations = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["evaluations"]
    last = [entry for entry in evaluations if entry["protocol"] != "v2t_max_over_captions"][-1]
    return {
        "hours": sum(stage["gpu_hours"] for stage in stages),
        "clips": sum(stage["clips"] for stage in stages),
        "frames": last["frames"],
        "queries": last["num_queries"],
        "metrics": {name: last["metrics"][name] for name in METRICS if name in last["metrics"]},
        "one_frame_ceiling": last["metrics"].get("one_frame_ceiling"),
    }


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a row: hours and metrics as mean and spread over the seeds, beside the paper's hours."""
    entries = []
    for row in dict.fromkeys(entry["row"] for entry in runs):
        own = [entry for entry in runs if entry["row"] == row]
        names = [name for name in METRICS if all(name in entry["metrics"] for entry in own)]
        entries.append(
            {
                "row": row,
                "seeds": len(own),
                "clips": statistics.fmean(entry["clips"] for entry in own),
                "hours": mean_and_spread([entry["hours"] for entry in own]),
                "paper_hours": table_4().row(row).ptt_hours,
                "metrics": {name: mean_and_spread([entry["metrics"][name] for entry in own]) for name in names},
            }
        )
    return entries


def finding(runs: list[dict[str, Any]]) -> str:
    """The paper's claim as a question to these runs: the curriculum against 8 frames throughout, paired by seed."""
    full = {entry["seed"]: entry for entry in runs if entry["row"] == FULL_ROW}
    staged = {entry["seed"]: entry for entry in runs if entry["row"] == CURRICULUM_ROW}
    seeds = sorted(full.keys() & staged.keys())
    if not seeds:
        return f"Rows {FULL_ROW} and {CURRICULUM_ROW} have no seed in common: nothing to compare."
    share = statistics.fmean(staged[seed]["hours"] / full[seed]["hours"] for seed in seeds)
    table = table_4()
    paper = table.row(CURRICULUM_ROW).ptt_hours / table.row(FULL_ROW).ptt_hours
    text = f"{CURRICULUM_ROW} takes {share:.2f} of the hours of {FULL_ROW} throughout (paper: {paper:.2f})."
    for name, words in METRICS.items():
        if all(name in group[seed]["metrics"] for group in (full, staged) for seed in seeds):
            differences = [staged[seed]["metrics"][name] - full[seed]["metrics"][name] for seed in seeds]
            mean, spread = mean_and_spread(differences)
            error = f" (standard error {spread / math.sqrt(len(seeds)):.1f})" if len(seeds) > 1 else ""
            text += f" {words[0].upper()}{words[1:]}: {mean:+.1f} points{error}."
    return f"{text} Mean differences over {len(seeds)} seeds."


def markdown(entries: list[dict[str, Any]], runs: list[dict[str, Any]], unit: str) -> str:
    """The table, the finding, and what was held equal."""
    names = [name for name in METRICS if all(name in entry["metrics"] for entry in entries)]
    reference = next((entry for entry in entries if entry["row"] == FULL_ROW), None)
    header = ["frames", "clips", unit, "of row 8", "of row 8, paper", *(METRICS[name] for name in names)]
    lines = [" | ".join(["", *header, ""]).strip(), "|" + "---|" * len(header)]
    for entry in entries:
        own, printed = "", ""
        if reference is not None:
            own = f"{entry['hours'][0] / reference['hours'][0]:.2f}"
            printed = f"{entry['paper_hours'] / reference['paper_hours']:.2f}"
        cells = [entry["row"].replace("=>", " => "), f"{entry['clips']:,.0f}", _with_spread(entry["hours"], 3)]
        cells += [own, printed, *(_with_spread(entry["metrics"][name], 1) for name in names)]
        lines.append(" | ".join(["", *cells, ""]).strip())
    seeds = ", ".join(str(seed) for seed in sorted({entry["seed"] for entry in runs}))
    ceiling = runs[0].get("one_frame_ceiling")
    notes = f"Seeds {seeds}; mean +- standard deviation. Metrics in percent, {runs[0]['queries']} held-out captions."
    if ceiling is not None:
        notes += f" One frame at best: R@1 {ceiling:.1f}, twins 50."
    return "\n".join([*lines, "", finding(runs), "", notes, ""])


def _with_spread(value: tuple[float, float], digits: int) -> str:
    return f"{value[0]:.{digits}f} +- {value[1]:.{digits}f}"


def plot(entries: list[dict[str, Any]], unit: str, path: Path) -> None:
    """Figure 4 of the paper: accuracy against hours, a point a row, error bars over the seeds."""
    names = [name for name in ("t2v/Geom", "twin_accuracy") if all(name in entry["metrics"] for entry in entries)]
    plt.rcParams.update({"svg.hashsalt": "frozen_fast", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=(4.6 * max(1, len(names)), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        for entry in entries:
            (hours, hours_spread), (value, spread) = entry["hours"], entry["metrics"][name]
            staged = "=>" in entry["row"]
            axis.errorbar(
                hours,
                value,
                xerr=hours_spread,
                yerr=spread,
                marker="o" if staged else "s",
                capsize=3,
                color="#c2410c" if staged else "#1d4ed8",
            )
            axis.annotate(entry["row"].replace("=>", "⇒"), (hours, value), (6, 6), textcoords="offset points")
        axis.set_xlabel(unit)
        axis.set_ylabel(f"{METRICS[name]} (%)")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Train what is not trained yet and write the result files; 75 when stopped, to be continued."""
    options = parse_arguments(arguments)
    try:
        if not options.train.exists() and options.train.parent == Path("data/demo"):
            subprocess.run([sys.executable, str(ROOT / "launch/render_demo.py"), "--folder", "data/demo"], check=True)
        runs = []
        for seed in options.seeds:  # a stopped benchmark then has whole seeds of all rows
            for row in options.rows:
                code = run(options, row, seed)
                if code == STOPPED:
                    return STOPPED
                if code:
                    raise UserError(f"row {row}, seed {seed}: ended with exit code {code}; its messages are above")
                runs.append({"row": row, "seed": seed, **measured(folder_of(options, row, seed))})
        device = pick_device("auto")
        unit = "GPU-hours" if device.type == "cuda" else "process-hours"
        entries = summary(runs)
        text = markdown(entries, runs, unit)
        plot(entries, unit, options.output / f"{options.name}.svg")
        write_atomically(options.output / f"{options.name}.md", text)
        result = {"unit": unit, "rows": entries, "finding": finding(runs), "runs": runs}
        write_result(options.output / f"{options.name}.json", device, vars(options), result)
        print(text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
