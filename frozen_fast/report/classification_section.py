"""Action recognition in the report: accuracies, the classes that go wrong, and the confusion matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from frozen_fast.report.document import Block, Plot, Section, Table, Text, count, number
from frozen_fast.report.plots import matrix_plot
from frozen_fast.report.run_data import RunData

WORST = 10
KINDS = {"classification": "zero-shot", "linear_head": "linear head"}


def classification_section(run: RunData) -> Section | None:
    """Each source with classes after each stage, and details of the last; None without any."""
    entries = [
        (entry, name)
        for entry in run.stage_evaluations()
        for name in ("classification", "linear_head")
        if entry.get(name)
    ]
    if not entries:
        return None
    rows = []
    for entry, name in entries:
        found = entry[name]
        cells = [f"stage {entry['stage'] + 1}", entry["source"], KINDS[name]]
        cells += [str(entry["frames"]), count(found["clips"])]
        cells += [count(len(found["classes"])), number(100 / len(found["classes"]))]
        rows.append(cells + [number(found[figure]) for figure in ("top1", "top5", "mean_class_accuracy")])
    header = ["After", "Set", "By", "Frames", "Clips", "Classes", "Chance", "Top-1", "Top-5", "Mean over classes"]
    text = (
        "Zero-shot: class names in evaluation.prompts, similarities averaged over the prompts. Linear head: a layer "
        "fitted on the frozen model's embeddings of the training split. Percent, ties counted as shares."
    )
    entry, name = entries[-1]
    blocks: list[Block] = [Text(text), Table(header, rows, words=3), *_details(entry["source"], entry[name])]
    return Section("Action recognition", blocks)


def _details(source: str, found: dict[str, Any]) -> list[Block]:
    """The classes with the lowest accuracy, what they are taken for, and the confusion matrix."""
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
    caption = f"Confusion matrix on {source}: rows are classes, columns what their clips are taken for."
    return [
        Text(f"Lowest accuracies on {source}:"),
        Table(["Class", "Clips", "Right, %", "Most often taken for"], rows),
        Plot(picture, caption),
    ]
