"""A model for others: Hub folders and their cache, the model card, exported programs, labels, example scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import frozen_fast
from frozen_fast import DualEncoder
from frozen_fast.cli import main
from frozen_fast.errors import UserError
from frozen_fast.search import embed_videos
from frozen_fast.sharing.hub_upload import write_hub_folder
from frozen_fast.sharing.tower_export import export_towers
from support.runs import REPOSITORY, environment
from support.search_runs import COLOURS, SearchRun, colour_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SearchRun:
    return colour_run(tmp_path_factory.mktemp("colours"))


@pytest.fixture
def cached(run: SearchRun, tmp_path: Path) -> Path:
    """A Hub cache that holds the model as org/colours, as huggingface_hub lays one out."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "cache" / "models--org--colours"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    write_hub_folder(run.checkpoint, folder / "snapshots" / revision, name="org/colours", licence="mit")
    return tmp_path / "cache"


def test_a_name_is_loaded_from_the_offline_cache(run: SearchRun, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cached))
    own, shared = DualEncoder.from_pretrained(run.checkpoint), DualEncoder.from_pretrained("org/colours")
    video = torch.randn(1, own.learned_frames, 3, own.resolution, own.resolution)
    with torch.no_grad():
        assert torch.equal(shared.encode_video(video), own.encode_video(video))
        assert torch.equal(shared.encode_text(["a red ball"]), own.encode_text(["a red ball"]))
    assert isinstance(frozen_fast.load_model("org/colours"), DualEncoder)
    clip = run.videos.parent / "red.webm"
    rows = [model.embed_videos([clip], decoder="pyav") for model in (shared, own)]
    assert torch.equal(*rows), "run.json holds the run's test windows"
    with pytest.raises(
        UserError, match=r"^checkpoint: got 'org/nothing', which is neither a path on this machine nor found on the Hub"
    ):
        DualEncoder.from_pretrained("org/nothing")


def test_push_writes_what_a_reader_needs_and_a_card_of_the_run(run: SearchRun, tmp_path: Path) -> None:
    output = tmp_path / "folder"
    arguments = ["--checkpoint", str(run.checkpoint), "--repo", "org/colours", "--license", "cc-by-nc-4.0"]
    assert main(["push", *arguments, "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: frozen_fast\nlicense: cc-by-nc-4.0\n")
    assert "| videos | training | 4 | video |" in card and "| 2 | 120 | 480 |" in card
    metrics = json.loads((run.folder / "metrics.json").read_text())["evaluations"][-1]["metrics"]
    assert f"| colours | plain | 2 | 4 | 4 | {metrics['t2v/R@1']:.1f} |" in card
    assert main(["push", *arguments, "--output", str(output)]) == 2
    assert main(["push", *arguments[:2], "--repo", "colours", "--license", "mit", "--output", str(tmp_path / "x")]) == 2


@pytest.mark.parametrize("frames", [1, 4, 8])
def test_onnx_programs_equal_the_model(run: SearchRun, frames: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    video_path, text_path = export_towers(run.checkpoint, tmp_path, frames=frames, expansion="bilinear")
    model = DualEncoder.from_pretrained(run.checkpoint, frames, "bilinear")
    video_program = onnxruntime.InferenceSession(str(video_path))
    text_program = onnxruntime.InferenceSession(str(text_path))
    assert json.loads((tmp_path / "export.json").read_text())["frames"] == frames
    assert (tmp_path / "tokenizer.json").is_file()
    with torch.no_grad():
        for batch in (1, 3):
            video = torch.randn(batch, frames, 3, model.resolution, model.resolution)
            (found,) = video_program.run(None, {"video": video.numpy()})
            np.testing.assert_allclose(found, model.encode_video(video).numpy(), atol=1e-4)
        for texts in (["a dog"], ["a red ball moves right", "b", "a green ball"]):
            tokens = model.tokenizer(texts)
            (found,) = text_program.run(None, {name: value.numpy() for name, value in tokens.items()})
            np.testing.assert_allclose(found, model.encode_text(texts).numpy(), atol=1e-4)


def test_torch_programs_equal_the_model(run: SearchRun, tmp_path: Path) -> None:
    where = ["--checkpoint", str(run.checkpoint), "--output", str(tmp_path), "--format", "torch"]
    assert main(["export", *where]) == 0
    model = DualEncoder.from_pretrained(run.checkpoint)
    video = torch.randn(5, model.learned_frames, 3, model.resolution, model.resolution)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "video.pt2").module()(video)
        torch.testing.assert_close(found, model.encode_video(video), atol=1e-5, rtol=0)
    assert main(["export", *where[:-1], "tflite"]) == 2


def test_labels_with_templates(run: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, templates = tmp_path / "labels.txt", tmp_path / "templates.txt"
    labels.write_text("".join(f"{colour}\n" for colour in COLOURS))
    templates.write_text("a {} ball moves right\n")
    arguments = ["--checkpoint", str(run.checkpoint), "--source", str(run.videos), "--labels", str(labels)]
    assert main(["label", *arguments, "--templates", str(templates), "--top", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["id"]: row["labels"][0]["label"] for row in rows} == {colour: colour for colour in COLOURS}
    assert all(len(row["labels"]) == 2 and row["labels"][0]["probability"] > 0.5 for row in rows)
    templates.write_text("a ball\n")
    assert main(["label", *arguments, "--templates", str(templates)]) == 2
    assert "--templates: got 'a ball'" in capsys.readouterr().err


def test_frames_and_transform_are_those_of_evaluation(run: SearchRun) -> None:
    model = DualEncoder.from_pretrained(run.checkpoint)
    clip = run.videos.parent / "red.webm"
    frames = frozen_fast.load_video(clip, 2)
    assert frames.dtype == torch.uint8 and frames.shape == (2, 3, 64, 64)
    with torch.no_grad():
        vector = model.encode_video(frozen_fast.transforms(model)(frames)[None])
    torch.testing.assert_close(vector, embed_videos(model, [clip], windows="middle", decoder="pyav"), atol=1e-5, rtol=0)
    later = frozen_fast.load_video(clip, 1, start_seconds=2.0)
    assert not torch.equal(later[0], frozen_fast.load_video(clip, 1, end_seconds=1.0)[0])
    with pytest.raises(UserError, match="^path: got .*nothing.mp4.*missing"):
        frozen_fast.load_video("nothing.mp4")
    with pytest.raises(UserError, match=r"^frames: got \[2, 64, 64, 3\]"):
        frozen_fast.transforms(model)(frames.permute(0, 2, 3, 1))


def example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(REPOSITORY / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_example_embed_folder(run: SearchRun) -> None:
    said = example("embed_folder.py", run.checkpoint, run.videos.parent, "a yellow ball moves right")
    assert said.splitlines()[0].endswith("yellow.webm")


def test_example_zero_shot_labels(run: SearchRun) -> None:
    labels = [f"a {colour} ball moves right" for colour in COLOURS]
    said = example("zero_shot_labels.py", run.checkpoint, run.videos.parent / "blue.webm", *labels)
    assert len(said.splitlines()) == 4 and said.splitlines()[0].endswith("a blue ball moves right")


def test_examples_finetune_and_compare(run: SearchRun, tmp_path: Path) -> None:
    overrides = ["curriculum.stages[0].steps=2", "curriculum.stages[0].global_batch_size=4", "training.device=cpu"]
    example("finetune_own_clips.py", run.checkpoint, run.videos, tmp_path / "finetuned", *overrides)
    said = example("compare_runs.py", run.folder, tmp_path / "finetuned")
    assert [line.split()[0] for line in said.splitlines()] == ["run", run.folder.name, "finetuned"]
