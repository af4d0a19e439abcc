"""The report's section on action recognition: accuracies, confusions and the confusion matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from frozen_fast.evaluation.classification import ACCURACIES
from frozen_fast.report.document import Block, Plot, Section, Table, Text, count, number
from frozen_fast.report.plots import matrix_plot
from frozen_fast.report.run_data import RunData
from frozen_fast.report.wording import after_text

WORST = 10
KINDS = {"classification": "zero-shot", "linear_head": "linear head", "finetuned": "trained"}


def classification_section(run: RunData) -> Section | None:
    """Each source with classes after each stage, and details of the last; None without any."""
    entries = [(entry, name) for entry in run.stage_evaluations() for name in KINDS if entry.get(name)]
    if not entries:
        return None
    rows = []
    for entry, name in entries:
        found = entry[name]
        cells = [after_text(run, entry), entry["source"], KINDS[name]]
        cells += [str(entry["frames"]), count(entry["windows"]), count(found["clips"])]
        cells += [count(len(found["classes"])), number(100 / len(found["classes"]))]
        rows.append(cells + [number(found[figure]) for figure in ACCURACIES])
    header = [
        "After",
        "Set",
        "By",
        "Frames",
        "Windows",
        "Clips",
        "Classes",
        "Chance",
        "Top-1",
        "Top-5",
        "Mean over classes",
    ]
    text = (
        "Zero-shot: class names in evaluation.prompts, similarities averaged over the prompts. Linear head: a layer "
        "fitted on the frozen model's embeddings of the training split. Trained: the classifier itself, its "
        "probabilities averaged over windows and crops. In percent; ties count fractionally."
    )
    best = [one for one in entries if one[0]["step"] == run.best_step]
    entry, name = (best or entries)[-1]
    blocks: list[Block] = [Text(text), Table(header, rows, words=3)]
    if run.is_classifier() and run.evaluates_inside_stages():
        blocks += [Text("Every evaluation:"), _epochs_table(run)]
    blocks += _details(entry["source"], entry[name])
    return Section("Action recognition", blocks)


def _epochs_table(run: RunData) -> Table:
    """One row per evaluation of a classifier: its loss and accuracies."""
    rows = [
        [
            after_text(run, row),
            row["source"],
            number(row.get("loss"), 3),
            *(number(row["metrics"].get(name)) for name in ACCURACIES),
        ]
        for row in run.evaluations
    ]
    return Table(["After", "Set", "Loss", "Top-1", "Top-5", "Mean over classes"], rows, words=2)


def _details(source: str, found: dict[str, Any]) -> list[Block]:
    """The classes with the lowest accuracy, their most frequent confusion, and the confusion matrix."""
    classes, confusion = found["classes"], np.array(found["confusion"])
    place = {name: number for number, name in enumerate(classes)}
    rows = []
    for name, accuracy in sorted(found["per_class"].items(), key=lambda item: item[1])[:WORST]:
        others = confusion[place[name]].copy()
        others[place[name]] = 0
        taken = f"{classes[int(others.argmax())]} ({others.max()})" if others.max() else ""
        rows.append([name, count(int(confusion[place[name]].sum())), number(accuracy), taken])
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    picture = matrix_plot(shares, classes)
    caption = f"Confusion matrix on {source}: rows are classes, columns are predictions."
    return [
        Text(f"Lowest accuracies on {source}:"),
        Table(["Class", "Clips", "Right, %", "Most often predicted as"], rows),
        Plot(picture, caption),
    ]
