"""A run from config to run folder, in this process, on real clips and pictures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from frozen_fast import DualEncoder
from frozen_fast.common.files import read_json_lines
from frozen_fast.config import load_config
from frozen_fast.data import DataPosition, plan_steps
from frozen_fast.errors import UserError
from frozen_fast.losses import contrastive_loss
from frozen_fast.training.parts import build_model, build_training_loader, read_training_sources
from frozen_fast.training.run import train
from support.runs import make_data, read_json, tiny_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint run of videos and pictures with evaluation, accumulation, a trace and both sources' own batch sizes."""
    folder = tmp_path_factory.mktemp("runs") / "joint"
    config = tiny_config(
        data,
        folder,
        data={
            "sources": [
                {"name": "videos", "path": str(data["videos"])},
                {"name": "pictures", "path": str(data["pictures"])},
            ],
            "decode": {"backend": "pyav", "threads": 1},
        },
        curriculum={
            "stages": [
                {"frames": 1, "batch_sizes": {"videos": 4, "pictures": 6}, "steps": 6},
                {"frames": 4, "batch_sizes": {"videos": 2, "pictures": 6}, "steps": 4, "learning_rate_scale": 0.5},
            ],
            "gradient_accumulation_steps": 2,
        },
        optimizer={"warmup_steps": 2, "schedule": "cosine", "gradient_clip_norm": 0},
        training={"precision": "fp32", "device": "cpu", "profile_steps": 1},
        checkpoints={"every_steps": 3, "keep": 2},
        evaluation={
            "every": "stage",
            "sources": [{"name": "held_out", "path": str(data["videos"])}],
            "batch_size": 8,
            "stride_seconds": 0,
        },
    )
    assert train(config) == 0
    return folder


def test_every_step_stands_once_with_what_it_was(finished: Path) -> None:
    rows = read_json_lines(finished / "steps.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["stage"] for row in rows] == [0] * 6 + [1] * 4
    assert [row["source"] for row in rows] == ["videos", "pictures"] * 5
    assert [row["frames"] for row in rows] == [1] * 6 + [4, 1, 4, 1]
    assert [row["clips"] for row in rows] == [8, 12] * 3 + [4, 12] * 2
    assert rows[0]["learning_rate"] == pytest.approx(5e-4) and rows[1]["learning_rate"] == pytest.approx(1e-3)
    assert rows[6]["learning_rate"] < 0.5 * rows[5]["learning_rate"]
    assert all(row["gradient_norm"] > 0 for row in rows), "without clipping too"
    assert not any(row["skipped"] for row in rows)
    assert all(0 <= row["stall_seconds"] <= row["seconds"] for row in rows)
    assert [row["warmup"] for row in rows] == [True] + [False] * 5 + [True] + [False] * 3
    assert set(rows[0]) == {
        "step",
        "stage",
        "frames",
        "source",
        "loss",
        "learning_rate",
        "gradient_norm",
        "clips",
        "seconds",
        "stall_seconds",
        "warmup",
        "time",
        "bad_clips",
        "skipped",
    }


def test_the_run_folder_is_complete(finished: Path) -> None:
    status = read_json(finished / "status.json")
    assert (status["state"], status["exit_code"], status["step"], status["stage"]) == ("done", 0, 10, 1)
    assert load_config(finished / "config.yaml").curriculum.stages[1].frames == 4
    environment = read_json(finished / "environment.json")
    assert environment["world_size"] == 1 and environment["precision"] == "fp32"
    assert environment["decode_backends"]["videos"] == {"pyav": 3 * 8 + 2 * 4}
    assert sum(environment["decode_backends"]["pictures"].values()) == 60
    assert environment["attention_backends"] and environment["fused_ops"] == "cpu_c"
    assert environment["sources"]["pictures"] == {"clips": 12, "kind": "image", "drops": {}}
    assert "held_out" in (finished / "report.md").read_text(encoding="utf-8")
    assert (finished / "report.html").stat().st_size > 1000
    assert {path.name for path in (finished / "traces").iterdir()} == {
        "stage_0.trace.json",
        "stage_0.kernels.json",
        "stage_1.trace.json",
        "stage_1.kernels.json",
    }
    kernels = read_json(finished / "traces" / "stage_1.kernels.json")
    assert (kernels["what"], kernels["steps"]) == ("operator", 1)
    names = [row["name"] for row in kernels["rows"]]
    assert "aten::addmm" in names and kernels["rows"][0]["share"] == max(row["share"] for row in kernels["rows"])
    assert sum(row["share"] for row in kernels["rows"]) <= 1.0 + 1e-9
    events = read_json(finished / "traces" / "stage_1.trace.json")["traceEvents"]
    assert names[0] in {event.get("name") for event in events}
    assert f"| {names[0]} " in (finished / "report.md").read_text(encoding="utf-8")


def test_stage_rows_add_up_to_their_wall_time(finished: Path) -> None:
    first, second = read_json(finished / "stages.json")
    assert (first["steps"], first["clips"], first["video_frames"]) == (6, 60, 60)
    assert (second["steps"], second["clips"], second["video_frames"]) == (4, 32, 2 * 4 * 4 + 24)
    assert second["batch_sizes"] == {"videos": 2, "pictures": 6}
    for row in (first, second):
        parts = ("training", "stall", "warmup", "evaluation", "checkpoint", "other")
        assert sum(row[f"{part}_seconds"] for part in parts) == pytest.approx(row["seconds"], rel=0.01)
        assert all(row[f"{part}_seconds"] > 0 for part in ("training", "warmup", "evaluation", "checkpoint"))
        assert row["gpu_hours"] < row["seconds"] / 3600
        assert row["clips_per_second"] > 0 and row["flops_per_clip"] > 0 and row["peak_memory_bytes"] > 1e8


def test_each_stage_was_evaluated(finished: Path) -> None:
    rows = read_json(finished / "metrics.json")["evaluations"]
    assert [(row["step"], row["stage"], row["frames"], row["source"]) for row in rows] == [
        (6, 0, 1, "held_out"),
        (10, 1, 4, "held_out"),
    ]
    for row in rows:
        assert (row["protocol"], row["num_queries"], row["num_videos"], row["windows"]) == ("plain", 24, 24, 24)
        assert 0 <= row["metrics"]["t2v/R@1"] <= row["metrics"]["t2v/R@50"] == 100


def test_the_last_checkpoint_is_a_model_and_only_the_newest_are_kept(finished: Path) -> None:
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["step_00000009", "step_00000010"]
    model = DualEncoder.from_pretrained(finished / "checkpoints" / names[-1])
    assert model.learned_frames == 4
    assert model.encode_video(torch.zeros(2, 4, 3, 32, 32)).shape == (2, 16)
    assert model.encode_text(["a red circle", "two dogs"]).shape == (2, 16)


def test_a_second_start_in_the_same_folder_is_refused_and_changes_nothing(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already contains a run; allowed: --resume auto to continue it"):
        train(load_config(finished / "config.yaml"))
    with pytest.raises(UserError, match="^--resume: the config differs .* seed was 1, got 2"):
        train(load_config(finished / "config.yaml", ["seed=2"]), resume="auto")
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_resuming_a_finished_run_ends_at_once_with_the_same_numbers(finished: Path) -> None:
    kept = ("steps.jsonl", "stages.json", "metrics.json")
    before = [(finished / name).read_bytes() for name in kept]
    assert train(load_config(finished / "config.yaml"), resume="auto") == 0
    assert [(finished / name).read_bytes() for name in kept] == before
    assert read_json(finished / "status.json")["state"] == "done"


def test_an_accumulated_step_is_the_mean_of_its_passes(data: dict[str, Path], tmp_path: Path) -> None:
    """Loss and gradient norm of a step of two passes, against gradients added up by hand."""
    config = tiny_config(
        data,
        tmp_path / "run",
        curriculum={
            "stages": [{"frames": 2, "global_batch_size": 4, "steps": 1}],
            "gradient_accumulation_steps": 2,
        },
        optimizer={"gradient_clip_norm": 1e9},
    )
    assert train(config) == 0
    model = build_model(config, torch.device("cpu"))
    sources = read_training_sources(config)
    specs = plan_steps(
        {"videos": 24},
        {"videos": 1.0},
        "round_robin",
        1,
        batch_sizes={"videos": 4},
        frames=2,
        accumulation=2,
        num_steps=1,
        start=DataPosition(),
    )
    values = []
    for batch in build_training_loader(config, sources, model, torch.device("cpu")).batches(specs):
        text, video, _ = model(batch.video, batch.text)
        loss = contrastive_loss(video["embedding"], text["embedding"], config.loss.temperature)
        (loss / 2).backward()
        values.append(loss.item())
    squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    (row,) = read_json_lines(tmp_path / "run" / "steps.jsonl")
    assert len(values) == 2 and row["loss"] == pytest.approx(sum(values) / 2, rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)
