"""benchmarks/model_step.py: its baseline computes the same model, and a whole run at toy sizes writes its figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from frozen_fast.models import VIDEO_SIZES, SpaceTimeTransformer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZE = "pico_patch16_32"


@pytest.fixture
def model_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("model_step")


def test_the_baseline_computes_the_same_model(model_step: ModuleType) -> None:
    ours = SpaceTimeTransformer(VIDEO_SIZES[SIZE], 4, time_init="random")
    with torch.no_grad():
        ours.temporal_embed.normal_()
    baseline = model_step.ReleasedTower(VIDEO_SIZES[SIZE], 4)
    baseline.load_state_dict(ours.state_dict())
    for frames in (1, 3):
        video = torch.randn(2, frames, 3, 32, 32)
        torch.testing.assert_close(baseline(video), ours(video), rtol=0, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_a_run_writes_ratios_to_both_baselines(
    model_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    from transformers import DistilBertConfig

    tiny = {model_step.TEXT: lambda: DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=2)}
    monkeypatch.setattr(model_step, "KNOWN_ARCHITECTURES", tiny)
    output = tmp_path / "result.json"
    command = f"--device cpu --size {SIZE} --frames 2=1 --contenders released,sdpa,xformers --windows 2"
    rest = ["--window-seconds", "0.001", "--warmup", "1", "--output", str(output), *(["--whole"] if whole else [])]
    assert model_step.main([*command.split(), *rest]) == 0
    result = json.loads(output.read_text())
    rows = {(row["frames"], row["contender"], row["precision"]): row for row in result["rows"]}
    assert len(rows) == 3 * 2
    for (frames, contender, _), row in rows.items():
        if contender == "xformers":
            assert "needs a CUDA GPU" in row["left_out"]
            continue
        seconds = row["seconds"]["median"]
        assert row["clips_per_second"] == pytest.approx(row["batch"] / seconds)
        for baseline in ("fp32", "bf16"):
            released = rows[frames, "released", baseline]["seconds"]["median"]
            assert row[f"times_released_{baseline}"] == pytest.approx(released / seconds)
        assert row["peak_bytes"] > 0
    assert result["machine"]["device_type"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "released,spda"], "--contenders: got 'spda' .did you mean 'sdpa'"),
        (["--precisions", "fp64"], "--precisions: got 'fp64'"),
        (["--size", "huge"], "--size: got 'huge'"),
    ],
)
def test_mistakes_are_named(
    model_step: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        model_step.parse(arguments)
    assert caught.value.code == 2
    import re

    assert re.search(message, capsys.readouterr().err)
