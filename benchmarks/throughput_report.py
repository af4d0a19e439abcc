"""From measured windows to the rows of Table 4: speeds, what bounds a stage, projected GPU-hours; tables and a plot."""

from __future__ import annotations

import base64
import html
import io
import statistics
from pathlib import Path
from typing import Any

from frozen_fast.common.files import write_atomically
from frozen_fast.profiling.paper import table_4

BEST_FIRST = ("end_to_end", "model")
"""Modes whose speed a projection may use: with input where it was measured, otherwise the model alone, said so."""

PEAKS = {"datasheet": "n/a (a device that is not in the table)", "measured_peak": "n/a (--measure-peak times one)"}
"""The peaks of MFU, and what is said where one is missing."""


def speed(stage: dict[str, Any], mode: str) -> dict[str, float] | None:
    """Clips/s over all devices in a mode: median, p20 and p80 of the windows; None where it was not measured."""
    windows = stage.get("modes", {}).get(mode, {}).get("windows")
    if not windows:
        return None
    rates = sorted(window["clips"] / window["seconds"] for window in windows)
    if len(rates) == 1:
        return {"median": rates[0], "p20": rates[0], "p80": rates[0]}
    fifths = statistics.quantiles(rates, n=5, method="inclusive")
    return {"median": statistics.median(rates), "p20": fifths[0], "p80": fifths[3]}


def bound(stage: dict[str, Any]) -> str:
    """What bounds a stage (compute, input or communication) and by how much; needs the modes it compares.

    End to end, the loader works beside the device; the last figure says how much of the slower one's speed is left.
    """
    model, data, both = (speed(stage, mode) for mode in ("model", "input", "end_to_end"))
    if model is None or data is None:
        return "n/a"
    seconds = {"compute": 1 / model["median"], "input": 1 / data["median"]}
    alone = speed(stage, "model_without_exchange")
    if alone is not None:
        seconds["compute"] = 1 / alone["median"]
        seconds["communication"] = max(0.0, 1 / model["median"] - 1 / alone["median"])
    largest = max(seconds, key=lambda name: seconds[name])
    others = max(value for name, value in seconds.items() if name != largest)
    ratio = f"{largest}, {seconds[largest] / others:.2f} x the next" if others else largest
    if both is None:
        return ratio
    return f"{ratio}; end to end {both['median'] / min(model['median'], data['median']):.0%} of that speed"


def mfu(stage: dict[str, Any], mode: str, kind: str) -> float | None:
    """Executed FLOPs per second over the peak of all devices; None where FLOPs, peak or speed are unknown.

    Args:
        stage: as throughput_stage.py writes it.
        mode: whose speed.
        kind: of the peak, "datasheet" or "measured_peak".
    """
    rate, flops, peak = speed(stage, mode), stage.get("flops_per_clip"), (stage.get("peaks") or {}).get(kind)
    if rate is None or not flops or not peak:
        return None
    return float(rate["median"] * flops / (peak["flops_per_second"] * stage["num_devices"]))


def project(clips: float, stage: dict[str, Any], mode: str) -> dict[str, float] | None:
    """GPU-hours of this number of clips at a stage's measured speed: the median, p20 and p80 of its windows."""
    rate = speed(stage, mode)
    return None if rate is None else {name: clips / rate[name] * stage["num_devices"] / 3600 for name in rate}


def project_row(
    row: str, entries: list[tuple[int, int, float]], stages: list[dict[str, Any]], attention: str, clips: int
) -> dict[str, Any] | None:
    """A row's GPU-hours at the measured speeds; None where a stage of it has none.

    Args:
        row: the row of Table 4.
        entries: its stages: frames, batch size, share of the clips.
        stages: what was measured.
        attention: which backend's measurements to use.
        clips: clips of the whole row.
    """
    parts = []
    for frames, batch_size, share in entries:
        found = [s for s in stages if (s["frames"], s["batch_size"], s["attention"]) == (frames, batch_size, attention)]
        mode = next((mode for mode in BEST_FIRST if found and speed(found[0], mode)), None)
        if mode is None:
            return None
        hours_of_stage = project(share * clips, found[0], mode)
        assert hours_of_stage is not None
        parts.append((hours_of_stage, mode))
    printed = table_4().row(row)
    hours = {name: sum(part[name] for part, _ in parts) for name in ("median", "p20", "p80")}
    return {
        "row": row,
        "attention": attention,
        "modes": sorted({mode for _, mode in parts}),
        "ptt_hours": printed.ptt_hours,
        "gpu_hours": hours["median"],
        "gpu_hours_slow": hours["p20"],
        "gpu_hours_fast": hours["p80"],
        "ratio": printed.ptt_hours / hours["median"],
    }


def number(value: float | None, pattern: str = "{:.3g}") -> str:
    """A figure formatted, or n/a."""
    return "n/a" if value is None else pattern.format(value)


def stage_table(stages: list[dict[str, Any]]) -> list[list[str]]:
    """Header and one line per measured stage."""
    lines = [
        [
            "frames",
            "batch",
            "attention",
            "model clips/s (p20-p80)",
            "input clips/s",
            "end to end clips/s",
            "MFU, datasheet (model)",
            "MFU, measured peak (model)",
            "peak GiB",
            "bound",
        ]
    ]
    for stage in stages:
        head = [str(stage["frames"]), str(stage["batch_size"]), stage["attention"]]
        if stage["cause"] != "ok":
            lines.append([*head, f"{stage['cause']}: {stage['message']}", "", "", "", "", "", ""])
            continue
        cells = []
        for mode in ("model", "input", "end_to_end"):
            rate = speed(stage, mode)
            spread = f"{number(rate['median'])} ({number(rate['p20'])}-{number(rate['p80'])})" if rate else "n/a"
            cells.append(spread)
        memory = max((m["peak_memory_bytes"] or 0) for m in stage["modes"].values() if "peak_memory_bytes" in m)
        used = [number(mfu(stage, "model", kind), "{:.1%}") for kind in PEAKS]
        lines.append([*head, *cells, *used, f"{memory / 2**30:.2f}", bound(stage)])
    return lines


def row_table(rows: list[dict[str, Any]], *, comparable: bool) -> list[list[str]]:
    """Header and one line per projected row of Table 4; no ratio where another model was measured."""
    lines = [["row", "attention", "paper's PTT (h)", "GPU-hours, projected (p80-p20)", "PTT / ours", "from"]]
    for row in rows:
        spread = f"{number(row['gpu_hours'])} ({number(row['gpu_hours_fast'])}-{number(row['gpu_hours_slow'])})"
        lines.append(
            [
                row["row"],
                row["attention"],
                number(row["ptt_hours"]),
                spread,
                number(row["ratio"] if comparable else None, "{:.1f} x"),
                ", ".join(row["modes"]),
            ]
        )
    return lines


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown."""
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def html_table(lines: list[list[str]]) -> str:
    """A table in HTML."""
    rows = []
    for index, cells in enumerate(lines):
        tag = "th" if index == 0 else "td"
        rows.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    return "<table>" + "".join(rows) + "</table>"


def plot(rows: list[dict[str, Any]], stages: list[dict[str, Any]]) -> bytes | None:
    """Hours of each row beside the paper's, and time per clip against frames (the axes of the paper's Figure 4)."""
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(row["row"] for row in rows))
    backends = list(dict.fromkeys(row["attention"] for row in rows))
    width = 0.8 / (1 + len(backends))
    printed = {row["row"]: row["ptt_hours"] for row in rows}
    left.bar(
        range(len(names)), [printed[name] for name in names], width, label="paper (hardware unstated)", color="#b0a18f"
    )
    for index, backend in enumerate(backends, start=1):
        ours = {row["row"]: row["gpu_hours"] for row in rows if row["attention"] == backend}
        places = [place + index * width for place, name in enumerate(names) if name in ours]
        left.bar(places, [ours[name] for name in names if name in ours], width, label=f"{backend}, projected")
    left.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names)
    left.set_yscale("log")
    left.set_ylabel("hours (paper) / GPU-hours (ours)")
    left.legend(fontsize=8)
    for backend in backends:
        points = sorted(
            (stage["frames"], 1000 / rate["median"])
            for stage in stages
            if stage["attention"] == backend and (rate := speed(stage, "end_to_end") or speed(stage, "model"))
        )
        right.plot([x for x, _ in points], [y for _, y in points], "o-", label=backend)
    right.set_xlabel("frames")
    right.set_ylabel("ms per clip")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    return buffer.getvalue()


def heading(result: dict[str, Any]) -> list[str]:
    """What the figures are, on which machine, and what they are not."""
    measured = [stage for stage in result["stages"] if stage["cause"] == "ok"]
    lines = [f"Command: `{' '.join(result['command'])}`"]
    if measured:
        one = measured[0]
        versions = ", ".join(f"{name} {version}" for name, version in one["environment"]["versions"].items() if version)
        lines.append(f"Machine: {one['num_devices']} x {one['device']}; precision {one['precision']}; {versions}")
        for kind, absent in PEAKS.items():
            peak = one["peaks"][kind]
            lines.append(f"Peak for MFU, {kind.replace('_', ' ')}: {peak['source'] if peak else absent}")
    if not result["small"]:
        lines.append(
            "GPU-hours are projections from measured windows"
            f" to {result['clips_per_row']:,} clips, not runs over a real epoch."
        )
    lines.append(result["paper_hardware"])
    if result["small"]:
        lines.append("SMALL: a tiny model and batch to exercise the harness; no figure here compares with the paper.")
    return lines


def projected_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row of Table 4 that a result can project, for each attention backend that it measured.

    None of a smoke run: hours at a tiny model's speed mean nothing.
    """
    if result["small"]:
        return []
    backends = list(dict.fromkeys(stage["attention"] for stage in result["stages"]))
    return [
        projected
        for row, entries in result["row_stages"].items()
        for backend in backends
        if (projected := project_row(row, entries, result["stages"], backend, result["clips_per_row"]))
    ]


def write_throughput_report(folder: Path, result: dict[str, Any]) -> Path:
    """Write report.md, report.html and throughput.svg; returns report.md."""
    rows = projected_rows(result)
    notes, picture = heading(result), plot(rows, result["stages"])
    tables = [("Rows of Table 4", row_table(rows, comparable=True))] if rows else []
    tables.append(("Stages", stage_table(result["stages"])))
    text = "# Throughput\n\n" + "\n".join(f"- {note}" for note in notes)
    body = "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>"
    for title, lines in tables:
        text += f"\n\n## {title}\n\n{markdown(lines)}"
        body += f"<h2>{title}</h2>{html_table(lines)}"
    if picture:
        write_atomically(folder / "throughput.svg", picture)
        text += "\n\n![GPU-hours and time per clip](throughput.svg)"
        data = base64.b64encode(picture).decode()
        body += f'<img alt="GPU-hours and time per clip" src="data:image/svg+xml;base64,{data}">'
    style = "body{font:15px system-ui;max-width:70em;margin:2em auto}td,th{padding:.2em .7em;text-align:left}"
    page = (
        f"<!doctype html><meta charset=utf-8><title>Throughput</title><style>{style}</style><h1>Throughput</h1>{body}"
    )
    write_atomically(folder / "report.html", page)
    write_atomically(folder / "report.md", text + "\n")
    return folder / "report.md"
