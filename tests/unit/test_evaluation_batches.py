from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
import torch

from frozen_fast.config.schema import DecodeConfig
from frozen_fast.data.load.evaluation_loader import EvaluationLoader
from frozen_fast.data.plan.frame_sampling import test_windows as windows_of
from frozen_fast.data.sources import Clip, PackedClips, Source
from frozen_fast.errors import UserError
from support.fake_decoding import SIZE, FakeDecoder, clip_code, fake_probe


def make_source(count: int, words: dict[int, str] | None = None, **fields: Any) -> Source:
    words = words or {}
    clips = [Clip(f"c{n}", f"/x/c{n}{words.get(n, '')}.mp4", (f"caption {n}",), **fields) for n in range(count)]
    return Source("eval", "manifest", PackedClips(clips), fields.get("kind", "video"))


def make_loader(source: Source, factory: Any = FakeDecoder, *, decode: Any = None, **fields: Any) -> EvaluationLoader:
    settings: dict[str, Any] = {
        "frames": 4,
        "stride_seconds": 0.2,
        "max_windows": 0,
        "batch_size": 5,
        "resize": 256,
        "prober": fake_probe,
    }
    return EvaluationLoader(source, factory, decode=DecodeConfig(**(decode or {})), **settings | fields)


def collect(loader: EvaluationLoader) -> dict[int, list[list[int]]]:
    """clip -> its windows as frame indices; checks clip, view and shape of each."""
    windows: dict[int, list[list[int]]] = defaultdict(list)
    for batch in loader.batches():
        assert 1 <= len(batch.windows) == len(batch.clip_indices) <= 5
        for index, window in zip(batch.clip_indices, batch.windows, strict=True):
            assert window.shape[1:] == (3, SIZE, SIZE)
            clip = loader._source.clips[index]
            assert (window[:, 0] == clip_code(clip.path)).all() and (window[:, 2] == 256).all()
            windows[index].append([int(frame) for frame in window[:, 1, 0, 0]])
    return dict(windows)


EXPECTED = {20: windows_of(20, 4, stride_frames=2), 200: windows_of(200, 4, stride_frames=2), 2: [[0, 0, 1, 1]]}


def expected(source: Source) -> dict[int, list[list[int]]]:
    length = {True: 200, False: 20}
    return {
        index: EXPECTED[2 if "short" in clip.path else length["long" in clip.path]]
        for index, clip in enumerate(source.clips)
    }


@pytest.mark.parametrize("threads", [1, 3])
def test_every_window_of_every_clip_comes_once(threads: int) -> None:
    source = make_source(23, {2: "short", 7: "long", 8: "long"})
    assert collect(make_loader(source, decode={"threads": threads})) == expected(source)


def test_workers_give_the_same_windows() -> None:
    source = make_source(11, {2: "short", 7: "long"})
    windows = collect(make_loader(source, decode={"workers": 2}))
    assert windows == expected(source)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 30])
def test_ranks_partition_the_clips_exactly(world_size: int) -> None:
    source = make_source(23, {7: "long"})
    merged: Counter[int] = Counter()
    for rank in range(world_size):
        loader = make_loader(source, rank=rank, world_size=world_size)
        windows = collect(loader)
        assert set(windows) == set(loader.clip_indices)
        merged.update(windows.keys())
    assert merged == Counter(range(23))


def test_batches_are_full_except_the_last() -> None:
    sizes = [len(batch.clip_indices) for batch in make_loader(make_source(23, {7: "long"})).batches()]
    assert set(sizes[:-1]) == {5} and sum(sizes) == 22 * 3 + 25


def test_a_clip_is_decoded_once_where_it_fits_and_in_parts_where_not() -> None:
    decoder = FakeDecoder()
    collect(make_loader(make_source(6), lambda: decoder))
    assert decoder.decoded_frames == 6 * len({frame for window in EXPECTED[20] for frame in window})
    assert decoder.largest_request == 12
    decoder = FakeDecoder()
    collect(make_loader(make_source(1, {0: "long"}), lambda: decoder))
    assert decoder.largest_request == 5 * 4 and decoder.decoded_frames == 25 * 4
    assert decoder.closed


def test_pictures_give_one_window_of_one_frame() -> None:
    assert collect(make_loader(make_source(7, kind="image"), frames=8)) == {index: [[0]] for index in range(7)}


def test_pictures_among_videos_repeat_their_frame() -> None:
    videos, pictures = make_source(4), make_source(4, kind="image")
    mixed = Source("eval", "manifest", PackedClips([*videos.clips[:2], *pictures.clips[2:]]), "video")
    window = EXPECTED[20]
    assert collect(make_loader(mixed)) == {0: window, 1: window, 2: [[0, 0, 0, 0]], 3: [[0, 0, 0, 0]]}


def test_start_end_stride_and_max_windows() -> None:
    source = make_source(2, start_seconds=0.5, end_seconds=1.3)
    shifted = [[5 + frame for frame in window] for window in windows_of(8, 4, stride_frames=1)]
    assert collect(make_loader(source, stride_seconds=0.1)) == dict.fromkeys(range(2), shifted)
    assert collect(make_loader(source, stride_seconds=0.0)) == dict.fromkeys(range(2), [[5, 7, 9, 11]])
    assert collect(make_loader(make_source(1), stride_seconds=0.1, max_windows=2, frames=1)) == {0: [[5], [15]]}


@pytest.mark.parametrize("word", ["missing", "truncated"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_clip_is_an_error_by_default(word: str, workers: int) -> None:
    loader = make_loader(make_source(9, {4: word}), decode={"workers": workers})
    with pytest.raises(UserError, match=f"^clip 'c4' of source 'eval' cannot be read: .*{word}.*on_bad_clip=skip.*$"):
        list(loader.batches())


def test_a_skipped_clip_is_left_out_and_named() -> None:
    source = make_source(9, {4: "missing", 8: "truncated"})
    loader = make_loader(source, decode={"on_bad_clip": "skip"})
    assert set(collect(loader)) == {0, 1, 2, 3, 5, 6, 7}
    assert {index: bad.cause for index, bad in loader.dropped.items()} == {4: "missing", 8: "truncated"}
    assert all(bad.replaced_by is None and bad.source == "eval" for bad in loader.dropped.values())
    collect(loader)
    assert set(loader.dropped) == {4, 8}, "a second pass starts anew"


def test_a_source_of_skipped_clips_gives_no_batch() -> None:
    loader = make_loader(make_source(3, dict.fromkeys(range(3), "missing")), decode={"on_bad_clip": "skip"})
    assert list(loader.batches()) == [] and len(loader.dropped) == 3


def test_a_hanging_read_is_an_error() -> None:
    loader = make_loader(make_source(3, {1: "hang"}), decode={"read_timeout_seconds": 0.3})
    with pytest.raises(UserError, match="read_timeout_seconds: waited for evaluation windows of source 'eval'"):
        list(loader.batches())


def test_windows_go_to_the_device() -> None:
    batch = next(iter(make_loader(make_source(3), device="meta").batches()))
    assert batch.windows.device == torch.device("meta")
    with pytest.raises(UserError, match="batch_size: got 0"):
        make_loader(make_source(3), batch_size=0)
