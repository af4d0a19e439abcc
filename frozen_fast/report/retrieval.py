"""The report's retrieval numbers: after each stage, of the best checkpoint, after each epoch."""

from __future__ import annotations

from frozen_fast.report.document import Block, Plot, Section, Table, Text, count, number
from frozen_fast.report.plots import retrieval_plot
from frozen_fast.report.run_data import RunData
from frozen_fast.report.wording import after_text


def retrieval_section(run: RunData) -> Section | None:
    """Both directions after each stage and at the best checkpoint, and every evaluation if there are more.

    None for a classifier, whose numbers are in a section of their own.
    """
    if run.is_classifier():
        return None
    if not run.evaluations:
        return Section("Retrieval", [Text("No evaluation has finished.")])
    shown = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR", "Geom")
    twins = any("twin_accuracy" in row["metrics"] for row in run.evaluations)
    blocks: list[Block] = []
    for direction, title in (("t2v", "Text to video"), ("v2t", "Video to text")):
        with_twins = twins and direction == "t2v"
        rows = []
        for row in run.stage_evaluations():
            if direction == "t2v" and row["protocol"] == "v2t_max_over_captions":
                continue
            metrics = row["metrics"]
            cells = [after_text(run, row), row["source"], row["protocol"], str(row["frames"])]
            cells += [count(row["windows"]), count(row["num_queries"]), count(row["num_videos"])]
            cells += [number(metrics.get(f"{direction}/{name}")) for name in shown]
            rows.append(cells + ([number(metrics.get("twin_accuracy"))] if with_twins else []))
        rows += _chance_rows(run, direction, with_twins)
        header = ["After", "Set", "Protocol", "Frames", "Windows", "Queries", "Videos", *shown]
        blocks += [Text(f"{title}:"), Table(header + (["Twins"] if with_twins else []), rows, words=3)]
    plot = retrieval_plot(run)
    if plot:
        blocks.insert(0, Plot(plot, "Text-to-video retrieval after each stage."))
    if run.evaluates_inside_stages():
        blocks += [Text("Every evaluation:"), _epochs_table(run)]
    percents = "R@k and twins" if twins else "R@k"
    notes = f"{percents} in percent; MdR and MnR: median and mean rank, from 1; ties get their mean rank."
    if run.evaluates_inside_stages() and any("loss" in row for row in run.evaluations):
        notes += " Loss: the training loss on the held-out clips with their first captions, in batches of equal size."
    if twins:
        notes += (
            " Twins: share of captions that score their own clip above its twin, which has the same frames in "
            "another order, so that one frame is not enough to decide."
        )
    if any(row[0] == "one frame at best" for row in _chance_rows(run, "t2v", twins)):
        notes += " One frame at best: the expected R@1 of a model with one frame per clip that confuses twins only."
    return Section("Retrieval", [*blocks, Text(notes)])


def _chance_rows(run: RunData, direction: str, with_twins: bool) -> list[list[str]]:
    """The metrics of a constant similarity on each set with one caption per clip, and of one frame at best."""
    rows = []
    for source in dict.fromkeys(row["source"] for row in run.evaluations):
        row = next(row for row in run.evaluations if row["source"] == source)
        if direction == "v2t" and row["num_queries"] != row["num_videos"]:
            continue
        size = row["num_videos"]
        recalls = [min(100.0, 100.0 * k / size) for k in (1, 5, 10, 50)]
        geometric = (recalls[0] * recalls[1] * recalls[2]) ** (1 / 3)
        cells = ["chance", source, "", "", "", "", count(size), *(number(value) for value in recalls)]
        cells += [number((size + 1) / 2), number((size + 1) / 2), number(geometric)]
        rows.append(cells + (["50.0"] if with_twins else []))
        ceiling = row["metrics"].get("one_frame_ceiling")
        if with_twins and ceiling is not None:
            rows.append(["one frame at best", *cells[1:7], number(ceiling), *[""] * 6, "50.0"])
    return rows


def _epochs_table(run: RunData) -> Table:
    """One row per evaluation: its loss, and text to video."""
    shown = ("R@1", "R@5", "R@10", "MdR")
    rows = [
        [
            after_text(run, row),
            row["source"],
            row["protocol"],
            number(row.get("loss"), 3),
            *(number(row["metrics"].get(f"t2v/{name}")) for name in shown),
        ]
        for row in run.evaluations
        if row["protocol"] != "v2t_max_over_captions"
    ]
    return Table(["After", "Set", "Protocol", "Loss", *shown], rows, words=3)
