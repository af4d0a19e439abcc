"""The end of a sweep: a ranked table, a plot, and the winner as files that train.py accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from frozen_fast.common.files import write_atomically
from frozen_fast.sweep.outcome import Outcome
from frozen_fast.sweep.space import Trial

COLUMNS = (
    "rank",
    "clips/s/device",
    "GPU-hours/epoch (projected)",
    "device GiB",
    "host GiB",
    "stall",
    "MFU",
    "seconds",
    "result",
    "settings",
)


def rank(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Each trial at the last rung it reached: working ones by rung and speed, then failures by cause."""
    latest: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.trial not in latest or outcome.rung >= latest[outcome.trial].rung:
            latest[outcome.trial] = outcome
    return sorted(
        latest.values(),
        key=lambda row: (row.cause != "ok", -row.rung, -(row.clips_per_second_per_device or 0.0), row.cause, row.trial),
    )


def shown(value: float | None, pattern: str) -> str:
    """A figure formatted, or n/a."""
    return "n/a" if value is None else pattern.format(value)


def gib(memory_bytes: int | None) -> float | None:
    """Bytes as GiB."""
    return None if memory_bytes is None else memory_bytes / 2**30


def table_rows(outcomes: Sequence[Outcome], trials: Mapping[str, Trial]) -> list[tuple[str, ...]]:
    """The ranked table's cells, one tuple a trial, in the order of COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for position, row in enumerate(rank(outcomes), start=1):
        rows.append(
            (
                str(position) if row.cause == "ok" else "-",
                shown(row.clips_per_second_per_device, "{:.2f}"),
                shown(row.gpu_hours_per_epoch, "{:.3g}"),
                shown(gib(row.peak_memory_bytes), "{:.2f}"),
                shown(gib(row.host_memory_bytes), "{:.2f}"),
                shown(row.stall_share, "{:.0%}"),
                shown(row.mfu_datasheet, "{:.1%}"),
                f"{row.seconds:.0f}",
                row.cause if row.cause == "ok" else f"{row.cause}: {row.message}"[:200],
                trials[row.trial].label() if row.trial in trials else row.trial,
            )
        )
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The ranked table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def plot_speeds(outcomes: Sequence[Outcome], trials: Mapping[str, Trial], path: Path) -> bool:
    """Draw the working trials' speed and memory side by side as SVG; False where no trial worked."""
    working = [row for row in rank(outcomes) if row.cause == "ok" and row.clips_per_second_per_device]
    if not working:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [trials[row.trial].label() if row.trial in trials else row.trial for row in working]
    figure, (speed, memory) = pyplot.subplots(
        1, 2, sharey=True, figsize=(11, 1.2 + 0.32 * len(working)), layout="constrained", width_ratios=(2, 1)
    )
    positions = range(len(working))
    speed.barh(positions, [row.clips_per_second_per_device or 0.0 for row in working], color="#33658a")
    memory.barh(positions, [(row.peak_memory_bytes or 0) / 2**30 for row in working], color="#b0a18f")
    speed.set_yticks(positions, labels, fontsize=7)
    speed.invert_yaxis()
    speed.set_xlabel("clips / s / device")
    memory.set_xlabel("peak memory of a device, GiB")
    for axis in (speed, memory):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return True


def write_ranking(
    folder: Path, name: str, outcomes: Sequence[Outcome], trials: Mapping[str, Trial], note: str, *, plots: bool
) -> Path:
    """Write ranking.md (and speeds.svg, where plots are wanted and a trial worked) into the sweep's folder."""
    table = markdown_table(table_rows(outcomes, trials))
    picture = "\n![speeds](speeds.svg)\n" if plots and plot_speeds(outcomes, trials, folder / "speeds.svg") else ""
    text = f"# Sweep {name}\n\n{note}\n\n{table}{picture}"
    path = folder / "ranking.md"
    write_atomically(path, text)
    return path
