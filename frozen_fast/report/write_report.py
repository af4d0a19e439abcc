"""The report of a run: report.md and report.html, from the files of its run folder and nothing else."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from frozen_fast.common.files import write_atomically
from frozen_fast.report.clips import bad_clips_section, sources_section
from frozen_fast.report.compare import compare_runs
from frozen_fast.report.document import (
    Block,
    Bullets,
    Caution,
    Document,
    Figure,
    Listing,
    Plot,
    Section,
    Table,
    Text,
    count,
    duration,
    gibibytes,
    joules,
    number,
    percent,
    significant,
    to_markdown,
)
from frozen_fast.report.events import describe_events
from frozen_fast.report.html import to_html
from frozen_fast.report.mean_over_sources import mean_over_sources_section
from frozen_fast.report.paper_comparison import compare_with_paper
from frozen_fast.report.plots import hours_plot, loss_plot
from frozen_fast.report.published_comparison import published_section
from frozen_fast.report.retrieval import retrieval_section
from frozen_fast.report.run_data import RunData, StageTotals, read_run

__all__ = ["build_report", "compare_runs", "write_report"]

STATES = {
    "done": "finished",
    "running": "running",
    "dead": "killed: it says that it is running, but no process writes to its folder; it can be resumed",
    "stopped": "stopped by a signal after a checkpoint; it can be resumed",
    "failed": "failed",
}


def write_report(folder: str | Path) -> tuple[Path, Path]:
    """Write report.md and report.html into a run folder, finished or not.

    Returns:
        The paths of both.

    Raises:
        UserError: the folder holds no run.
    """
    folder = Path(folder)
    document = build_report(read_run(folder))
    markdown, html = folder / "report.md", folder / "report.html"
    write_atomically(markdown, to_markdown(document))
    write_atomically(html, to_html(document))
    return markdown, html


def build_report(run: RunData) -> Document:
    """The report's blocks."""
    sections = [
        _state(run),
        retrieval_section(run),
        mean_over_sources_section(run),
        published_section(run),
        _stages(run),
        _paper(run),
        _loss(run),
        sources_section(run),
        bad_clips_section(run),
        _largest_batches(run),
        _profile(run),
        _machine(run),
        _config(run),
    ]
    return Document(
        title=run.name,
        subtitle=_subtitle(run),
        figures=_figures(run),
        sections=[section for section in sections if section is not None],
    )


def _subtitle(run: RunData) -> str:
    totals = run.totals()
    frames = " => ".join(str(total.frames) for total in totals) or "no"
    started = run.environment.get("started")
    when = time.strftime(", started %Y-%m-%d %H:%M UTC", time.gmtime(started)) if started else ""
    steps = sum(total.steps for total in totals)
    clips = sum(total.clips for total in totals)
    return f"{frames} frames, {count(steps)} optimizer steps, {count(clips)} clips on {_devices(run)}{when}"


def _devices(run: RunData) -> str:
    names = Counter(str(name) for name in run.environment.get("devices", []))
    return " and ".join(f"{n} x {name}" if n > 1 else name for name, n in names.items()) or "unknown devices"


def _figures(run: RunData) -> list[Figure]:
    figures = []
    plain = [row for row in run.stage_evaluations() if row["protocol"] != "v2t_max_over_captions"]
    if plain:
        chosen = [row for row in plain if row["step"] == run.best_step]
        last = (chosen or plain)[-1]
        first = next(row for row in plain if row["source"] == last["source"])
        first = last if first["stage"] == last["stage"] else first
        earlier = "" if first is last else f", {number(first['metrics']['t2v/R@1'])} % at {_frames(first['frames'])}"
        best = f", best checkpoint (step {count(last['step'])})" if chosen else ""
        figures.append(
            Figure(
                f"Text-to-video R@1, {_frames(last['frames'])}",
                f"{number(last['metrics']['t2v/R@1'])} %",
                f"chance {number(100 / last['num_videos'], 2)} %{earlier}{_one_frame_note(last)}{best}",
            )
        )
        if "twin_accuracy" in last["metrics"]:
            before = (
                ""
                if first is last or "twin_accuracy" not in first["metrics"]
                else (f", {number(first['metrics']['twin_accuracy'])} % at {_frames(first['frames'])}")
            )
            value = f"{number(last['metrics']['twin_accuracy'])} %"
            figures.append(Figure("Twins told apart", value, f"chance 50 %{before}"))
    if run.stages:
        hours = sum(row["gpu_hours"] for row in run.stages)
        evaluation = sum(row["evaluation_gpu_hours"] for row in run.stages)
        unfinished = len(run.totals()) - len(run.stages)
        notes = [f"evaluation {significant(evaluation)} more"] if evaluation else []
        notes += ["finished stages only"] if unfinished > 0 else []
        figures.append(Figure(_hours_name(run), significant(hours), ", ".join(notes)))
    totals = run.totals()
    if totals and totals[-1].clips_per_second:
        last_total = totals[-1]
        note = f"stall {percent(last_total.stall_share)}"
        figures.append(
            Figure(f"Clips/s at {_frames(last_total.frames)}", significant(last_total.clips_per_second), note)
        )
    return figures


def _one_frame_note(row: dict[str, Any]) -> str:
    ceiling = row["metrics"].get("one_frame_ceiling")
    return "" if ceiling is None else f", one frame at best {number(ceiling)} %"


def _state(run: RunData) -> Section | None:
    blocks: list[Block] = []
    state = run.status.get("state")
    if state == "running" and not run.alive:
        state = "dead"
    if state != "done":
        words = STATES.get(str(state), "unknown")
        message = f": {run.status['message']}" if run.status.get("message") else ""
        code = f" (exit code {run.status['exit_code']})" if run.status.get("exit_code") else ""
        blocks.append(Caution(f"This run is not complete. State: {words}{message}{code}"))
    if run.missing:
        blocks += [Text("Not in the run folder:"), Bullets(run.missing)]
    if run.events:
        blocks += [Text("What happened to the run:"), Bullets(describe_events(run.events))]
    return Section("State", blocks) if blocks else None


def _stages(run: RunData) -> Section | None:
    totals = run.totals()
    if not totals:
        return Section("Stages", [Text("No optimizer step has finished.")])
    header = ["Stage", "Frames", "Batch", "Steps", "Clips", "Wall time", _hours_name(run), "Clips/s", "Stall"]
    header += ["Peak memory", "MFU", "Energy", "Graphs compiled"]
    rows = [_stage_cells(run, total) for total in totals]
    blocks: list[Block] = []
    if len(rows) > 1:
        finished = len(run.stages) == len(totals)
        hours = sum(row["gpu_hours"] for row in run.stages) if finished else None
        wall = sum(row["seconds"] for row in run.stages) if finished else None
        sums = ["all", "", "", count(sum(t.steps for t in totals)), count(sum(t.clips for t in totals))]
        used = [row["joules"] for row in run.stages if row.get("joules") is not None]
        energy = sum(used) if finished and len(used) == len(totals) else None
        rows.append([*sums, duration(wall), significant(hours), "", "", "", "", joules(energy), ""])
    blocks.append(Table(header, rows, total=len(totals) > 1))
    plot = hours_plot(run)
    if plot:
        blocks.append(Plot(plot, "Where each stage's time went."))
    if run.stages:
        blocks.append(_parts_table(run))
    blocks.append(Text(_stage_notes(run)))
    found = run.disagreements()
    if found:
        blocks += [Caution("stages.json and the sums of steps.jsonl disagree:"), Bullets(found)]
    elif run.stages:
        blocks.append(Text("Checked: steps, clips, seconds and stall of stages.json equal the sums over steps.jsonl."))
    return Section("Stages", blocks)


def _stage_cells(run: RunData, total: StageTotals) -> list[str]:
    """One stage's row: clips, speed and stall from steps.jsonl, the rest from stages.json."""
    row = run.stage_row(total.stage)
    cells = [str(total.stage + 1), str(total.frames)]
    if row is None:
        unfinished = [f"{cells[0]} (unfinished)", cells[1], "n/a", count(total.steps), count(total.clips)]
        speed = [significant(total.clips_per_second), percent(total.stall_share)]
        return [*unfinished, duration(total.seconds), "n/a", *speed, "n/a", "n/a", "n/a", "n/a"]
    sizes = row["batch_sizes"]
    batch = str(next(iter(sizes.values()))) if len(sizes) == 1 else ", ".join(f"{k} {v}" for k, v in sizes.items())
    return [
        *cells,
        batch,
        count(total.steps),
        count(total.clips),
        duration(row["seconds"]),
        significant(row["gpu_hours"]),
        significant(total.clips_per_second),
        percent(total.stall_share),
        gibibytes(row["peak_memory_bytes"]),
        percent(row.get("mfu")),
        joules(row.get("joules")),
        count(row.get("recompilations")),
    ]


def _largest_batches(run: RunData) -> Section | None:
    """What `frozen-fast find-batch-size` found, where its file is in the folder."""
    found = run.batch_sizes
    if not found.get("rows"):
        return None
    rows = [
        [
            str(row["frames"]),
            count(row["batch_size"]),
            significant(row.get("clips_per_second")),
            gibibytes(row.get("peak_memory_bytes")),
        ]
        for row in found["rows"]
    ]
    limit = f"Limit {gibibytes(found['memory_limit_bytes'])} on {found['device']}, per {found['per']}."
    return Section("Largest batches", [Table(["Frames", "Batch", "Clips/s", "Peak memory"], rows), Text(limit)])


def _parts_table(run: RunData) -> Table:
    parts = ("training", "stall", "warmup", "checkpoint", "evaluation", "other")
    rows = [
        [str(row["stage"] + 1), *(duration(row[f"{part}_seconds"]) for part in parts), duration(row["seconds"])]
        for row in run.stages
    ]
    return Table(["Stage", "Training", "Stall", "Warm-up", "Checkpoints", "Evaluation", "Other", "Wall time"], rows)


def _stage_notes(run: RunData) -> str:
    notes = (
        f"{_hours_name(run)}: wall time of training, stall, warm-up and checkpoints x devices; evaluation is counted "
        "apart. Clips/s, stall and MFU leave the warm-up steps out; stall is the time the device waits for a batch. "
        "Energy: of the devices alone, over the whole wall time of a stage "
        f"({run.environment.get('energy', 'not recorded')})."
    )
    sources = {row["peak_source"] for row in run.stages if row.get("peak_source")}
    if sources:
        return f"{notes} MFU: model FLOPs over the peak of {'; '.join(sorted(sources))}."
    return f"{notes} MFU is n/a where the device's peak or the model's FLOPs are not known."


def _paper(run: RunData) -> Section | None:
    comparison = compare_with_paper(run)
    if comparison is None:
        return None
    row, hours = comparison.row, comparison.comparable_hours
    if comparison.covers:
        kind = "measured"
    else:
        kind = "projection" if hours is not None else "no projection: a stage has no speed yet"
    header = ["", "What", "Clips", "Hours", "R@1 after finetuning", "R@10", "MedR"]
    paper = [
        f"Paper, Table 4, {row.pretraining_frames} frames",
        "PTT, hardware not stated",
        count(comparison.paper_clips),
    ]
    paper += [number(row.ptt_hours), number(row.recall_at_1), number(row.recall_at_10), number(row.median_rank)]
    rows = [paper]
    if not comparison.covers:
        own = significant(comparison.measured_gpu_hours)
        rows.append(["This run, itself", "measured, not comparable", count(comparison.clips), own, "", "", ""])
    label = "This run" if comparison.covers else "This run, at the paper's clips"
    clips = comparison.clips if comparison.covers else comparison.paper_clips
    rows.append([label, kind, count(clips), significant(hours), "", "", ""])
    blocks: list[Block] = [Table(header, rows, words=2)]
    if hours and comparison.same_model:
        what = "hours" if comparison.covers else "projected hours"
        blocks.append(Text(f"The paper's PTT is {significant(row.ptt_hours / hours)} x this run's {what}."))
    return Section("Beside the paper", [*blocks, Bullets(comparison.notes)])


def _loss(run: RunData) -> Section | None:
    plot = loss_plot(run)
    if plot is None:
        return None
    rows = []
    for total in run.totals():
        losses = [float(row["loss"]) for row in run.steps if row["stage"] == total.stage]
        last = losses[-20:]
        rows.append([str(total.stage + 1), str(total.frames), number(losses[0], 3), number(sum(last) / len(last), 3)])
    table = Table(["Stage", "Frames", "First loss", "Mean of the last 20"], rows)
    return Section("Loss", [Plot(plot, "Loss of every step (light) and its moving average."), table])


def _machine(run: RunData) -> Section | None:
    environment = run.environment
    if not environment:
        return None
    dirty = " with local changes" if environment.get("git_dirty") else ""
    command = environment.get("command")
    strategy = environment.get("strategy", environment.get("distributed_type"))
    facts = {
        "Devices": _devices(run),
        "Processes": f"{environment.get('world_size')} ({strategy})",
        "Precision": " ".join(
            str(environment[key]) for key in ("precision", "precision_reason") if environment.get(key)
        ),
        "Decoding": _backends(environment.get("decode_backends") or {}),
        "Attention": "; ".join(_attention(entry) for entry in environment.get("attention_backends") or []),
        "Residual norms, GELU": environment.get("fused_ops") or "",
        "Commit": f"{environment.get('git_commit') or 'not a checkout'}{dirty}",
        "Command": " ".join(command) if isinstance(command, list) else str(command or ""),
        "Python": str(environment.get("python", "")),
        "Packages": ", ".join(f"{name} {value}" for name, value in (environment.get("versions") or {}).items()),
    }
    rows = [[name, value or "not recorded"] for name, value in facts.items()]
    return Section("Machine and versions", [Table(["What", "Value"], rows, words=2)])


def _profile(run: RunData) -> Section | None:
    """The most expensive kernels of each traced stage, where training.profile_steps asked for a trace."""
    blocks: list[Block] = []
    for table in sorted(run.kernels, key=lambda table: table["stage"]):
        steps, stage = table["steps"], table["stage"]
        where = "on the device" if table["what"] == "kernel" else "on the CPU, without the operators that they call"
        blocks.append(
            Text(
                f"Stage {stage + 1}, {count(steps)} step{'' if steps == 1 else 's'} traced after warm-up, "
                f"{significant(table['total_milliseconds'])} ms of {table['what']}s {where}. "
                f"Chrome trace: traces/stage_{stage}.trace.json."
            )
        )
        rows = [
            [row["name"], count(row["calls"]), significant(row["milliseconds"]), percent(row["share"])]
            for row in table["rows"]
        ]
        blocks.append(Table([table["what"].capitalize(), "Calls", "ms", "Share"], rows))
    return Section("Profile", blocks) if blocks else None


def _backends(backends: dict[str, Any]) -> str:
    parts = []
    for source, used in backends.items():
        if isinstance(used, dict):
            used = ", ".join(f"{name} {count(clips)} clips" for name, clips in used.items())
        parts.append(f"{source}: {used}")
    return "; ".join(parts)


def _attention(entry: Any) -> str:
    if not isinstance(entry, dict):
        return str(entry)
    return ", ".join(f"{key} {value}" for key, value in entry.items())


def _config(run: RunData) -> Section | None:
    return Section("Config", [Listing("config.yaml, resolved", run.config_text)]) if run.config_text else None


def _hours_name(run: RunData) -> str:
    return "GPU-hours" if run.on_gpu or not run.stages else "CPU process-hours"


def _frames(frames: int) -> str:
    return f"{frames} frame" + ("" if frames == 1 else "s")
