"""From a checkpoint to an index to answers: equal to evaluation, resumable, honest about files that changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from frozen_fast.cli import main
from frozen_fast.data import read_source
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder
from frozen_fast.parallel.start import start_parallel
from frozen_fast.search import Index, embed_job, embed_videos
from frozen_fast.search.row_table import read_table
from frozen_fast.training.encode import encode_clips
from frozen_fast.training.parts import build_evaluation_loader, load_model
from support.datasets import write_manifest
from support.runs import REPOSITORY, environment, read_json, torchrun
from support.search_runs import SearchRun, finished_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SearchRun:
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def built(run: SearchRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "index"
    assert embed(run, run.videos, folder) == 0
    return folder


def embed(run: SearchRun, source: Path, output: Path, *more: str) -> int:
    where = ["--checkpoint", str(run.checkpoint), "--source", str(source), "--output", str(output)]
    return main(["embed", *where, "--device", "cpu", *more])


def copy_clips(run: SearchRun, folder: Path) -> Path:
    shutil.copytree(run.videos.parent / "clips", folder)
    return folder


def ids(folder: Path) -> list[str]:
    index = Index(folder)
    return [name for name, alive in zip(index.rows["id"].to_pylist(), index.folder.alive_N, strict=True) if alive]


def vector_of(folder: Path, name: str) -> np.ndarray:
    index = Index(folder)
    rows = [row for row, found in enumerate(index.rows["id"].to_pylist()) if found == name]
    (row,) = [row for row in rows if index.folder.alive_N[row]]
    return index.folder.take(np.array([row]))[0]


def evaluation_vectors(run: SearchRun) -> torch.Tensor:
    """The clips' embeddings as evaluate_source compares them, [V, D]."""
    parallel = start_parallel(run.config)
    try:
        model = load_model(run.config, run.checkpoint, parallel.device)
        source = read_source(run.config.evaluation.sources[0])
        loader = build_evaluation_loader(
            run.config, source, model, parallel.device, frames=model.learned_frames, rank=0, world_size=1
        )
        with torch.no_grad():
            clips = encode_clips(model, loader, parallel, lambda: False)
        assert clips is not None and clips.num_windows > len(source), "the test needs several windows a clip"
        return F.normalize(clips.stacked()["embedding"], dim=-1)
    finally:
        parallel.close()


def test_embeddings_and_ranks_are_those_of_evaluation(
    run: SearchRun, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index(built)
    expected_VD = evaluation_vectors(run)
    found_VD = torch.from_numpy(index.folder.take(np.arange(len(index))))
    torch.testing.assert_close(found_VD, expected_VD, atol=1e-6, rtol=0)
    ranks = []
    for number, caption in enumerate(index.rows["caption"].to_pylist()):
        capsys.readouterr()
        assert main(["search", "--index", str(built), caption, "-k", "12", "--json"]) == 0
        hits = json.loads(capsys.readouterr().out)
        assert [hit["rank"] for hit in hits] == list(range(1, 13))
        assert set(hits[0]) == {"rank", "score", "id", "path", "start_seconds", "end_seconds"}
        ranks.append(next(hit["rank"] for hit in hits if hit["id"] == f"c{number}"))
    (evaluated,) = read_json(run.folder / "metrics.json")["evaluations"]
    metrics = evaluated["metrics"]
    for k in (1, 5, 10):
        assert metrics[f"t2v/R@{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k))
    assert metrics["t2v/MnR"] == pytest.approx(np.mean(ranks))


def test_embed_videos_takes_paths_and_gives_their_rows_in_order(run: SearchRun, built: Path, tmp_path: Path) -> None:
    model = DualEncoder.from_pretrained(run.checkpoint)
    clips = [run.videos.parent / "clips" / f"c{number}.avi" for number in (5, 2)]
    rows = embed_videos(model, clips, windows="middle", decoder="pyav")
    assert rows.shape == (2, 16) and torch.allclose(rows.norm(dim=1), torch.ones(2))
    alone = embed_videos(model, clips[1:], windows="middle", decoder="pyav")
    torch.testing.assert_close(rows[1:], alone, atol=1e-6, rtol=0)
    assert not torch.allclose(rows[0], rows[1], atol=1e-4)
    broken = tmp_path / "broken.avi"
    broken.write_bytes(b"no video")
    with pytest.raises(UserError, match="broken.avi"):
        embed_videos(model, [clips[0], broken])
    partly = embed_videos(model, [broken, clips[0]], windows="middle", decoder="pyav", on_bad_clip="nan")
    assert partly[0].isnan().all() and torch.allclose(partly[1], rows[0], atol=1e-6)
    with pytest.raises(UserError, match=r"^windows: got 'all'; allowed: auto, middle, or a whole number"):
        embed_videos(model, clips, windows="all")


def test_a_folder_with_a_bad_file_and_a_second_embedding_of_it(
    run: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad files are counted and named; unchanged, moved, changed, new and vanished files are told apart."""
    clips, index = copy_clips(run, tmp_path / "clips"), tmp_path / "index"
    (clips / "broken.avi").write_bytes(b"no video")
    assert embed(run, clips, index) == 0
    said = capsys.readouterr()
    assert "12 clips (12 embedded, 0 kept, 0 removed, 1 bad); exact search" in said.out
    assert "bad clips: broken.avi;" in said.err
    (bad,) = [json.loads(line) for line in (index / "bad_clips.jsonl").read_text().splitlines()]
    assert (bad["clip_id"], bad["cause"]) == ("broken.avi", "not_a_video")
    before = {name: vector_of(index, name) for name in ("c0.avi", "c1.avi", "c2.avi")}

    (clips / "broken.avi").unlink()
    (clips / "c0.avi").rename(clips / "moved.avi")
    shutil.copyfile(clips / "c5.avi", clips / "c1.avi")
    (clips / "c3.avi").unlink()
    shutil.copyfile(clips / "c4.avi", clips / "new.avi")
    assert Index(index).changed_files() == {
        str(clips / "c0.avi"): "missing",
        str(clips / "c1.avi"): "changed",
        str(clips / "c3.avi"): "missing",
    }
    assert embed(run, clips, index) == 0
    assert "12 clips (2 embedded, 10 kept, 3 removed, 0 bad)" in capsys.readouterr().out
    assert sorted(ids(index)) == sorted([*(f"c{n}.avi" for n in (1, 2, *range(4, 12))), "moved.avi", "new.avi"])
    np.testing.assert_array_equal(vector_of(index, "moved.avi"), before["c0.avi"])
    np.testing.assert_array_equal(vector_of(index, "c2.avi"), before["c2.avi"])
    np.testing.assert_allclose(vector_of(index, "c1.avi"), vector_of(index, "c5.avi"), atol=1e-6)
    assert Index(index).changed_files() == {}


def test_two_processes_give_the_index_of_one(run: SearchRun, built: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    command = torchrun(
        "-m",
        "frozen_fast",
        "embed",
        "--checkpoint",
        str(run.checkpoint),
        "--source",
        str(run.videos),
        "--output",
        str(index),
        "--device",
        "cpu",
    )
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ids(index) == ids(built)
    one, two = (Index(folder).folder.take(np.arange(12)) for folder in (built, index))
    np.testing.assert_allclose(two, one, atol=1e-6)


def test_a_killed_embedding_goes_on_without_doubles(
    run: SearchRun, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from frozen_fast.search import embed_job\n"
        "embed_job.PART_ROWS = 2\n"
        "add = embed_job.PartWriter.add\n"
        "def slow(self, row, vector):\n"
        "    add(self, row, vector)\n"
        "    time.sleep(0.5)\n"
        "embed_job.PartWriter.add = slow\n"
        "from frozen_fast.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    index = tmp_path / "index"
    command = [
        sys.executable,
        str(script),
        "embed",
        "--checkpoint",
        str(run.checkpoint),
        "--source",
        str(run.videos),
        "--output",
        str(index),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(command, env=environment(), cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not len(list(index.glob("work/part-*.arrow"))) >= 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (index / "index.json").exists()
    done = sum(read_table(path).num_rows for path in index.glob("work/part-*.arrow"))
    assert 0 < done < 12
    assert embed(run, run.videos, index) == 0
    assert f"12 clips ({12 - done} embedded, {done} kept, 0 removed, 0 bad)" in capsys.readouterr().out
    assert ids(index) == ids(built) and len(set(ids(index))) == 12
    assert not (index / "work").exists()
    one, two = (Index(folder).folder.take(np.arange(12)) for folder in (built, index))
    np.testing.assert_allclose(two, one, atol=1e-6)


def test_another_model_or_setting_is_refused_until_fresh(
    run: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    assert embed(run, run.pictures, index) == 0
    assert embed(run, run.pictures, index, "--frames", "1") == 2
    assert "made with settings" in capsys.readouterr().err
    assert embed(run, run.pictures, index, "--frames", "1", "--fresh") == 0
    assert Index(index).settings.frames == 1
    other = tmp_path / "other"
    model = DualEncoder.from_pretrained(run.checkpoint)
    torch.nn.init.zeros_(model.vid_proj[0].bias)
    model.vid_proj[0].bias.data += 1
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"--checkpoint: got .* with fingerprint .*; allowed: the model that made"):
        Index(index, checkpoint=other).search_text("a dog", 1)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("keep")
    assert embed(run, run.pictures, tmp_path / "precious", "--fresh") == 2
    assert (tmp_path / "precious" / "notes.txt").exists()


def test_spans_carry_their_times(run: SearchRun, tmp_path: Path) -> None:
    """A clip of 12 frames at 10 a second in spans of 0.5 s: the rest of 0.2 s belongs to the second span."""
    clip = run.videos.parent / "clips" / "c0.avi"
    row = {"id": "whole", "path": str(clip), "captions": ["a dog"], "kind": "video"}
    manifest = write_manifest(tmp_path / "m.jsonl", [row])
    assert embed(run, manifest, tmp_path / "index", "--span", "0.5s") == 0
    table = Index(tmp_path / "index").rows
    assert table["id"].to_pylist() == ["whole@0-0.5", "whole@0.5-1.2"]
    assert list(zip(table["start_seconds"].to_pylist(), table["end_seconds"].to_pylist(), strict=True)) == [
        (0.0, 0.5),
        (0.5, 1.2),
    ]
    vectors = Index(tmp_path / "index").folder.take(np.arange(2))
    assert not np.allclose(vectors[0], vectors[1], atol=1e-4)


def test_packed_shards_are_a_source(run: SearchRun, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    pack = ["pack", "--manifest", str(run.videos), "--output", str(shards), "--workers", "0", "--short-side", "40"]
    assert main(pack) == 0
    assert embed(run, shards, tmp_path / "index") == 0
    index = Index(tmp_path / "index")
    assert len(index) == 12 and index.rows["path"].to_pylist()[3] == f"{shards}/shard-00000.tar#3"


def test_mistakes_are_one_line(run: SearchRun, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        return line.removeprefix("error: ")

    index = ["--index", str(built)]
    assert said("search", *index, "  ").startswith("text: got an empty text; allowed:")
    assert said("search", *index).startswith("text, --like: got neither; allowed: one of them")
    assert said("search", *index, "x", "--where", "colour=red").startswith("--where: got 'colour'")
    assert said("search", *index, "x", "--where", "start_seconds=soon").startswith("--where: got 'start_seconds=soon'")
    assert "allowed: a folder that `frozen-fast embed` wrote" in said("search", "--index", str(tmp_path), "x")
    where = ["--checkpoint", str(run.checkpoint), "--output", str(tmp_path / "i")]
    assert said("embed", *where, "--source", str(tmp_path / "nothing")).startswith("--source: got ")
    (tmp_path / "empty").mkdir()
    assert "contains no video or picture" in said("embed", *where, "--source", str(tmp_path / "empty"))
    assert said("embed", *where, "--source", str(run.videos), "--decoder", "vhs").startswith("--decoder: got 'vhs'")
    assert "another process writes to" in _while_locked(built, lambda: said("index", str(built), "--remove", "c0"))


def _while_locked(folder: Path, call):
    from frozen_fast.search.index_folder import index_lock

    with index_lock(folder):
        return call()


def test_like_a_file_where_and_a_page(run: SearchRun, built: Path, tmp_path: Path) -> None:
    clip = run.videos.parent / "clips" / "c7.avi"
    index = Index(built)
    first, *others = index.search_like(str(clip), 12)
    assert first.id == "c7" and first.score == pytest.approx(1, abs=1e-5)
    assert [hit.id for hit in index.search_similar(first.row, 12)] == [hit.id for hit in others]
    filtered = index.search_like(str(clip), 12, ["id!=c7", "caption~NUMBER 1"])
    assert {hit.id for hit in filtered} == {"c1", "c10", "c11"}
    page = tmp_path / "page.html"
    assert main(["search", "--index", str(built), "<script>alert(1)</script>", "-k", "2", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") == 2
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text


def test_a_part_that_a_kill_cut_short_is_not_there(tmp_path: Path) -> None:
    """Parts are renamed into place when they are whole, so that every part- file can be read."""
    writer = embed_job.PartWriter(tmp_path)
    row = {
        "id": "a",
        "path": "/a.mp4",
        "kind": "video",
        "start_seconds": None,
        "end_seconds": None,
        "caption": None,
        "file_bytes": 1,
        "file_mtime_ns": 2,
        "file_digest": "x",
    }
    writer.add(row, torch.ones(4))
    assert not os.listdir(tmp_path)
    writer.flush()
    (part,) = tmp_path.glob("part-*.arrow")
    assert read_table(part).drop_columns(["vector"]).to_pylist() == [row]
