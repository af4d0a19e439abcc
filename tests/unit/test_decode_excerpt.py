"""Excerpts hold the packets that the wanted frames need, and those only."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from frozen_fast.data.decode.excerpt import cheapest, excerpt, packet_runs
from frozen_fast.data.decode.frame_index import read_index
from support import videos

MAX_PIXELS = 10**7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("excerpt")


def codes_of(encoded: np.ndarray, degrees: int) -> list[int]:
    with av.open(io.BytesIO(encoded.tobytes())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [videos.read_code(np.rot90(frame, -(degrees // 90))) for frame in frames]


@pytest.mark.parametrize("name", sorted(set(videos.GOOD) - {"mpeg4"}))
def test_wanted_frames_are_where_the_excerpt_says(folder: Path, name: str) -> None:
    path = str(videos.GOOD[name](folder))
    index = read_index(path, max_pixels=MAX_PIXELS)
    last = index.info.num_frames - 1
    expected = videos.expected_codes(name, last + 1)
    for wanted in ([last, 0, last], [last], [last // 2, last // 3], list(range(last + 1))):
        cut = excerpt(path, index, wanted, MAX_PIXELS)
        codes = codes_of(cut.encoded, index.info.rotation_degrees)
        assert len(codes) == cut.num_frames
        assert [codes[place] for place in cut.frame_indices] == [expected[number] for number in wanted]


def test_only_the_groups_of_pictures_that_are_needed_are_kept(folder: Path) -> None:
    path = str(videos.vp9(folder))  # key frames 0, 8, 16
    index = read_index(path, max_pixels=MAX_PIXELS)
    assert packet_runs(index, [9, 2, 1, 10]) == [(0, 2), (8, 10)]
    cut = excerpt(path, index, [9, 2, 1, 10], MAX_PIXELS)
    assert codes_of(cut.encoded, 0) == [0, 1, 2, 8, 9, 10]
    assert cut.frame_indices.tolist() == [4, 2, 1, 5]
    mjpeg = str(videos.mjpeg(folder))
    cut = excerpt(mjpeg, read_index(mjpeg, max_pixels=MAX_PIXELS), [19, 3], MAX_PIXELS)
    assert codes_of(cut.encoded, 0) == [3, 19]


def test_a_file_is_cut_only_where_that_saves_enough(folder: Path) -> None:
    path = str(videos.vp9(folder))
    index = read_index(path, max_pixels=MAX_PIXELS)
    assert cheapest(path, index, [18], MAX_PIXELS, saving=16).num_frames == 3  # 16, 17, 18 instead of 19 frames
    assert cheapest(path, index, [18], MAX_PIXELS, saving=17).num_frames == 20
    edited = str(videos.edit_list(folder))
    index = read_index(edited, max_pixels=MAX_PIXELS)
    assert cheapest(edited, index, [0], MAX_PIXELS, saving=16).frame_indices.tolist() != [0]  # hidden frames before
