"""Sources, sampling, decoding and loading together, on encoded clips whose pixels tell the frame's number."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.config.schema import AugmentationConfig, DecodeConfig, SourceConfig
from frozen_fast.data import DataPosition, EvaluationLoader, Source, TrainingLoader, plan_steps, read_source
from frozen_fast.data.decode.backends import build_decoder
from frozen_fast.data.plan.frame_sampling import test_windows as windows_of
from support import videos
from support.datasets import write_cc3m, write_manifest, write_webvid
from support.fake_decoding import fake_tokenizer

WHOLE = AugmentationConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), horizontal_flip=0.0)
RESOLUTION = 48
FRAMES = 16

pytestmark = pytest.mark.integration


def write_vp9(path: Path, number: int) -> None:
    """Clip n shows the frame numbers n, n + 1, .. of the coded frames, so that clips differ."""
    real = videos.code_frame
    try:
        videos.code_frame = lambda frame, width, height: real(frame + 16 * (number % 8), width, height)
        videos.write_video(path, "libvpx-vp9", frames=FRAMES, options=videos.VP9)
    finally:
        videos.code_frame = real


def write_vp9_as_mp4(path: Path, number: int) -> None:
    """VP9 in webm under WebVid's name: readers go by content."""
    write_vp9(path.with_suffix(".webm"), number)
    path.with_suffix(".webm").rename(path)


def write_picture(path: Path, number: int) -> None:
    """A PNG under CC3M's name, without an extension, that shows number + 1."""
    videos.picture(path.parent, f"{number}.png", number=number + 1).rename(path)


def codes(frames_TCHW: torch.Tensor) -> list[int]:
    """The frame numbers in frames."""
    return [videos.read_code(frame) for frame in frames_TCHW.permute(0, 2, 3, 1).numpy()]


def factory(backend: str) -> Any:
    return partial(
        build_decoder,
        backend,
        device="cpu",
        resolution=RESOLUTION,
        threads=1,
        max_pixels=10**6,
    )


@pytest.fixture(scope="module")
def good_and_broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, set[str]]:
    """A manifest of eight sound clips and every broken file that can be told from a missing one."""
    folder = tmp_path_factory.mktemp("manifest")
    rows, bad = [], set()
    for number in range(8):
        write_vp9(folder / f"good{number}.webm", number)
        rows.append({"id": f"good{number}", "path": f"good{number}.webm", "captions": [f"clip {number}"]})
    for name, (path, kind, _) in videos.broken_files(folder / "broken").items():
        if kind == "video" and name != "missing":
            rows.append({"id": name, "path": str(path.relative_to(folder)), "captions": [name]})
            bad.add(name)
    path = write_manifest(folder / "own.jsonl", [row | {"kind": "video"} for row in rows])
    return read_source(SourceConfig(name="own", path=str(path))), bad


def plan(source: Source, **fields: Any) -> Any:
    settings: dict[str, Any] = {"batch_sizes": {source.name: 4}, "frames": 4, "num_steps": 12, "start": DataPosition()}
    return plan_steps({source.name: len(source)}, {source.name: 1.0}, "round_robin", 3, **settings | fields)


@pytest.mark.parametrize(("backend", "workers"), [("pyav", 0), ("pyav", 2), ("dali", 0)])
def test_broken_clips_are_replaced_and_every_frame_is_real(
    good_and_broken: tuple[Source, set[str]], backend: str, workers: int
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    source, bad = good_and_broken
    loader = TrainingLoader(
        {"own": source},
        factory(backend),
        fake_tokenizer,
        augmentation=WHOLE,
        decode=DecodeConfig(workers=workers),
    )
    named, drawn = set(), set()
    for batch in loader.batches(plan(source)):
        assert batch.video.shape == (4, 4, 3, RESOLUTION, RESOLUTION)
        assert batch.backends == {backend: 4}
        named |= {clip.clip_id for clip in batch.bad_clips}
        for identity, caption, frames in zip(batch.clip_ids, batch.captions, batch.video, strict=True):
            number = int(identity.removeprefix("good"))
            seen = [code - 16 * number for code in codes(frames)]
            assert caption == f"clip {number}"
            assert [code // 4 for code in seen] == [0, 1, 2, 3], "one frame of each segment of this very clip"
            drawn |= set(seen)
    loader.close()
    assert named == bad
    assert drawn == set(range(FRAMES))


def test_evaluation_windows_are_the_frames_they_should_be(good_and_broken: tuple[Source, set[str]]) -> None:
    source, bad = good_and_broken
    loader = EvaluationLoader(
        source,
        factory("pyav"),
        decode=DecodeConfig(on_bad_clip="skip"),
        frames=2,
        stride_seconds=3 / videos.RATE,
        max_windows=0,
        batch_size=4,
        resize=96,
    )
    windows = defaultdict(list)
    for batch in loader.batches():
        for index, frames in zip(batch.clip_indices, batch.windows, strict=True):
            windows[source.clips[index].id].append(codes(frames))
    assert {source.clips[index].id for index in loader.dropped} == bad
    expected = windows_of(FRAMES, 2, stride_frames=3)
    assert windows == {f"good{n}": [[16 * n + frame for frame in window] for window in expected] for n in range(8)}


def test_videos_and_pictures_alternate(tmp_path: Path) -> None:
    write_webvid(tmp_path / "web", 4, write_clip=write_vp9_as_mp4)
    write_cc3m(tmp_path / "cc3m", 5, write_clip=write_picture)
    sources = {
        "web": read_source(SourceConfig(format="webvid", path=str(tmp_path / "web"), split_version="2M", name="web")),
        "cc3m": read_source(SourceConfig(format="cc3m", path=str(tmp_path / "cc3m"))),
    }
    specs = plan_steps(
        {name: len(source) for name, source in sources.items()},
        {"web": 1.0, "cc3m": 1.0},
        "round_robin",
        0,
        batch_sizes={"web": 2, "cc3m": 5},
        frames=4,
        num_steps=4,
        start=DataPosition(),
    )
    loader = TrainingLoader(sources, factory("pyav"), fake_tokenizer, augmentation=WHOLE, decode=DecodeConfig())
    batches = list(loader.batches(specs))
    assert [(batch.source, *batch.video.shape[:2]) for batch in batches] == [("web", 2, 4), ("cc3m", 5, 1)] * 2
    seen = [codes(frames)[0] for frames in batches[1].video]
    assert sorted(seen) == [1, 2, 3, 4, 5]
    assert batches[1].captions == [f"a picture, number {code - 1}" for code in seen]
