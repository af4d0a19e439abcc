"""Reading packed clips: the same clips as the source they were packed from, and only the bytes that are wanted."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frozen_fast.config.schema import AugmentationConfig, DecodeConfig
from frozen_fast.data import Batch, DataPosition, EvaluationLoader, Source, TrainingLoader, plan_steps
from frozen_fast.data.decode import ClipError, Decoded, DecodeRequest, TestView, TrainView
from frozen_fast.data.load.reading import build_decoder, probe
from frozen_fast.data.packing.extract import PackSettings
from frozen_fast.data.plan.frame_sampling import test_windows as windows_of
from frozen_fast.data.shards.decoder import PackedFrameDecoder
from frozen_fast.data.shards.layout import parse_address
from frozen_fast.data.shards.tar_files import ShardFiles
from support import packing, videos
from support.datasets import manifest_folder, write_manifest
from support.fake_decoding import fake_tokenizer
from support.packing import FRAMES, RESOLUTION, pack, source_of

CLIPS = 9
WHOLE = AugmentationConfig(crop_scale=(1.0, 1.0), horizontal_flip=0.0)
SETTINGS = PackSettings(frames_per_clip=4, shard_bytes=30_000)
make_decoder = partial(build_decoder, "pyav", device="cpu", resolution=RESOLUTION, threads=2, max_pixels=10**6)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Source]:
    """Clips of two splits with several captions and twins: as files, and packed."""
    folder = tmp_path_factory.mktemp("shards")
    manifest = packing.manifest(folder, CLIPS)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["captions"] = [f"{word} {number}" for word in ("one", "two", "three")]
        row["split"], row["twin"] = ("test" if number % 4 == 3 else "train"), f"c{(number + 1) % CLIPS}"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(source_of(manifest), folder / "packed", SETTINGS)
    assert len(list((folder / "packed").glob("*.tar"))) >= 3
    return source_of(manifest, split="train"), source_of(folder / "packed", split="train")


def loader_of(source: Source, *, augmentation: AugmentationConfig = WHOLE, **decode: Any) -> TrainingLoader:
    return TrainingLoader(
        {source.name: source}, make_decoder, fake_tokenizer, augmentation=augmentation, decode=DecodeConfig(**decode)
    )


def batches_of(source: Source, frames: int, **fields: Any) -> list[Batch]:
    sizes = {source.name: len(source)}
    specs = plan_steps(
        sizes,
        {source.name: 1.0},
        "round_robin",
        3,
        batch_sizes={source.name: 4},
        frames=frames,
        num_steps=5,
        start=DataPosition(),
    )
    loader = loader_of(source, **fields)
    try:
        return list(loader.batches(specs))
    finally:
        loader.close()


def test_the_clips_are_those_of_the_source(both: tuple[Source, Source]) -> None:
    files, shards = both
    assert shards.format == "shards" and shards.kind == "video" and len(shards) == len(files) == 7 and not shards.drops
    for name in ("id", "captions", "kind", "split", "twin"):
        assert [getattr(clip, name) for clip in shards.clips] == [getattr(clip, name) for clip in files.clips]
    assert all(clip.start_seconds is None and clip.end_seconds is None for clip in shards.clips)
    assert len(source_of(Path(shards.clips[0].path).parent)) == CLIPS, "without a split: all"


@pytest.mark.parametrize("frames", [1, 2, 4, 8])
def test_training_reads_the_same_clips_and_captions(frames: int, both: tuple[Source, Source]) -> None:
    files, shards = both
    for wanted, got in zip(batches_of(files, frames), batches_of(shards, frames), strict=True):
        assert got.clip_ids == wanted.clip_ids and got.captions == wanted.captions
        assert got.spec == wanted.spec and got.frames == frames and got.bad_clips == []
        assert got.backends == {"jpeg": 4} and wanted.backends == {"pyav": 4}
        assert got.video.shape == wanted.video.shape and got.video.dtype == torch.uint8
        for clip in got.video:
            numbers = packing.codes(clip)
            assert set(numbers) <= {2, 7, 12, 17} and numbers == sorted(numbers)
            if frames <= 4:
                assert [number * frames // FRAMES for number in numbers] == list(range(frames)), "one of each segment"


def test_a_picture_among_videos_is_packed_as_a_video_of_one_frame(tmp_path: Path) -> None:
    path = packing.manifest(tmp_path, 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2] |= {"path": videos.picture(tmp_path).name, "kind": "image"}
    mixed = source_of(write_manifest(tmp_path / "mixed.jsonl", rows))
    pack(mixed, tmp_path / "packed")
    packed = source_of(tmp_path / "packed")
    assert mixed.kind == packed.kind == "video" and {clip.kind for clip in packed.clips} == {"video"}
    for wanted, got in zip(batches_of(mixed, 4), batches_of(packed, 4), strict=True):
        place = wanted.clip_ids.index("c2")
        assert got.clip_ids == wanted.clip_ids and got.video.shape == wanted.video.shape
        for batch in (wanted, got):
            still = batch.video[place]
            assert (still == still[0]).all(), "one frame, repeated"
            assert len(set(packing.codes(batch.video[place - 1]))) == 4, "a video beside it moves"
        assert (got.video[place].float() - wanted.video[place].float()).abs().mean() < 3, "JPEG's loss, of 255"


def test_every_stored_frame_is_drawn(both: tuple[Source, Source]) -> None:
    drawn = {number for batch in batches_of(both[1], 2) for clip in batch.video for number in packing.codes(clip)}
    assert drawn == {2, 7, 12, 17}


def test_augmented_views_match_those_of_the_video(both: tuple[Source, Source]) -> None:
    path, view = both[0].clips[2].path, TrainView(9, 5, 70, 60, True)
    address = both[1].clips[2].path
    video, packed = packing.decoder().decode(
        [DecodeRequest(path, "video", (17, 2), view), DecodeRequest(address, "video", (3, 0), view)]
    )
    assert isinstance(video, Decoded) and isinstance(packed, Decoded) and packed.backend == "jpeg"
    assert (video.frames_TCHW.float() - packed.frames_TCHW.float()).abs().mean() < 4, "of 255"


def test_processes_read_the_same(both: tuple[Source, Source]) -> None:
    ours = batches_of(both[1], 2)
    for wanted, got in zip(ours, batches_of(both[1], 2, workers=2), strict=True):
        assert torch.equal(wanted.video, got.video) and wanted.captions == got.captions


@pytest.mark.parametrize("stride_seconds", [0.0, 0.2])
def test_evaluation_windows_are_of_the_stored_frames(stride_seconds: float, both: tuple[Source, Source]) -> None:
    loader = EvaluationLoader(
        both[1],
        make_decoder,
        decode=DecodeConfig(),
        frames=2,
        stride_seconds=stride_seconds,
        max_windows=0,
        batch_size=3,
        resize=RESOLUTION,
    )
    stored = (2, 7, 12, 17)
    # 4 frames stand for 0.8 s: 5 a second, so 0.2 s are one stored frame
    expected = [[stored[i] for i in window] for window in windows_of(4, 2, stride_frames=round(stride_seconds * 5))]
    windows: dict[int, list[list[int]]] = {}
    for batch in loader.batches():
        for clip, window in zip(batch.clip_indices, batch.windows, strict=True):
            windows.setdefault(clip, []).append(packing.codes(window))
    assert windows == {clip: expected for clip in range(len(both[1]))}  # noqa: C420


def test_probe_tells_of_the_stored_frames(both: tuple[Source, Source]) -> None:
    clip = both[1].clips[0]
    info = probe(clip.path, "video", max_pixels=10**6)
    assert (info.num_frames, info.width, info.height, info.codec, info.rotation_degrees) == (4, 96, 96, "jpeg", 0)
    assert info.frames_per_second == pytest.approx(5.0)
    np.testing.assert_allclose(info.presentation_seconds, [0, 0.2, 0.4, 0.6], atol=1e-9)
    with pytest.raises(ClipError, match="too_large"):
        probe(clip.path, "video", max_pixels=96 * 96 - 1)
    with pytest.raises(ClipError, match="not_a_video: packed as video, read as image"):
        probe(clip.path, "image", max_pixels=10**6)
    assert probe(both[0].clips[0].path, "video", max_pixels=10**6).num_frames == FRAMES, "files as before"


@pytest.mark.parametrize("wanted", [(0,), (3, 0, 2), (1, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3)])
def test_any_order_and_repeats(wanted: tuple[int, ...], both: tuple[Source, Source]) -> None:
    request = DecodeRequest(both[1].clips[4].path, "video", wanted, TestView(RESOLUTION))
    (got,) = packing.decoder().decode([request])
    assert isinstance(got, Decoded)
    assert packing.codes(got.frames_TCHW) == [(2, 7, 12, 17)[index] for index in wanted]


@pytest.mark.parametrize("wanted", [(), (4,), (-1, 0)])
def test_frames_that_are_not_there_are_the_caller_s_mistake(
    wanted: tuple[int, ...], both: tuple[Source, Source]
) -> None:
    with pytest.raises(ValueError, match="frame_indices"):
        packing.decoder().decode([DecodeRequest(both[1].clips[0].path, "video", wanted, TestView(96))])


def test_a_batch_may_mix_files_and_packed_clips(both: tuple[Source, Source]) -> None:
    files, shards = both
    requests = [
        DecodeRequest((shards if n % 2 else files).clips[n].path, "video", (n % 2 and 1 or 7,), TestView(RESOLUTION))
        for n in range(5)
    ]
    outcomes = packing.decoder().decode(requests)
    assert [outcome.backend for outcome in outcomes if isinstance(outcome, Decoded)] == ["pyav", "jpeg"] * 2 + ["pyav"]
    assert [packing.codes(outcome.frames_TCHW) for outcome in outcomes if isinstance(outcome, Decoded)] == [[7]] * 5


@pytest.mark.parametrize("wanted", [(2,), (0, 3)])
def test_only_the_wanted_frames_are_read(
    wanted: tuple[int, ...], both: tuple[Source, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = parse_address(both[1].clips[1].path)
    assert address is not None
    clips = np.load(Path(address.folder) / "clips.npy")
    frames = np.load(Path(address.folder) / "frames.npy")[int(clips[address.row]["first_frame"]) :][:4]
    read: list[tuple[int, int]] = []
    real = os.preadv

    def noted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        read.append((offset, sum(len(buffer) for buffer in buffers)))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", noted)
    monkeypatch.setattr("frozen_fast.data.shards.decoder._NEAR_BYTES", 600)  # small frames: keep apart what is apart
    (got,) = packing.decoder().decode([DecodeRequest(both[1].clips[1].path, "video", wanted, TestView(96))])
    assert isinstance(got, Decoded)
    assert read == [(int(frames[n]["offset"]), int(frames[n]["length"])) for n in wanted]


def test_neighbours_are_read_at_once(both: tuple[Source, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: calls.append(1) or real(*arguments))
    packing.decoder().decode([DecodeRequest(both[1].clips[1].path, "video", (0, 1, 2, 3), TestView(96))])
    assert len(calls) == 1


def test_short_reads_are_continued(both: tuple[Source, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    request = DecodeRequest(both[1].clips[1].path, "video", (0, 1, 2, 3), TestView(96))
    (whole,) = packing.decoder().decode([request])
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:100]], offset))
    (pieces,) = packing.decoder().decode([request])
    assert isinstance(whole, Decoded) and isinstance(pieces, Decoded)
    assert torch.equal(whole.frames_TCHW, pieces.frames_TCHW)


def test_no_video_library_is_needed(both: tuple[Source, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("av", "nvidia.dali", "torchcodec", "decord"):
        monkeypatch.setitem(sys.modules, name, None)
    decoder = packing.decoder("auto")
    requests = [DecodeRequest(clip.path, "video", (1,), TestView(96)) for clip in both[1].clips]
    outcomes = [outcome for outcome in decoder.decode(requests) if isinstance(outcome, Decoded)]
    assert [packing.codes(outcome.frames_TCHW) for outcome in outcomes] == [[7]] * len(requests)
    decoder.close()


def test_few_files_stay_open(tmp_path: Path) -> None:
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}")
        paths[-1].write_bytes(bytes([number]) * 10)
    before = len(os.listdir("/proc/self/fd"))
    files = ShardFiles(most_open=2)
    with files.opened(str(paths[0]), 10) as held:
        for path in paths * 3:
            with files.opened(str(path), 10) as descriptor:
                assert os.pread(descriptor, 1, 0) == path.read_bytes()[:1]
            assert len(files) <= 3
        assert os.pread(held, 1, 0) == b"\x00", "a file in use is not closed"
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    files.close()
    assert len(files) == 0 and len(os.listdir("/proc/self/fd")) == before


def test_a_decoder_works_in_a_forked_process_too(both: tuple[Source, Source]) -> None:
    decoder = packing.decoder()
    requests = [DecodeRequest(clip.path, "video", (0, 2), TestView(96)) for clip in both[1].clips]
    expected = decoder.decode(requests)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        outcomes = [outcome.frames_TCHW.sum().item() for outcome in decoder.decode(requests)]  # type: ignore[union-attr]
        os.write(writing, pickle.dumps(outcomes))
        os._exit(0)
    again = decoder.decode(requests)
    os.close(writing)
    with open(reading, "rb") as pipe:
        theirs = pickle.loads(pipe.read())
    assert os.waitpid(child, 0)[1] == 0
    assert theirs == [outcome.frames_TCHW.sum().item() for outcome in expected]  # type: ignore[union-attr]
    assert all(torch.equal(a.frames_TCHW, b.frames_TCHW) for a, b in zip(expected, again, strict=True))  # type: ignore[union-attr]


def test_many_threads_share_a_decoder_s_files(both: tuple[Source, Source]) -> None:
    decoder = packing.decoder(threads=4)
    packed = decoder._packed
    assert isinstance(packed, PackedFrameDecoder)
    packed._files = ShardFiles(most_open=1)
    requests = [DecodeRequest(clip.path, "video", (3,), TestView(96)) for clip in both[1].clips for _ in range(6)]
    outcomes = decoder.decode(requests)
    assert all(packing.codes(outcome.frames_TCHW) == [17] for outcome in outcomes if isinstance(outcome, Decoded))
    assert sum(isinstance(outcome, Decoded) for outcome in outcomes) == len(requests)


def test_pictures_and_short_clips(tmp_path: Path) -> None:
    def write_picture(path: Path, number: int) -> None:
        videos.picture(path.parent, path.name, number=number)

    manifest = manifest_folder(tmp_path, 3, kind="image", suffix=".png", write_clip=write_picture)
    pack(source_of(manifest), tmp_path / "packed")
    source = source_of(tmp_path / "packed")
    assert source.kind == "image" and len(source) == 3
    got = batches_of(source, 8)[0]
    assert got.frames == 1 and got.video.shape == (4, 1, 3, RESOLUTION, RESOLUTION)
    requests = [DecodeRequest(clip.path, "image", (0,), TestView(64)) for clip in source.clips]
    outcomes = packing.decoder().decode(requests)
    numbers = [packing.codes(outcome.frames_TCHW) for outcome in outcomes if isinstance(outcome, Decoded)]
    assert numbers == [[0], [1], [2]]

    def write_short(path: Path, number: int) -> None:
        videos.write_video(path, "libvpx-vp9", frames=3, options=videos.VP9)

    short = manifest_folder(tmp_path / "short", 1, write_clip=write_short)
    pack(source_of(short), tmp_path / "short_packed")
    clip = source_of(tmp_path / "short_packed")
    assert probe(clip.clips[0].path, "video", max_pixels=10**6).num_frames == 3
    assert packing.codes(batches_of(clip, 4)[0].video[0]) == [0, 1, 1, 2]
