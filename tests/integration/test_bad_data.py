"""Bad clips and diverging losses in a run: counted and named, or one line; earlier checkpoints stay good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.common.files import read_json_lines
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.records.checkpoint_folder import survey
from frozen_fast.training.run import train
from support import videos
from support.datasets import write_manifest
from support.runs import losses, make_data, read_json, tiny_config

pytestmark = pytest.mark.integration

CAUSES = ("truncated", "empty", "directory", "not_a_video")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """24 clips, four of them broken in different ways."""
    files = make_data(tmp_path_factory.mktemp("data"), pictures=1)
    clips = files["videos"].parent / "clips"
    whole = (clips / "c3.avi").read_bytes()
    (clips / "c3.avi").write_bytes(whole[: len(whole) // 2])
    (clips / "c7.avi").write_bytes(b"")
    (clips / "c11.avi").unlink()
    (clips / "c11.avi").mkdir()
    (clips / "c13.avi").write_text("this is not a video " * 20, encoding="utf-8")
    return files


def one_stage(data: dict[str, Path], folder: Path, **decode: Any) -> Any:
    return tiny_config(
        data,
        folder,
        data={
            "sources": [{"name": "videos", "path": str(data["videos"])}],
            "decode": {"backend": "pyav", "threads": 1, **decode},
        },
        curriculum={"stages": [{"frames": 2, "global_batch_size": 8, "steps": 3}]},
    )


def test_skipped_clips_are_replaced_counted_and_named(data: dict[str, Path], tmp_path: Path) -> None:
    """Three batches of eight read each of the 24 clips once."""
    assert train(one_stage(data, tmp_path, max_bad_share=0.5)) == 0
    rows = read_json_lines(tmp_path / "bad_clips.jsonl")
    found = {row["clip_id"]: row["cause"] for row in rows}
    assert {found[name] for name in ("c3", "c7", "c11", "c13")} == set(CAUSES)
    assert set(found) == {"c3", "c7", "c11", "c13"}
    assert all(row["replaced_by"] not in (None, row["clip_id"]) for row in rows)
    assert all(row["source"] == "videos" and row["path"].endswith(f"{row['clip_id']}.avi") for row in rows)
    steps = read_json_lines(tmp_path / "steps.jsonl")
    assert [row["bad_clips"] for row in steps] == [sum(other["step"] == row["step"] for other in rows) for row in steps]
    assert [row["clips"] for row in steps] == [8, 8, 8]
    state = json.loads((tmp_path / "checkpoints" / "step_00000003" / "state.json").read_text(encoding="utf-8"))
    assert state["bad_clips"]["clips"] == 24 and sum(state["bad_clips"]["causes"].values()) == len(rows)


def test_too_many_bad_clips_end_the_run_with_their_share(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.decode.max_bad_share: \d of 2\d clips are unreadable, 1\d.\d %"):
        train(one_stage(data, tmp_path))
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert status["message"].startswith("data.decode.max_bad_share")


def test_policy_error_names_the_clip(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^clip 'c(3|7|11|13)' of source 'videos' cannot be read: .*c(3|7|11|13).avi"):
        train(one_stage(data, tmp_path, on_bad_clip="error"))
    assert read_json(tmp_path / "status.json")["exit_code"] == 2


def test_evaluation_refuses_a_bad_clip_and_can_be_told_to_leave_it_out(data: dict[str, Path], tmp_path: Path) -> None:
    """The stage's checkpoint was saved before, so nothing is lost; skipping leaves four clips out, and says which."""
    sections: dict[str, Any] = {
        "curriculum": {"stages": [{"frames": 2, "global_batch_size": 4, "steps": 1}]},
        "evaluation": {"every": "end", "sources": [{"name": "held_out", "path": str(data["videos"])}]},
    }
    config = tiny_config(data, tmp_path / "run", **sections)
    with pytest.raises(UserError, match="cannot be read: .*allowed: data.decode.on_bad_clip=skip excludes it"):
        train(config)
    assert survey(tmp_path / "run" / "checkpoints").usable is not None
    decode = {"backend": "pyav", "threads": 1, "on_bad_clip": "skip", "max_bad_share": 0.5}
    sources = [{"name": "videos", "path": str(data["videos"])}]
    assert (
        train(
            tiny_config(data, tmp_path / "run", **sections, data={"sources": sources, "decode": decode}), resume="auto"
        )
        == 0
    )
    (row,) = read_json(tmp_path / "run" / "metrics.json")["evaluations"]
    assert (row["num_videos"], row["num_queries"], row["bad_clips"]) == (20, 20, 4)
    left_out = [row for row in read_json_lines(tmp_path / "run" / "bad_clips.jsonl") if row["replaced_by"] is None]
    assert {row["clip_id"] for row in left_out} == {"c3", "c7", "c11", "c13"}


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_checkpoint_is_good(
    data: dict[str, Path], tmp_path: Path
) -> None:
    """A learning rate that throws the weights out of range within a few steps."""
    good = data["videos"].parent
    shutil.copytree(good, tmp_path / "videos")
    config = tiny_config(
        {**data, "videos": tmp_path / "videos" / "manifest.jsonl"},
        tmp_path / "run",
        data={
            "sources": [{"name": "videos", "path": str(tmp_path / "videos" / "manifest.jsonl")}],
            "decode": {"backend": "pyav", "threads": 1, "max_bad_share": 0.9},
        },
        curriculum={"stages": [{"frames": 1, "global_batch_size": 4, "steps": 30}]},
        optimizer={"learning_rate": 1e20, "gradient_clip_norm": 0, "warmup_steps": 3},
        checkpoints={"every_steps": 1, "keep": 1},
    )
    told = "(loss: got (nan|inf)|weights: not finite) .*optimizer.learning_rate"
    with pytest.raises(UserError, match=told) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert read_json(tmp_path / "run" / "status.json")["exit_code"] == 2
    newest = survey(tmp_path / "run" / "checkpoints").usable
    assert newest is not None
    assert all(bool(tensor.isfinite().all()) for tensor in read_tensors(newest)[0].values())
    assert torch.isfinite(torch.tensor(losses(tmp_path / "run"))).all()


def dali_clips(folder: Path) -> tuple[Path, set[str], set[str]]:
    """VP9 and MJPEG clips: (manifest, those that cannot be read, those with noise in a frame's bytes)."""
    folder.mkdir()
    rows, broken, noisy = [], set(), set()
    for codec, suffix in (("libvpx-vp9", ".webm"), ("mjpeg", ".avi")):
        form = {"pixel_format": "yuvj420p", "options": videos.MJPEG} if codec == "mjpeg" else {"options": videos.VP9}
        for number in range(8):
            path = folder / f"{suffix[1:]}{number}{suffix}"
            videos.write_video(path, codec, **form)
            data = path.read_bytes()
            if number == 1:
                path.write_bytes(data[: len(data) // 2])
            elif number == 2:
                path.write_bytes(b"")
            elif number == 3:
                path.write_text("this is not a video " * 20, encoding="utf-8")
            elif number in (4, 5):
                whole = path.rename(path.with_name(f"whole{path.name}"))
                videos.noise_in_packet(whole, path, 2 * number - 6)
            (broken if number in (1, 2, 3) else noisy if number in (4, 5) else set()).add(path.stem)
            rows.append({"id": path.stem, "path": path.name, "captions": [f"clip {path.stem}"], "kind": "video"})
    return write_manifest(folder / "own.jsonl", rows), broken, noisy


def test_dali_finishes_a_run_with_damaged_files(
    data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every clip is read once; what the decoder reports is counted, sound clips are not, and the run is done."""
    pytest.importorskip("nvidia.dali")
    manifest, broken, noisy = dali_clips(tmp_path / "clips")
    config = tiny_config(
        {**data, "videos": manifest},
        tmp_path / "run",
        data={
            "sources": [{"name": "videos", "path": str(manifest)}],
            "decode": {"backend": "dali", "threads": 1, "max_bad_share": 0.9, "on_bad_clip": "skip"},
        },
        curriculum={"stages": [{"frames": 4, "global_batch_size": 8, "steps": 2}]},
        evaluation={"every": "end", "sources": [{"name": "held_out", "path": str(manifest)}]},
    )
    assert train(config) == 0
    assert read_json(tmp_path / "run" / "status.json")["state"] == "done"
    assert len(losses(tmp_path / "run")) == 2
    rows = read_json_lines(tmp_path / "run" / "bad_clips.jsonl")
    trained = {row["clip_id"] for row in rows if row["replaced_by"] is not None}
    assert broken <= trained <= broken | noisy
    (evaluation,) = read_json(tmp_path / "run" / "metrics.json")["evaluations"]
    assert evaluation["num_videos"] <= 16 - len(broken)
    assert "Traceback" not in capsys.readouterr().err
