"""Which losses count as spikes, and what the report says of them, of clipping, and of steps that were not finite."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from frozen_fast.report.document import Document
from frozen_fast.report.loss_section import loss_section
from frozen_fast.report.loss_spikes import LEAST_STEPS, WINDOW, loss_spikes
from frozen_fast.report.markdown import to_markdown
from frozen_fast.report.run_data import read_run
from support.run_folder import make_run_folder


def rows(losses: list[float | None], source: str = "clips", stage: int = 0) -> list[dict[str, Any]]:
    return [{"step": step, "stage": stage, "source": source, "loss": loss} for step, loss in enumerate(losses, start=1)]


def noisy(count: int, seed: int = 0) -> list[float | None]:
    rng = random.Random(seed)
    return [3.0 - 0.002 * index + rng.gauss(0.0, 0.05) for index in range(count)]


def test_a_falling_noisy_loss_has_no_spike() -> None:
    assert not any(loss_spikes(rows(noisy(5000, seed))) for seed in range(3))


@pytest.mark.parametrize("place", [LEAST_STEPS, WINDOW - 1, WINDOW, 200, 4500])
def test_a_spike_is_found_with_its_step_and_source(place: int) -> None:
    losses = noisy(5000)
    losses[place] = 6.0
    (spike,) = loss_spikes(rows(losses, source="stills", stage=1))
    assert (spike.step, spike.source, spike.stage, spike.loss, spike.steps) == (place + 1, "stills", 1, 6.0, 1)
    before = sorted(losses[max(0, place - WINDOW) : place])  # type: ignore[type-var]
    assert spike.median == pytest.approx((before[(len(before) - 1) // 2] + before[len(before) // 2]) / 2)  # type: ignore[operator]


def test_too_few_losses_before_are_not_judged_and_a_skipped_step_has_none() -> None:
    losses = noisy(100)
    losses[LEAST_STEPS - 1] = 60.0
    losses[50] = None
    assert loss_spikes(rows(losses)) == []


def test_a_rise_to_a_new_level_is_one_spike() -> None:
    losses = noisy(300)
    losses[150:] = [loss + 2.0 for loss in losses[150:] if loss is not None]
    (spike,) = loss_spikes(rows(losses))
    assert 151 <= spike.step <= 180 and 10 <= spike.steps <= WINDOW


def test_sources_are_compared_with_themselves() -> None:
    """Every other step is of a source with a higher loss."""
    mixed = []
    for row, other in zip(rows(noisy(200)), rows(noisy(200, 1), source="stills"), strict=True):
        mixed += [
            {**row, "step": 2 * row["step"]},
            {**other, "step": 2 * other["step"] + 1, "loss": other["loss"] + 2.0},
        ]
    assert loss_spikes(mixed) == []


def test_losses_without_any_spread_have_spikes_above_one_percent() -> None:
    assert loss_spikes(rows([2.0] * 100 + [2.05] * 2)) == []
    (spike,) = loss_spikes(rows([2.0] * 100 + [2.5]))
    assert spike.deviations == pytest.approx(25.0)


def test_the_report_tells_of_spikes_clipping_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", steps_per_stage=120)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "optimizer": {"gradient_clip_norm": 2.0}}))
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for index, row in enumerate(steps):
        row["gradient_norm"] = 3.0 if index % 4 == 0 else 1.0
    steps[100]["loss"] += 40.0
    steps[110].update(loss=None, gradient_norm=None, skipped=True)
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    lost = {"step": 111, "stage": 0, "frames": 1, "source": "clips", "loss": "nan", "gradient_norm": "nan"}
    clips = [f"clip_{index}" for index in range(7)]
    (folder / "non_finite.jsonl").write_text(json.dumps({**lost, "action": "skip", "clip_ids": clips}) + "\n")
    run = read_run(folder)
    section = loss_section(run)
    assert section is not None and not run.missing and run.totals()[0].steps == 120
    text = to_markdown(Document(title="x", subtitle="", numbers=[], sections=[section]))
    assert "1 loss spike(s)" in text and re.search(rf"\| *101 *\| *1 *\| *{steps[100]['source']} \|", text)
    assert "25.2 %" in text.split("Clipped steps")[1], "30 of 119 norms of stage 1 are above 2"
    assert "NaN or infinite: 1 (1 skipped)" in text
    assert "step 111, stage 1, source clips: loss nan, gradient norm nan; skip; clip_0, clip_1" in text
    assert "and 3 more" in text
