"""Comparison of runs: `frozen-fast compare RUN RUN ...`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frozen_fast.errors import UserError
from frozen_fast.report.document import (
    NOT_AVAILABLE,
    Table,
    count,
    duration,
    gibibytes,
    joules,
    number,
    percent,
    significant,
)
from frozen_fast.report.markdown import markdown_table
from frozen_fast.report.paper_comparison import compare_with_paper
from frozen_fast.report.run_data import RunData, read_run


def compare_runs(folders: Sequence[str | Path]) -> str:
    """Return Markdown with one column per run: measurements, and the settings in which the runs differ.

    Raises:
        UserError: fewer than two folders, or a folder without a run.
    """
    if len(folders) < 2:
        raise UserError(f"run folders: got {len(folders)}; allowed: two or more")
    runs = [read_run(folder) for folder in folders]
    names = _names(runs)
    parts = ["# Comparison of runs", markdown_table(Table(["", *names], _measured(runs)))]
    different = _differences(runs)
    parts.append("## Settings that differ")
    parts.append(markdown_table(Table(["Key", *names], different, words=1 + len(runs))) if different else "None.")
    for name, run in zip(names, runs, strict=True):
        notes = [*run.missing, *run.disagreements()]
        if notes:
            parts.append(f"{name}:\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _names(runs: list[RunData]) -> list[str]:
    """Experiment names, with the folder's name if two are equal."""
    names = [run.name for run in runs]
    return [f"{n} ({run.folder.name})" if names.count(n) > 1 else n for n, run in zip(names, runs, strict=True)]


def _measured(runs: list[RunData]) -> list[list[str]]:
    def line(label: str, of: Callable[[RunData], str]) -> list[str]:
        return [label, *(of(run) for run in runs)]

    rows = [
        line("state", lambda run: str(run.status.get("state", NOT_AVAILABLE))),
        line("devices", lambda run: ", ".join(dict.fromkeys(map(str, run.environment.get("devices", []))))),
        line("processes", lambda run: str(run.environment.get("world_size", NOT_AVAILABLE))),
        line("precision", lambda run: str(run.environment.get("precision", NOT_AVAILABLE))),
        line("commit", lambda run: str(run.environment.get("git_commit") or NOT_AVAILABLE)[:12]),
        line("steps", lambda run: count(len(run.steps))),
        line("clips", lambda run: count(sum(total.clips for total in run.totals()))),
        line("wall time", lambda run: duration(sum(row["seconds"] for row in run.stages) if run.stages else None)),
        line("device-hours", lambda run: significant(_sum(run.stages, "gpu_hours"))),
        line("device-hours, evaluation", lambda run: significant(_sum(run.stages, "evaluation_gpu_hours"))),
        line("paper's row, hours", _paper_hours),
        line("final loss", lambda run: number(run.totals()[-1].last_loss, 3) if run.steps else NOT_AVAILABLE),
        line("unreadable clips", lambda run: count(len(run.bad_clips))),
    ]
    for stage in range(max((len(run.totals()) for run in runs), default=0)):
        rows += _stage_lines(runs, stage)
    return rows + _retrieval_lines(runs)


def _stage_lines(runs: list[RunData], stage: int) -> list[list[str]]:
    def total(run: RunData, write: Callable[[Any], str]) -> str:
        found = next((total for total in run.totals() if total.stage == stage), None)
        return NOT_AVAILABLE if found is None else write(found)

    def row(run: RunData, write: Callable[[Any], str]) -> str:
        found = run.stage_row(stage)
        return NOT_AVAILABLE if found is None else write(found)

    label = f"stage {stage + 1}"
    return [
        [f"{label}: frames", *(total(run, lambda t: str(t.frames)) for run in runs)],
        [f"{label}: clips", *(total(run, lambda t: count(t.clips)) for run in runs)],
        [f"{label}: clips/s", *(total(run, lambda t: significant(t.clips_per_second)) for run in runs)],
        [f"{label}: stall", *(total(run, lambda t: percent(t.stall_share)) for run in runs)],
        [f"{label}: device-hours", *(row(run, lambda r: significant(r["gpu_hours"])) for run in runs)],
        [f"{label}: MFU, datasheet", *(row(run, lambda r: percent(r.get("mfu_datasheet"))) for run in runs)],
        [f"{label}: MFU, measured peak", *(row(run, lambda r: percent(r.get("mfu_measured_peak"))) for run in runs)],
        [f"{label}: peak memory", *(row(run, lambda r: gibibytes(r["peak_memory_bytes"])) for run in runs)],
        [f"{label}: energy", *(row(run, lambda r: joules(r.get("joules"))) for run in runs)],
    ]


def _retrieval_lines(runs: list[RunData]) -> list[list[str]]:
    """The last evaluation of each set and protocol; that of the best checkpoint if a run keeps one."""
    last = [
        {(row["source"], row["protocol"]): row for row in run.evaluations if run.best_step in (None, row["step"])}
        for run in runs
    ]
    keys = dict.fromkeys(key for run in last for key in run)
    rows = []
    for source, protocol in keys:
        for metric in (
            "t2v/R@1",
            "t2v/R@5",
            "t2v/R@10",
            "t2v/MdR",
            "v2t/R@1",
            "v2t/R@10",
            "twin_accuracy",
            "top1",
            "top5",
        ):
            values = [run.get((source, protocol), {}).get("metrics", {}).get(metric) for run in last]
            if any(value is not None for value in values):
                rows.append([f"{source} ({protocol}): {metric}", *(number(value) for value in values)])
    return rows


def _paper_hours(run: RunData) -> str:
    comparison = compare_with_paper(run)
    if comparison is None or comparison.comparable_hours is None:
        return NOT_AVAILABLE
    kind = "measured" if comparison.covers else "projected"
    return f"{significant(comparison.comparable_hours)} {kind}; paper {comparison.row.ptt_hours:g}, hardware not stated"


def _differences(runs: list[RunData]) -> list[list[str]]:
    flat = [_flatten(run.config) for run in runs]
    keys = sorted({key for values in flat for key in values} - {"name", "run_folder"})
    return [
        [key, *(values.get(key, "(not set)") for values in flat)]
        for key in keys
        if len({values.get(key) for values in flat}) > 1
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of nested mappings and lists by path."""
    if isinstance(value, dict) and value:
        parts = [_flatten(part, f"{prefix}.{key}" if prefix else str(key)) for key, part in value.items()]
    elif isinstance(value, list) and value:
        parts = [_flatten(part, f"{prefix}[{index}]") for index, part in enumerate(value)]
    else:
        return {prefix: str(value)} if prefix else {}
    return {key: leaf for part in parts for key, leaf in part.items()}


def _sum(rows: list[dict[str, Any]], key: str) -> float | None:
    return sum(row[key] for row in rows) if rows else None
