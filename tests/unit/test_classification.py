"""Zero-shot classification against a brute-force count, and its section of the report."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from frozen_fast.errors import UserError
from frozen_fast.evaluation.classification import average_prompts, classify, prompts_of
from frozen_fast.report.classification_section import classification_section
from frozen_fast.report.mean_over_sources import mean_over_sources_section
from frozen_fast.report.run_data import read_run
from support.run_folder import make_run_folder

NAMES = tuple(f"class {number}" for number in range(8))


def test_top_k_is_a_brute_force_count() -> None:
    generator = torch.Generator().manual_seed(0)
    sim = torch.rand(8, 40, generator=generator)
    own = torch.randint(0, 7, (40,), generator=generator).tolist()  # no clip of the last class
    found = classify(sim, own, NAMES)
    top1 = top5 = 0
    right = {name: [] for name in NAMES}
    confusion = [[0] * 8 for _ in NAMES]
    for clip, label in enumerate(own):
        order = sorted(range(8), key=lambda number: -float(sim[number, clip]))
        top1 += order[0] == label
        top5 += label in order[:5]
        right[NAMES[label]].append(order[0] == label)
        confusion[label][order[0]] += 1
    assert found.top1 == pytest.approx(100 * top1 / 40) and found.top5 == pytest.approx(100 * top5 / 40)
    expected = {name: 100 * sum(hits) / len(hits) for name, hits in right.items() if hits}
    assert found.per_class == pytest.approx(expected) and NAMES[7] not in found.per_class
    assert found.mean_class_accuracy == pytest.approx(sum(expected.values()) / len(expected))
    assert found.confusion == confusion and found.clips == 40


def test_a_constant_matrix_is_chance() -> None:
    found = classify(torch.zeros(8, 5), [0, 1, 2, 3, 4], NAMES)
    assert found.top1 == pytest.approx(100 / 8) and found.top5 == pytest.approx(500 / 8)
    few = classify(torch.zeros(3, 2), [0, 1], NAMES[:3])
    assert few.top5 == 100.0


def test_prompts_are_averaged_class_by_class() -> None:
    texts = prompts_of(("run", "jump"), ("a video of {}", "{}"))
    assert texts == ["a video of run", "run", "a video of jump", "jump"]
    sim = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0], [0.0, 7.0]])
    assert average_prompts(sim, 2).tolist() == [[2.0, 0.0], [0.0, 6.0]]
    with pytest.raises(UserError, match="evaluation.prompts: got 'a video'; allowed: texts with {} once"):
        prompts_of(("run",), ("a video",))


@pytest.mark.parametrize(
    ("sim", "own", "message"),
    [
        (torch.zeros(8, 2), [0], r"got \[8, 2\] for 8 classes and 1 clips"),
        (torch.zeros(8, 1), [8], "in range"),
        (torch.full((8, 1), torch.nan), [0], "got NaN"),
        (torch.zeros(8, 0), [], "allowed: "),
    ],
)
def test_what_does_not_fit_is_refused(sim: torch.Tensor, own: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classify(sim, own, NAMES)


def test_the_report_shows_accuracy_and_confusion(tmp_path: Path) -> None:
    run = read_run(make_run_folder(tmp_path / "run", frames=(4,)))
    assert classification_section(run) is None
    sim = torch.eye(3)[:, [0, 0, 1, 2]]  # the second clip is of class 1 and taken for 0
    found = asdict(classify(sim, [0, 1, 1, 2], ("run", "jump", "sit")))
    rows = [{**row, "classification": found} for row in run.evaluations]
    section = classification_section(replace(run, evaluations=rows))
    assert section is not None
    _, table, _, worst, picture = section.blocks
    assert table.rows[0][2] == "zero-shot" and table.rows[0][4:] == ["240", "4", "3", "33.3", "75.0", "100.0", "83.3"]
    assert worst.rows[0] == ["jump", "2", "50.0", "run (1)"]
    assert picture.svg.startswith("<svg") and "jump" in picture.svg
    config = {**run.config, "evaluation": {"average_sources": True}}
    mean = mean_over_sources_section(replace(run, config=config, evaluations=rows))
    assert mean is not None and any(row[1] == "classification/top1" and row[3] == "75.0" for row in mean.blocks[1].rows)
