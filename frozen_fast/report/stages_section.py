"""The report's stages: steps, clips, hours, speed, stall, memory, and time by category."""

from __future__ import annotations

from frozen_fast.report.document import (
    Block,
    Bullets,
    Caution,
    Plot,
    Section,
    Table,
    Text,
    count,
    duration,
    gibibytes,
    joules,
    percent,
    significant,
)
from frozen_fast.report.plots import hours_plot
from frozen_fast.report.run_data import RunData, StageTotals
from frozen_fast.report.slow_ranks import rank_blocks
from frozen_fast.report.wording import hours_name


def stages_section(run: RunData) -> Section:
    """The numbers of every stage, a plot of time by category, and a check of the files."""
    totals = run.totals()
    if not totals:
        return Section("Stages", [Text("No optimizer step has finished.")])
    header = ["Stage", "Frames", "Batch", "Steps", "Clips", "Wall time", hours_name(run), "Clips/s", "Stall"]
    header += ["Peak memory", "MFU, datasheet", "MFU, measured peak", "Energy", "Graphs compiled"]
    rows = [_stage_cells(run, total) for total in totals]
    blocks: list[Block] = []
    if len(rows) > 1:
        finished = len(run.stages) == len(totals)
        hours = sum(row["gpu_hours"] for row in run.stages) if finished else None
        wall = sum(row["seconds"] for row in run.stages) if finished else None
        sums = ["all", "", "", count(sum(t.steps for t in totals)), count(sum(t.clips for t in totals))]
        used = [row["joules"] for row in run.stages if row.get("joules") is not None]
        energy = sum(used) if finished and len(used) == len(totals) else None
        rows.append([*sums, duration(wall), significant(hours), "", "", "", "", "", joules(energy), ""])
    blocks.append(Table(header, rows, total=len(totals) > 1))
    plot = hours_plot(run)
    if plot:
        blocks.append(Plot(plot, "Time of each stage by category."))
    if run.stages:
        blocks.append(_parts_table(run))
    blocks.append(Text(_stage_notes(run)))
    blocks += rank_blocks(run)
    found = run.disagreements()
    if found:
        blocks += [Caution("stages.json differs from the sums of steps.jsonl:"), Bullets(found)]
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
        return [*unfinished, duration(total.seconds), "n/a", *speed, "n/a", "n/a", "n/a", "n/a", "n/a"]
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
        percent(row.get("mfu_datasheet")),
        percent(row.get("mfu_measured_peak")),
        joules(row.get("joules")),
        count(row.get("recompilations")),
    ]


def _parts_table(run: RunData) -> Table:
    parts = ("training", "stall", "warmup", "checkpoint", "evaluation", "other")
    rows = [
        [str(row["stage"] + 1), *(duration(row[f"{part}_seconds"]) for part in parts), duration(row["seconds"])]
        for row in run.stages
    ]
    return Table(["Stage", "Training", "Stall", "Warm-up", "Checkpoints", "Evaluation", "Other", "Wall time"], rows)


def _stage_notes(run: RunData) -> str:
    """The meaning of the table's columns; only of columns with numbers."""
    notes = [
        f"{hours_name(run)}: wall time of training, stall, warm-up and checkpoints x devices, without evaluation. "
        "Clips/s and stall exclude warm-up steps; stall is the time in which the device waits for a batch."
    ]
    if any(row.get("joules") is not None for row in run.stages):
        source = run.environment.get("energy", "source not recorded")
        notes.append(f"Energy: of the devices only, over the wall time of a stage ({source}).")
    for name, key in (("datasheet", "peak_source"), ("measured peak", "measured_peak_source")):
        peaks = sorted({row[key] for row in run.stages if row.get(key)})
        if any(row.get(f"mfu_{name.replace(' ', '_')}") is not None for row in run.stages):
            notes.append(f"MFU, {name}: executed FLOPs per second after the warm-up over {'; '.join(peaks)}.")
    counted = [row for row in run.stages if row.get("nominal_flops_per_clip")]
    if counted:
        each = ", ".join(
            f"{row['flops_per_clip'] / 1e9:.3g} ({row['nominal_flops_per_clip'] / 1e9:.3g}) at {row['frames']} frames"
            for row in {row["frames"]: row for row in counted}.values()
        )
        notes.append(f"GFLOP of a training clip, executed (and of the published model in full): {each}.")
    return " ".join(notes)
