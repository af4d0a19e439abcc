"""benchmarks/throughput_agreement.py: what is compared with what; the runs themselves are stood in for."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from frozen_fast.errors import UserError
from support.runs import REPOSITORY


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import throughput_agreement

    return throughput_agreement


def metered(frames: int, *, training: float, stall: float) -> dict[str, Any]:
    """A row of stages.json: 120 clips, 100 of them after warm-up, on two devices."""
    return {
        "frames": frames,
        "clips": 120,
        "num_devices": 2,
        "clips_per_second": 100 / (training + stall),
        "stall_share": 0.1,
        "seconds": 100.0,
        "training_seconds": training,
        "stall_seconds": stall,
        "warmup_seconds": 7.0,
        "checkpoint_seconds": 8.0,
        "other_seconds": 1.0,
    }


def measured(rate: float) -> Callable[..., dict[str, Any]]:
    windows = [{"steps": 1, "clips": 10, "seconds": 10 / one, "stall_seconds": 0.0} for one in (rate, 2 * rate, rate)]
    return lambda key, *rest: {
        "cause": "ok",
        "modes": {"end_to_end": {"windows": windows}},
        "precision": "fp32",
        "device": "Test CPU",
    }


def run(
    agreement: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, rate: float
) -> tuple[int, dict[str, Any]]:
    rows = [metered(1, training=18.0, stall=2.0), metered(4, training=30.0, stall=10.0)]
    monkeypatch.setattr(agreement, "train", lambda *rest: rows)
    monkeypatch.setattr(agreement, "measure_stage", measured(rate))
    manifest = folder / "clips.jsonl"
    manifest.touch()
    output = folder / "agreement.json"
    options = ["--rounds", "2", "--stages", "1=8x15,4=8x15", "--data", str(manifest), "--output", str(output)]
    code = agreement.main(options)
    return code, json.loads(output.read_text(encoding="utf-8"))


def test_training_and_stall_of_timed_clips_are_compared(
    agreement: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rounds: 200 clips in 40 s and in 80 s, on two devices; warm-up and checkpoints are left out."""
    code, result = run(agreement, monkeypatch, tmp_path, rate=100 / 30)
    first, second, whole = result["agreement"]
    assert (first["clips"], second["clips"], whole["clips"]) == (200, 200, 400)
    assert first["run_gpu_hours"] == pytest.approx(2 * 40 / 3600)
    assert second["run_gpu_hours"] == pytest.approx(2 * 80 / 3600)
    assert first["projected_gpu_hours"] == pytest.approx(2 * 200 / (100 / 30) / 3600)
    assert [row["difference"] for row in result["agreement"]] == pytest.approx([0.5, -0.25, 0.0])
    assert code == 0
    printed = capsys.readouterr().out
    assert "| whole run | 400 |  |  | 0.06667 | 0.06667 | +0.0% |" in printed
    assert "training 24.0%, stall 6.0%, warmup 7.0%, checkpoint 8.0%, other 1.0%" in printed


@pytest.mark.parametrize(("factor", "code"), [(1.04, 0), (0.96, 0), (1.06, 1), (0.94, 1)])
def test_more_than_five_per_cent_is_an_error(
    agreement: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factor: float, code: int
) -> None:
    assert run(agreement, monkeypatch, tmp_path, rate=factor * 100 / 30)[0] == code


def test_both_sides_get_the_same_settings(
    agreement: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command of the run and that of the measurement name the same model, clips and launcher."""
    commands: list[list[str]] = []

    def refuse(command: list[str], *, log: Path, **rest: Any) -> argparse.Namespace:
        commands.append(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("error: enough\n")
        return argparse.Namespace(exit_code=2, timed_out=False, over_memory=False)

    monkeypatch.setattr(agreement, "run_limited", refuse)
    monkeypatch.setattr("throughput.run_limited", refuse)
    options = agreement.parse(["--accelerate", "two.yaml", "--text-tokens", "16", "training.precision=fp32"])
    with pytest.raises(UserError, match="enough"):
        agreement.train(options, [(1, 8, 15)], tmp_path / "clips.jsonl", tmp_path / "run")
    key = agreement.StageKey(frames=1, batch_size=8, attention=options.attention)
    with pytest.raises(UserError, match="enough"):
        agreement.measure_stage(key, options, tmp_path / "clips.jsonl", tmp_path)
    shared = ["model.video.attention=sdpa", "model.text.max_tokens=16", "training.precision=fp32", "two.yaml"]
    for command in commands:
        assert [word for word in shared if word not in command] == []
        assert any(str(tmp_path / "clips.jsonl") in word for word in command if word.startswith("data.sources="))


def test_a_steady_load_keeps_half_of_the_cores_busy(agreement: ModuleType) -> None:
    def children() -> set[psutil.Process]:
        return set(psutil.Process().children())

    cores, before = os.sched_getaffinity(0), children()
    with agreement.steady_load():
        kept, burners = os.sched_getaffinity(0), children() - before
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and any(len(burner.cpu_affinity()) > 1 for burner in burners):
            time.sleep(0.05)
        assert len(kept) == (len(cores) + 1) // 2
        assert sorted(core for burner in burners for core in burner.cpu_affinity()) == sorted(cores - kept)
    assert os.sched_getaffinity(0) == cores and not children() - before


def test_stages_are_read_from_the_command_line(agreement: ModuleType) -> None:
    assert agreement.parse_stages("1=32x60,4=16x40") == [(1, 32, 60), (4, 16, 40)]
    with pytest.raises(UserError, match="--stages: got '1=32'"):
        agreement.parse_stages("1=32")
