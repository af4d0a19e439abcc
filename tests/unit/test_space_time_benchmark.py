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
    baseline = importlib.import_module("released_tower").ReleasedTower(VIDEO_SIZES[SIZE], 4)
    baseline.load_state_dict(ours.state_dict())
    for frames in (1, 3):
        video = torch.randn(2, frames, 3, 32, 32)
        torch.testing.assert_close(baseline(video), ours(video), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["clip4clip", "clip2video"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_clip_baselines_compute_the_same_models(model_step: ModuleType, name: str, whole: bool) -> None:
    """Equal losses and gradients, with CLIP's towers, the temporal blocks, masks and both similarities."""
    case = model_step.Case(name, 5, 3, whole, "tiny")
    text = model_step.draw_text(case, torch.device("cpu"), torch.Generator().manual_seed(0))
    video = torch.randn(3, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    losses, gradients = [], []
    for released in (True, False):
        torch.manual_seed(0)
        form = model_step.FORMS[name](case, model_step.How(released, "auto", "auto", False), 5)
        loss = form.loss(video, text)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({key: one.grad for key, one in form.model.named_parameters() if one.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert set(gradients[0]) == set(gradients[1]) and len(gradients[0]) > 20
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max() + 1e-3))


def test_all_models_in_one_run(model_step: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = "--device cpu --model clip2video,clip4clip --size tiny --frames 4=2 --contenders released,auto,auto+plain"
    rest = ["--precisions", "bf16", "--whole", "--windows", "1", "--window-seconds", "0.001", "--output", str(output)]
    assert model_step.main([*command.split(), *rest]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["model"], row["contender"]) for row in rows] == [
        (name, contender) for name in ("clip2video", "clip4clip") for contender in ("released", "auto", "auto+plain")
    ]
    for row in rows:
        assert row["times_released_bf16"] > 0 and row["peak_bytes"] > 0
        assert row["model_flops_per_second"] == pytest.approx(row["model_flops"] / row["seconds"]["median"])
        assert 0 < row["mfu"] < 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_run_writes_ratios_to_both_baselines(
    model_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    from transformers import DistilBertConfig

    forms = importlib.import_module("step_forms")
    tiny = {forms.TEXT: lambda: DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=2)}
    monkeypatch.setattr(forms, "KNOWN_ARCHITECTURES", tiny)
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
        (["--model", "clip3clip"], "--model: got 'clip3clip' .did you mean 'clip4clip'"),
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


class OutOfResources(Exception):
    """As Triton's: neither a RuntimeError nor a ValueError."""


def test_a_contender_that_fails_is_a_row_and_the_others_are_measured(
    model_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One cannot be built, one fails in its step, and a case's batch does not fit."""
    build, step, draw = model_step.Contender.__init__, model_step.Contender.step, torch.randn

    def failing_build(self: object, name: str, *rest: object) -> None:
        build(self, name, *rest)
        self.name = name  # type: ignore[attr-defined]
        if name == "reference":
            raise OutOfResources("too much shared memory\nRequired: 300000")

    def failing_step(self: object, *rest: object) -> None:
        if self.name == "sdpa":  # type: ignore[attr-defined]
            raise OutOfResources
        step(self, *rest)

    def failing_draw(*shape: object, **rest: object) -> torch.Tensor:
        if isinstance(shape[0], tuple) and shape[0][:2] == (3, 2):
            raise torch.OutOfMemoryError("no room for the batch")
        return draw(*shape, **rest)

    monkeypatch.setattr(model_step.Contender, "__init__", failing_build)
    monkeypatch.setattr(model_step.Contender, "step", failing_step)
    monkeypatch.setattr(torch, "randn", failing_draw)
    output = tmp_path / "result.json"
    command = f"--device cpu --size {SIZE} --frames 2=3,2=1 --contenders released,reference,sdpa,cpu_c"
    rest = ["--precisions", "fp32", "--windows", "1", "--window-seconds", "0.001", "--output", str(output)]
    assert model_step.main([*command.split(), *rest]) == 0
    rows = {(row["batch"], row["contender"]): row for row in json.loads(output.read_text())["rows"]}
    assert all(rows[3, name]["failed"] == "OutOfMemoryError: no room for the batch" for name in ("released", "cpu_c"))
    assert rows[1, "reference"]["failed"] == "OutOfResources: too much shared memory"
    assert rows[1, "sdpa"]["failed"] == "OutOfResources" and "seconds" not in rows[1, "sdpa"]
    assert rows[1, "cpu_c"]["times_released_fp32"] > 0
    assert "failed: OutOfResources" in capsys.readouterr().out
