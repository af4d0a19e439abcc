"""The report's plots as SVG, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from frozen_fast.report.run_data import RunData
from frozen_fast.report.wording import frames_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e7eb"
# Told apart also by readers who do not see red and green as others do (Okabe and Ito, 2008).
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PART_COLOURS = {
    "training": "#0072b2",
    "stall": "#d55e00",
    "warmup": "#e69f00",
    "checkpoint": "#cc79a7",
    "evaluation": "#9aa5b1",
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Segoe UI", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "frozen_fast",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}
MAX_POINTS = 800
MAX_NAMES = 60


def loss_plot(run: RunData) -> str | None:
    """Loss against optimizer steps, one line per source, with the stages; None without a loss."""
    finite = [row for row in run.steps if row["loss"] is not None]
    if not finite:
        return None

    def draw(axes: Axes) -> None:
        sources = list(dict.fromkeys(str(row["source"]) for row in finite))
        for index, source in enumerate(sources):
            rows = [row for row in finite if row["source"] == source]
            colour = SERIES[index % len(SERIES)]
            for stage in dict.fromkeys(row["stage"] for row in rows):
                own = [row for row in rows if row["stage"] == stage]
                steps, losses = [float(row["step"]) for row in own], [float(row["loss"]) for row in own]
                axes.plot(*_thin(steps, losses), color=colour, alpha=0.28, linewidth=0.9)
                label = source if stage == rows[0]["stage"] else None
                axes.plot(*_thin(steps, _smooth(losses)), color=colour, linewidth=1.8, label=label)
        if len(sources) > 1:
            axes.legend(loc="upper right", ncols=min(3, len(sources)))
        _mark_stages(axes, run)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        axes.set_ylim(0, None if any(row["loss"] > 0 for row in finite) else 1)
        axes.margins(x=0)

    return _svg(draw, height=2.9)


def hours_plot(run: RunData) -> str | None:
    """Device-hours of each finished stage by category, as stacked bars; None without a finished stage."""
    if not run.stages:
        return None

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        longest = max(row["seconds"] * row["num_devices"] for row in run.stages)
        unit, seconds_per_unit = ("hours", 3600) if longest > 600 else ("minutes", 60)
        labels = [f"{_ordinal(row)}, {frames_text(row['frames'])}" for row in run.stages]
        left = [0.0] * len(labels)
        for part, colour in PART_COLOURS.items():
            hours = [row[f"{part}_seconds"] * row["num_devices"] / seconds_per_unit for row in run.stages]
            if any(hours):
                axes.barh(labels, hours, left=left, height=0.58, color=colour, edgecolor="white", label=part)
            left = [start + hour for start, hour in zip(left, hours, strict=True)]
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(0, None if longest > 0 else 1)
        axes.set_xlabel(f"{'GPU' if run.on_gpu else 'CPU process'}-{unit}")
        if longest > 0:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(PART_COLOURS), handlelength=1)

    return _svg(draw, height=0.9 + 0.4 * len(run.stages))


def retrieval_plot(run: RunData) -> str | None:
    """Text-to-video R@1 and, where there are twins, twin accuracy after each stage; None below two stages."""
    series: dict[str, list[tuple[int, float]]] = {}
    ceilings: set[float] = set()
    labels: dict[int, str] = {}
    several = len({row["source"] for row in run.evaluations}) > 1
    ends = {row["stage"]: row["step"] for row in run.evaluations}
    for row in run.evaluations:
        if row["protocol"] == "v2t_max_over_captions" or row["step"] != ends[row["stage"]]:
            continue
        labels[row["stage"]] = f"{_ordinal(row)}\n{frames_text(row['frames'])}"
        prefix = f"{row['source']}: " if several else ""
        ceilings |= {row["metrics"]["one_frame_ceiling"]} if "one_frame_ceiling" in row["metrics"] else set()
        for key, name in (("t2v/R@1", "text-to-video R@1"), ("twin_accuracy", "twins told apart")):
            value = row["metrics"].get(key)
            if value is not None:
                series.setdefault(prefix + name, []).append((row["stage"], value))
    if len(labels) < 2:
        return None

    def draw(axes: Axes) -> None:
        stages = sorted(labels)
        width = 0.7 / len(series)
        for index, (name, points) in enumerate(series.items()):
            places = [stages.index(stage) + (index - (len(series) - 1) / 2) * width for stage, _ in points]
            values = [value for _, value in points]
            colour = SERIES[index % len(SERIES)]
            bars = axes.bar(places, values, width=width * 0.9, color=colour, label=name)
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8.5, color=INK)
        if len(ceilings) == 1:
            axes.axhline(*ceilings, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="R@1 from one frame at best")
        axes.set_xticks(range(len(stages)), [labels[stage] for stage in stages])
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("percent")
        axes.margins(y=0.14)
        axes.set_ylim(0, None if any(value > 0 for points in series.values() for _, value in points) else 1)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, handlelength=1)

    return _svg(draw, height=2.9)


def matrix_plot(shares: np.ndarray, names: Sequence[str]) -> str:
    """Shares from 0 to 1 of rows that fall on columns, [len(names), len(names)], as shaded cells.

    The cells are labelled with up to MAX_NAMES names.
    """

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.grid(visible=False)
        axes.set_xlabel("taken for")
        axes.set_ylabel("class")
        if len(names) <= MAX_NAMES:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)
            axes.set_yticks(range(len(names)), names, fontsize=6.5)

    return _svg(draw, height=7.0)


def _svg(draw: Any, *, height: float, width: float = 7.6) -> str:
    """Draw on a fresh figure and return its <svg> element."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _mark_stages(axes: Axes, run: RunData) -> None:
    """A line where a stage begins, and its frames above."""
    first: dict[int, dict[str, Any]] = {}
    for row in run.steps:
        first.setdefault(int(row["stage"]), row)
    for stage, row in first.items():
        if stage != min(first):
            axes.axvline(row["step"], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        frames = max(int(r["frames"]) for r in run.steps if r["stage"] == stage)
        axes.annotate(
            frames_text(frames),
            (row["step"], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 3),
            textcoords="offset points",
            color=MUTED,
            fontsize=8.5,
        )


def _ordinal(row: dict[str, Any]) -> str:
    return f"stage {row['stage'] + 1}"


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a fortieth of the values, without the bias of its start."""
    weight = 1 - 1 / max(4.0, len(values) / 40)
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means of equal runs of steps."""
    size = -(-len(steps) // MAX_POINTS)
    if size <= 1:
        return list(steps), list(values)
    parts = range(0, len(steps), size)
    return (
        [sum(steps[i : i + size]) / len(steps[i : i + size]) for i in parts],
        [sum(values[i : i + size]) / len(values[i : i + size]) for i in parts],
    )
