"""Own clips into a feature store: equal to the network by hand, resumable, the same on two ranks, trained on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frozen_fast.cli import main
from frozen_fast.config import config_from_mapping, dump_yaml
from frozen_fast.data.features.feature_store import FeatureStore
from frozen_fast.data.load.for_model import FrameFormat
from frozen_fast.data.load.video_frames import TestTransform, load_video
from frozen_fast.models import DualEncoder
from frozen_fast.models.feature_tower import feature_tower, weights_fingerprint
from frozen_fast.search.row_table import read_table
from support.runs import REPOSITORY, environment, losses, make_data, read_json, tiny_mapping, torchrun
from support.search_runs import SearchRun, finished_run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SECONDS = 1.2  # of a clip of make_data: 12 frames at 10 a second
CPU = ["--device", "cpu", "--precision", "fp32", "--decoder", "pyav"]
TIMM = ["--tower", "timm:test_resnet", "--weights", "none", "--resolution", "64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SearchRun:
    """Twelve clips, eight of them in the split train, and a model of two frames trained on them."""
    found = finished_run(tmp_path_factory.mktemp("run"))
    rows = [json.loads(line) for line in found.videos.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "split": "train" if number < 8 else "val"}) for number, row in enumerate(rows)]
    found.videos.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def extract(source: Path, store: Path, name: str, *more: str) -> int:
    where = ["--source", str(source), "--output", str(store), "--expert", name]
    return main(["extract", *where, *CPU, *more])


def vectors(store: Path, name: str) -> dict[str, np.ndarray | None]:
    """Video id -> its vectors [N, D]; None where it has none."""
    opened = FeatureStore(store)
    arrays = opened.expert(name)
    return {
        video: arrays["vectors"][arrays["ends"][row] : arrays["ends"][row + 1]] if arrays["available"][row] else None
        for video, row in opened.rows.items()
    }


def test_vectors_are_those_of_the_network_on_the_middle_frames(
    run: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six segments of two frames: the vectors of their first frames (the middle of an even segment), in order."""
    store = tmp_path / "store"
    assert extract(run.videos, store, "frames", *TIMM, "--rate", "5", "--pool", "none") == 0
    said = capsys.readouterr().out
    assert "frames of width" in said and "one set per video; 12 videos (12 extracted, 0 kept, 0 without, 0 bad)" in said
    assert extract(run.videos, store, "mean", *TIMM, "--rate", "5") == 0
    torch.manual_seed(0)
    section = {"tower": "timm", "size": "test_resnet", "resolution": 64}
    tower = feature_tower(config_from_mapping({"model": {"video": section}}), None, published_pixels=True)
    origin = FeatureStore(store).experts["frames"].origin
    assert origin is not None and origin["fingerprint"] == weights_fingerprint(tower.module)
    assert (origin["network"]["size"], origin["rate"], origin["pool"]) == ("test_resnet", 5.0, "none")
    frames = load_video(run.videos.parent / "clips" / "c3.avi", 6)
    pixels = TestTransform(FrameFormat(64, tower.mean, tower.std))(frames)
    with torch.no_grad():
        expected_ND = tower.encode(pixels[:, None]).numpy()
    np.testing.assert_allclose(vectors(store, "frames")["c3"], expected_ND, atol=1e-5)
    np.testing.assert_allclose(vectors(store, "mean")["c3"], expected_ND.mean(0, keepdims=True), atol=1e-5)
    assert FeatureStore(store).split("train").videos == tuple(f"c{number}" for number in range(8))


def test_checkpoints_and_video_networks_are_experts(run: SearchRun, tmp_path: Path) -> None:
    store = tmp_path / "store"
    checkpoint = ["--checkpoint", str(run.checkpoint), "--rate", "0"]
    assert extract(run.videos, store, "frozen", *checkpoint) == 0
    model = DualEncoder.from_pretrained(run.checkpoint)
    pixels = TestTransform(FrameFormat(32, model.mean, model.std))(  # type: ignore[arg-type]
        load_video(run.videos.parent / "clips" / "c5.avi", 2)
    )
    with torch.no_grad():
        expected_D = model.video_features(pixels[None])["embedding"].numpy()
    np.testing.assert_allclose(vectors(store, "frozen")["c5"], expected_D, atol=1e-5)
    video = ["--tower", "torchvision_video:mc3_18", "--weights", "none", "--resolution", "32", "--frames", "4"]
    assert extract(run.videos, store, "motion", *video, "--pool", "none", "--max-vectors", "1") == 0
    assert {name: feature.kind for name, feature in FeatureStore(store).experts.items()} == {
        "frozen": "vector",
        "motion": "set",
    }
    assert vectors(store, "motion")["c0"].shape == (1, 512)  # type: ignore[union-attr]


def test_own_clips_train_collaborative_experts(run: SearchRun, tmp_path: Path) -> None:
    """Two experts and the captions' tokens from own clips, then train.py: the loss falls."""
    store, folder = tmp_path / "store", tmp_path / "run"
    assert extract(run.videos, store, "image.resnet", *TIMM, "--rate", "5", "--pool", "none") == 0
    assert extract(run.videos, store, "frozen", "--checkpoint", str(run.checkpoint)) == 0
    tower = tiny_mapping(make_data(tmp_path / "data", videos=1, pictures=1), folder)["model"]["text"]["name"]
    text = ["--output", str(store), "--text", "words", "--tower", f"transformers:{tower}", "--device", "cpu"]
    assert main(["extract", *text]) == 0
    opened = FeatureStore(store)
    widths = {name: feature.width for name, feature in opened.experts.items()}
    assert all(len(tokens) > 2 for video in opened.captions for tokens in opened.caption_tokens("words", video))
    source = {"format": "features", "path": str(store)}
    mapping: dict[str, Any] = {
        "run_folder": str(folder),
        "model": {
            "kind": "collaborative_experts",
            "experts": {
                "experts": [
                    {"name": "frozen", "width": widths["frozen"]},
                    {"name": "image.resnet", "width": widths["image.resnet"], "clusters": 2, "max_vectors": 6},
                ],
                "width": 16,
                "text_width": opened.texts["words"].width,
                "text_clusters": 2,
                "max_text_tokens": 12,
            },
        },
        "data": {"sources": [{"name": "train", "split": "train", **source}]},
        "curriculum": {"stages": [{"global_batch_size": 8, "steps": 60}]},
        "optimizer": {"name": "adam", "learning_rate": 0.01},
        "loss": {"name": "max_margin", "margin": 0.2},
        "training": {"device": "cpu", "precision": "fp32"},
        "evaluation": {"every": "end", "sources": [{"name": "val", "split": "val", **source}]},
    }
    (tmp_path / "e.yaml").write_text(dump_yaml(config_from_mapping(mapping)), encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(tmp_path / "e.yaml")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    values = losses(folder)
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])
    assert read_json(folder / "metrics.json")["evaluations"][0]["num_videos"] == 4


def test_a_bad_file_is_named_and_read_when_it_is_whole(
    run: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, store = tmp_path / "clips", tmp_path / "store"
    shutil.copytree(run.videos.parent / "clips", clips)
    (clips / "c3.avi").write_bytes(b"no video")
    assert extract(clips, store, "e", *TIMM) == 0
    said = capsys.readouterr()
    assert "12 videos (11 extracted, 0 kept, 1 without, 1 bad)" in said.out and "bad clips: c3.avi;" in said.err
    (bad,) = [json.loads(line) for line in (store / "experts" / "e.bad_clips.jsonl").read_text().splitlines()]
    assert (bad["clip_id"], bad["cause"]) == ("c3.avi", "not_a_video")
    assert vectors(store, "e")["c3.avi"] is None
    before = vectors(store, "e")["c4.avi"]
    shutil.copyfile(run.videos.parent / "clips" / "c3.avi", clips / "c3.avi")
    assert extract(clips, store, "e", *TIMM) == 0
    assert "12 videos (1 extracted, 11 kept, 0 without, 0 bad)" in capsys.readouterr().out
    np.testing.assert_array_equal(vectors(store, "e")["c4.avi"], before)
    assert vectors(store, "e")["c3.avi"] is not None and not (store / "experts" / "e.bad_clips.jsonl").read_text()


def test_a_killed_extraction_continues_without_doubles(
    run: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from frozen_fast.search import embed_job\n"
        "embed_job.PART_ROWS = 2\n"
        "add = embed_job.PartWriter.add\n"
        "def slow(self, row, value):\n"
        "    add(self, row, value)\n"
        "    time.sleep(0.5)\n"
        "embed_job.PartWriter.add = slow\n"
        "from frozen_fast.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    store, whole = tmp_path / "store", tmp_path / "whole"
    options = [*TIMM, "--rate", "5", "--pool", "none", *CPU]
    command = [sys.executable, str(script), "extract", "--source", str(run.videos), "--output", str(store)]
    process = subprocess.Popen(
        [*command, "--expert", "e", *options], env=environment(), cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    work = store / "work" / "e"
    deadline = time.monotonic() + 120
    while not len(list(work.glob("part-*.arrow"))) >= 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (store / "store.json").exists()
    done = sum(read_table(path).num_rows for path in work.glob("part-*.arrow"))
    assert 0 < done < 12
    assert extract(run.videos, store, "e", *TIMM, "--rate", "5", "--pool", "none") == 0
    assert f"12 videos ({12 - done} extracted, {done} kept, 0 without, 0 bad)" in capsys.readouterr().out
    assert not work.exists()
    assert extract(run.videos, whole, "e", *TIMM, "--rate", "5", "--pool", "none") == 0
    one, two = vectors(whole, "e"), vectors(store, "e")
    assert list(one) == list(two) and all(value is not None and len(value) == 6 for value in two.values())
    for video in one:
        np.testing.assert_allclose(one[video], two[video], atol=1e-5)


def test_two_processes_give_the_store_of_one(run: SearchRun, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert extract(run.videos, one, "e", *TIMM, "--rate", "5", "--pool", "none") == 0
    options = [*TIMM, "--rate", "5", "--pool", "none", *CPU]
    where = ["--source", str(run.videos), "--output", str(two), "--expert", "e"]
    command = torchrun("-m", "frozen_fast", "extract", *where, *options)
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 videos (12 extracted, 0 kept, 0 without, 0 bad)" in done.stdout
    first, second = vectors(one, "e"), vectors(two, "e")
    assert list(first) == list(second)
    for video in first:
        np.testing.assert_allclose(first[video], second[video], atol=1e-5)
    assert FeatureStore(one).experts == FeatureStore(two).experts


def test_mistakes_are_one_line(run: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert extract(run.videos, store, "e", *TIMM) == 0

    def said(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["extract", "--output", str(store), *CPU, *arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")

    source = ["--source", str(run.videos)]
    assert said(*source, "--expert", "../e", *TIMM).startswith("--expert: got '../e'; allowed: letters")
    other = said(*source, "--expert", "e", *TIMM, "--rate", "3")
    assert other.startswith("--expert: got 'e', which the store contains with other rate;")
    assert other.endswith("allowed: another name, or --fresh")
    assert said(*source, "--expert", "x", "--tower", "clip:ViT-B/32").startswith("--weights: got none with the tower")
    assert said(*source, "--expert", "x", "--tower", "vgg:16").startswith("--tower: got 'vgg'")
    assert said("--expert", "x", *TIMM).startswith("--source: got none; allowed:")
    (tmp_path / "other").mkdir()
    shutil.copyfile(run.videos.parent / "clips" / "c0.avi", tmp_path / "other" / "new.avi")
    foreign = said("--source", str(tmp_path / "other"), "--expert", "x", *TIMM)
    assert foreign == f"--source: got new.avi, which {store} lacks; allowed: its videos, another --output"
    assert said(*source, "--expert", "x", "--checkpoint", str(run.checkpoint), "--frames", "9").startswith(
        "--frames: got 9; allowed: 1 to 2"
    )
    assert said("--text", "t", "--tower", "transformers:no/such/model").startswith("model.text.name: got")
