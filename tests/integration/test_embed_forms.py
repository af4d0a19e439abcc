"""Ways to embed: the model's own method, CLIP2Video, spans and scenes, several sources in one index, a Ray cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import frozen_fast
from frozen_fast.cli import main
from frozen_fast.config import config_from_mapping
from frozen_fast.errors import UserError
from frozen_fast.models.clip.clip_towers import CLIP_MEAN, CLIP_SIZES, CLIP_STD, Clip
from frozen_fast.models.pretrained import read_run
from frozen_fast.search import Index, embed_run
from frozen_fast.search.collection import Cutter
from frozen_fast.search.index_folder import index_lock
from frozen_fast.search.scenes import scene_cuts
from frozen_fast.sharing.hub_upload import write_hub_folder
from frozen_fast.training.run import train
from support.datasets import write_manifest
from support.runs import REPOSITORY, environment, make_data, read_json, without_reports
from support.search_runs import SearchRun, finished_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SearchRun:
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def clip2video(tmp_path_factory: pytest.TempPathFactory) -> SearchRun:
    """A CLIP2Video run of 6 of a clip's frames at 7 a second; two of the eight clips are too short and masked."""
    pytest.importorskip("open_clip", reason="needs the extra clip")
    folder = tmp_path_factory.mktemp("clip2video")
    files = make_data(folder, videos=8)
    torch.manual_seed(0)
    torch.save(Clip(CLIP_SIZES["tiny"]).state_dict(), folder / "ViT-tiny.pt")
    tree = {
        "name": "clip2video",
        "run_folder": str(folder / "run"),
        "model": {
            "kind": "clip2video",
            "clip2video": {"clip": str(folder / "ViT-tiny.pt")},
            "video": {"attention": "sdpa"},
        },
        "data": {
            "sources": [{"name": "videos", "path": str(files["videos"])}],
            "sampling": {"rule": "fixed_rate", "frames_per_second": 7.0},
            "augmentation": {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)},
            "decode": {"backend": "pyav", "threads": 1},
        },
        "curriculum": {"stages": [{"frames": 9, "global_batch_size": 4, "steps": 4}]},
        "loss": {"temperature": 1.0, "average_directions": True},
        "training": {"precision": "fp32", "device": "cpu"},
        "evaluation": {"every": "end", "sources": [{"name": "clips", "path": str(files["videos"])}], "batch_size": 4},
    }
    config = config_from_mapping(tree)
    with without_reports():
        assert train(config) == 0
    checkpoint = folder / "run" / "checkpoints" / "step_00000004"
    return SearchRun(folder / "run", checkpoint, files["videos"], files["pictures"], config)


def embed(run: SearchRun, source: Path, output: Path, *more: str) -> int:
    where = ["--checkpoint", str(run.checkpoint), "--source", str(source), "--output", str(output)]
    return main(["embed", *where, "--device", "cpu", *more])


def ids(folder: Path) -> list[str]:
    index = Index(folder)
    return [name for name, alive in zip(index.rows["id"].to_pylist(), index.folder.alive_N, strict=True) if alive]


def clip_paths(run: SearchRun) -> list[Path]:
    rows = [json.loads(line) for line in run.videos.read_text(encoding="utf-8").splitlines()]
    return [run.videos.parent / row["path"] for row in rows]


def test_a_models_own_method_takes_the_windows_of_its_run(run: SearchRun, tmp_path: Path) -> None:
    """The run's stride of 0.2 s gives several windows a clip; the index holds what its evaluation compared."""
    assert embed(run, run.videos, tmp_path / "index") == 0
    indexed_VD = torch.from_numpy(Index(tmp_path / "index").folder.take(np.arange(12)))
    model = frozen_fast.load_model(run.checkpoint)
    found_VD = model.embed_videos(clip_paths(run), batch_size=5, workers=1)
    torch.testing.assert_close(found_VD, indexed_VD, atol=1e-6, rtol=0)
    assert (model.embed_videos(clip_paths(run), windows="middle") - found_VD).abs().max() > 1e-4
    assert (model.embed_videos(clip_paths(run), 1) - found_VD).abs().max() > 1e-4
    model.run = {}
    assert (model.embed_videos(clip_paths(run)) - found_VD).abs().max() > 1e-4, "defaults: a window every 2 s"
    assert model.embed_videos([]).shape == (0, 16)
    with pytest.raises(UserError, match="^frames: got 3; allowed: 1 to 2"):
        model.embed_videos(clip_paths(run), 3)


def test_clip2video_ranks_in_an_index_as_in_evaluation(clip2video: SearchRun, tmp_path: Path) -> None:
    """An index's dot products are the model's similarities over exp(logit scale), masks of short clips included."""
    index_folder = tmp_path / "index"
    assert embed(clip2video, clip2video.videos, index_folder) == 0
    index = Index(index_folder)
    assert index.info.width == 2 * CLIP_SIZES["tiny"].embedding and index.settings.frames == 9
    captions = index.rows["caption"].to_pylist()
    ranks = [
        next(hit.rank for hit in index.search_text(caption, 8) if hit.row == row)
        for row, caption in enumerate(captions)
    ]
    (evaluated,) = read_json(clip2video.folder / "metrics.json")["evaluations"]
    for k in (1, 5):
        assert evaluated["metrics"][f"t2v/R@{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k))
    assert evaluated["metrics"]["t2v/MnR"] == pytest.approx(np.mean(ranks))
    model = frozen_fast.load_model(clip2video.checkpoint)
    rows_VD = model.embed_videos(clip_paths(clip2video), batch_size=3)
    np.testing.assert_allclose(rows_VD.numpy(), index.folder.take(np.arange(8)), atol=1e-6)
    with torch.no_grad():
        text = model.text_features(captions)
    halves = rows_VD.unflatten(1, (2, -1))
    video = {"global": halves[:, 0], "aligned": halves[:, 1]}
    sim_QV = model.pair_similarities(text, video).mean(0)
    scale = text["global"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.vectors(text) @ rows_VD.T, sim_QV / scale, atol=1e-5, rtol=0)


def test_clip2video_comes_back_from_a_hub_folder(clip2video: SearchRun, tmp_path: Path) -> None:
    """Weights, tokenizer, and how its run chose frames; the card names the kind."""
    folder = write_hub_folder(clip2video.checkpoint, tmp_path / "hub", name="org/c2v", licence="mit")
    assert "kind 'clip2video'" in (folder / "README.md").read_text(encoding="utf-8")
    assert str(clip2video.videos.parent) not in (folder / "run.json").read_text(encoding="utf-8")
    own, shared = (frozen_fast.load_model(path) for path in (clip2video.checkpoint, folder))
    rows = [model.embed_videos(clip_paths(clip2video)[:3], decoder="pyav") for model in (shared, own)]
    assert torch.equal(*rows)
    with torch.no_grad():
        assert torch.equal(shared.text_features(["a dog"])["global"], own.text_features(["a dog"])["global"])


def test_a_released_clip2video_needs_its_kind_and_frames(
    clip2video: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released = tmp_path / "pytorch_model.bin.4"
    torch.save(frozen_fast.load_model(clip2video.checkpoint).state_dict(), released)
    where = ["--checkpoint", str(released), "--source", str(clip2video.videos), "--output", str(tmp_path / "i")]
    assert main(["embed", *where, "--device", "cpu", "--model-kind", "clip2video"]) == 2
    assert "frames: got none for a clip2video without a run; allowed: 1 to" in capsys.readouterr().err
    assert main(["embed", *where, "--device", "cpu", "--model-kind", "clip2video", "--frames", "6"]) == 0
    hits = Index(tmp_path / "i").search_text("a dog", 8)  # the index knows the file's kind
    assert len(hits) == 8
    assert main(["embed", *where, "--device", "cpu", "--model-kind", "moee"]) == 2


def write_scenes(path: Path, seconds: tuple[float, ...]) -> Path:
    """A clip, 10 frames a second, of differently coloured scenes of moving noise."""
    colours = [(200, 60, 40), (40, 80, 210), (60, 200, 70)]
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for scene, length in enumerate(seconds):
            noise = rng.integers(-30, 30, (8, 12, 3))
            picture = np.kron(np.clip(np.array(colours[scene % 3]) + noise, 0, 255), np.ones((8, 8, 1)))
            for number in range(round(10 * length)):
                moved = np.ascontiguousarray(np.roll(picture, number, axis=1).astype(np.uint8))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_scenes_become_rows_with_times(run: SearchRun, tmp_path: Path) -> None:
    pytest.importorskip("scenedetect", reason="needs the extra search")
    clip = write_scenes(tmp_path / "cut.avi", (3.0, 2.0, 4.0))
    assert scene_cuts(str(clip), 0.0, 9.0) == pytest.approx([3.0, 5.0])
    assert scene_cuts(str(clip), 4.0, 9.0) == pytest.approx([5.0]), "of a part of the file"
    rows = [{"id": "cut", "path": str(clip), "captions": ["three scenes"], "kind": "video"}]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    assert embed(run, manifest, tmp_path / "index", "--span", "scenes") == 0
    assert ids(tmp_path / "index") == ["cut@0-3", "cut@3-5", "cut@5-9"]
    vectors = Index(tmp_path / "index").folder.take(np.arange(3))
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
    assert embed(run, manifest, tmp_path / "both", "--span", "scenes", "--span", "2s") == 0
    assert ids(tmp_path / "both") == ["cut@0-2", "cut@2-3", "cut@3-5", "cut@5-7", "cut@7-9"]


def test_mistakes_with_spans(run: SearchRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_scenes(tmp_path / "cut.avi", (1.0, 1.0))
    with pytest.raises(UserError, match="^--span: got scenes for the packed clip .*shard-00000.tar#3"):
        scene_cuts(f"{tmp_path}/shard-00000.tar#3", 0.0, 1.0)
    for wrong in (["soon"], ["2s", "3s"]):
        spans = [word for text in wrong for word in ("--span", text)]
        assert embed(run, run.videos, tmp_path / "index", *spans) == 2
    whole = frozen_fast.data.Clip("a", str(clip), (), "video")
    assert Cutter(None, False, 10_000).cut(whole) == [whole]
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(UserError, match=r"^--span: got scenes, but scenedetect is missing; allowed: seconds, or pip"):
        scene_cuts(str(clip), 0.0, 2.0)


def test_a_second_folder_is_added_without_embedding_the_first_again(
    run: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, index = tmp_path / "one", tmp_path / "two", tmp_path / "index"
    paths = clip_paths(run)
    for folder, chosen in ((one, paths[:3]), (two, paths[3:5])):
        folder.mkdir()
        for path in chosen:
            shutil.copyfile(path, folder / path.name)
    assert embed(run, one, index) == 0
    first = Index(index).folder.take(np.arange(3))
    capsys.readouterr()
    assert embed(run, two, index, "--add") == 0
    assert "5 clips (2 embedded, 0 kept, 0 removed, 0 bad)" in capsys.readouterr().out
    assert ids(index) == ["c0.avi", "c1.avi", "c2.avi", "c3.avi", "c4.avi"]
    np.testing.assert_array_equal(Index(index).folder.take(np.arange(3)), first)
    shutil.copyfile(paths[7], two / "c3.avi")
    assert embed(run, two, index, "--add") == 0
    assert "5 clips (1 embedded, 1 kept, 1 removed, 0 bad)" in capsys.readouterr().out
    assert sorted(ids(index)) == ["c0.avi", "c1.avi", "c2.avi", "c3.avi", "c4.avi"]
    assert embed(run, two, index) == 0
    assert sorted(ids(index)) == ["c3.avi", "c4.avi"], "without --add the index is the source's"


def test_pictures_that_are_added_to_videos_have_their_frames(run: SearchRun, tmp_path: Path) -> None:
    """A picture among videos is shown as often as a window has frames, whenever it comes."""
    row = json.loads(run.pictures.read_text(encoding="utf-8").splitlines()[0])
    picture = {**row, "id": "still", "path": str(run.pictures.parent / row["path"])}
    videos = [{**json.loads(line)} for line in run.videos.read_text(encoding="utf-8").splitlines()[:2]]
    videos = [{**video, "path": str(run.videos.parent / video["path"])} for video in videos]
    mixed = write_manifest(tmp_path / "mixed.jsonl", [*videos, picture])
    later = write_manifest(tmp_path / "later.jsonl", [picture])
    first = write_manifest(tmp_path / "first.jsonl", videos)
    assert embed(run, mixed, tmp_path / "together") == 0
    assert embed(run, first, tmp_path / "added") == 0
    assert embed(run, later, tmp_path / "added", "--add") == 0
    together, added = (Index(tmp_path / name).folder.take(np.arange(3)) for name in ("together", "added"))
    np.testing.assert_allclose(added, together, atol=1e-6)
    assert embed(run, later, tmp_path / "pictures") == 0
    assert embed(run, first, tmp_path / "pictures", "--add") == 2


@pytest.mark.slow
def test_two_ray_workers_give_the_index_of_one_process(run: SearchRun, tmp_path: Path) -> None:
    """Half of the work is done before, as by a run that was killed; a file that cannot be read is named."""
    pytest.importorskip("ray", reason="needs the extra ray")
    folder = tmp_path / "clips"
    shutil.copytree(run.videos.parent / "clips", folder)
    (folder / "broken.avi").write_bytes(b"no video")
    assert embed(run, folder, tmp_path / "one") == 0
    several = tmp_path / "several"
    leave_unfinished(run, folder, several, rows=6)  # the first of them cannot be read
    command = [sys.executable, "-m", "frozen_fast", "embed", "--checkpoint", str(run.checkpoint)]
    command += ["--source", str(folder), "--output", str(several), "--device", "cpu"]
    command += ["--ray", "local", "--ray-workers", "2"]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 clips (7 embedded, 5 kept, 0 removed, 1 bad)" in done.stdout
    assert "bad clips: broken.avi;" in done.stderr
    assert ids(several) == ids(tmp_path / "one")
    one, two = (Index(index).folder.take(np.arange(12)) for index in (tmp_path / "one", several))
    np.testing.assert_allclose(two, one, atol=1e-6)


def leave_unfinished(run: SearchRun, source: Path, output: Path, *, rows: int) -> None:
    """What an embedding leaves behind that was killed after some rows."""
    request = embed_run.EmbedRequest(checkpoint=run.checkpoint, source=str(source), output=output, device="cpu")
    found = read_run(run.checkpoint)
    parallel = embed_run.start_parallel(embed_run.parallel_config(found["config"], "cpu"))
    try:
        model, settings = request.load(found, parallel.device)
        with index_lock(output):
            plan, _ = embed_run.plan_request(request, embed_run.info_of(request, model, settings), settings)
            some = [plan.rows[number] for number in plan.todo[:rows]]
            embed_run.embed_share(request, model, settings, some, plan.source_kind, parallel, lambda done, bad: None)
    finally:
        parallel.close()


def test_a_missing_ray_is_one_line(
    run: SearchRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert embed(run, run.videos, tmp_path / "index", "--ray", "local") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("--ray: ray is missing; allowed: pip install 'frozen-fast[ray]'")
