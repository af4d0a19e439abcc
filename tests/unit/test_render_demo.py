"""The demo's data: what is drawn, what stands in the captions, and that one frame cannot tell twins apart."""

from __future__ import annotations

import json
import random
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import render_demo
from demo_scenes import CLIP_FRAMES, MOTIONS, Recipe, Scene, Thing, draw_scenes
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data import read_sources
from render_demo import one_frame_ceiling, render_clip_THWC

SMALL = Recipe(train_pairs=11, test_pairs=10, stills=4)
RED_CIRCLE = Thing(shape="circle", colour="red")


def decoded_THWC(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name in ("vp9", "libvpx-vp9")
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    assert render_demo.render_set(folder, SMALL, processes=1) == 2 * (SMALL.train_pairs + SMALL.test_pairs)
    return folder


def red_place(frame_HWC: np.ndarray) -> tuple[float, float, float]:
    """Centre (x, y) as shares of the side and number of the pixels that are red."""
    red = (frame_HWC[..., 0] > 150) & (frame_HWC[..., 1] < 110)
    rows, columns = np.nonzero(red)
    return float(columns.mean()) / red.shape[1], float(rows.mean()) / red.shape[0], float(red.sum())


def clip_of(motion: str, seed: int = 3) -> np.ndarray:
    return render_clip_THWC(Scene(motion=motion, thing=RED_CIRCLE), random.Random(seed))


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("right_stop", 0, 1), ("left_stop", 0, -1), ("down", 1, 1)],
)
def test_a_thing_moves_the_way_its_caption_says(motion: str, axis: int, sign: int) -> None:
    track = np.array([red_place(frame)[:2] for frame in clip_of(motion)])
    along, across = track[:, axis] * sign, track[:, 1 - axis]
    assert along[-1] - along[0] > 0.4
    assert (np.diff(along) > -1e-6).all()
    assert np.ptp(across) < 0.02
    rests = np.ptp(along[len(along) * 2 // 3 :]) < 1e-6
    assert rests == motion.endswith("_stop")


def test_growing_and_appearing() -> None:
    areas = [red_place(frame)[2] for frame in clip_of("grow")]
    assert areas[-1] > 4 * areas[0] and areas == sorted(areas)
    appearing = clip_of("appear").astype(int)
    assert np.abs(appearing[0] - appearing[5]).max() == 0
    assert red_place(appearing[-1].astype(np.uint8))[2] > 20


def test_captions_of_a_scene_and_of_its_reverse() -> None:
    assert Scene(motion="right_stop", thing=RED_CIRCLE).captions() == (
        "a red circle moves from left to right, then stops",
        "a red circle waits, then moves from right to left",
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_clips_have_one_caption_each_that_training_has_seen_on_other_clips(seed: int) -> None:
    train, test = draw_scenes(Recipe(seed=seed))
    held_out = [caption for scene in test for caption in scene.captions()]
    assert len(set(held_out)) == len(held_out) == 2 * Recipe().test_pairs
    assert set(held_out) <= {caption for scene in train for caption in scene.captions()}
    assert {scene.motion for scene in test} == {scene.motion for scene in train} == set(MOTIONS)


def test_a_held_out_clip_is_none_of_the_training_clips(rendered: Path) -> None:
    training = {decoded_THWC(rendered / row["path"]).tobytes() for row in lines(rendered / "train_videos.jsonl")}
    for row in lines(rendered / "test.jsonl"):
        assert decoded_THWC(rendered / row["path"]).tobytes() not in training


def test_twins_hold_the_same_frames_in_reverse(rendered: Path) -> None:
    rows = {row["id"]: row for name in ("train_videos", "test") for row in lines(rendered / f"{name}.jsonl")}
    assert len(rows) == 2 * (SMALL.train_pairs + SMALL.test_pairs)
    for row in rows.values():
        twin = rows[row["twin"]]
        assert twin["twin"] == row["id"] and twin["captions"] != row["captions"]
    for row in lines(rendered / "test.jsonl")[::2]:
        frames, reverse = (decoded_THWC(rendered / rows[name]["path"]) for name in (row["id"], row["twin"]))
        assert len(frames) == CLIP_FRAMES
        assert np.array_equal(frames, reverse[::-1])
        assert not np.array_equal(frames, reverse)


def test_the_ceiling_of_one_frame_follows_from_the_clips(rendered: Path) -> None:
    paths = [rendered / row["path"] for row in lines(rendered / "test.jsonl")]
    assert json.loads((rendered / "ceiling.json").read_text()) == {"clips": 20, "groups": 10, "R@1": 50.0}
    assert one_frame_ceiling(paths)["R@1"] == 50.0
    assert one_frame_ceiling(paths[::2])["R@1"] == 100.0
    assert one_frame_ceiling(paths[:3])["R@1"] == pytest.approx(200 / 3)


def test_the_manifests_are_what_training_reads(rendered: Path) -> None:
    names = ("train_videos", "train_images", "test")
    configs = [
        SourceConfig(name=name, path=str(rendered / f"{name}.jsonl"), split="test" if name == "test" else "train")
        for name in names
    ]
    sources = read_sources(configs)
    assert {name: len(source) for name, source in sources.items()} == {
        "train_videos": 22,
        "train_images": 4,
        "test": 20,
    }
    assert not any(sum(source.drops.values()) for source in sources.values())
    assert all(clip.twin for clip in sources["test"].clips)
    suffixes = {Path(clip.path).suffix for clip in sources["train_images"].clips}
    assert suffixes == {".jpg", ".png"}
    for clip in sources["train_images"].clips:
        with Image.open(clip.path) as picture:
            assert picture.size == (render_demo.STILL_PIXELS,) * 2


def test_a_second_run_reuses_a_broken_off_one_is_completed_another_recipe_starts_anew(
    rendered: Path, tmp_path: Path
) -> None:
    arguments = ["--train-pairs", "11", "--test-pairs", "10", "--stills", "4", "--processes", "1"]
    before = state(rendered)
    assert render_demo.main(["--folder", str(rendered), *arguments]) == 0
    assert state(rendered) == before
    for name in ("videos/test_003b.webm", "images/still_001.png", "test.jsonl", "ceiling.json"):
        (rendered / name).unlink()
    assert render_demo.main(["--folder", str(rendered), *arguments]) == 0
    after = state(rendered)
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    assert after["videos/test_002a.webm"] == before["videos/test_002a.webm"]
    assert render_demo.main(["--folder", str(rendered), *arguments, "--seed", "1"]) == 0
    other = state(rendered)
    assert set(other) == set(before)
    assert other["videos/test_000a.webm"][1] != before["videos/test_000a.webm"][1]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    assert render_demo.main(["--folder", str(tmp_path)]) == 2
    assert f"--folder: got {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize(
    ("option", "value"), [("--test-pairs", "100000"), ("--train-pairs", "0"), ("--test-pairs", "-1")]
)
def test_counts_that_cannot_be_are_errors(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render_demo.main(["--folder", str(tmp_path / "set"), option, value]) == 2
    assert f"{option}: got {value}; allowed" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
