"""The same index gives the same frame in every backend, bad clips harm no other, and nothing turns black.

torchcodec needs FFmpeg's shared libraries; where the machine has none, test_decode_torchcodec.py runs this file once
more in a process that finds the PyAV wheel's.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from frozen_fast.data.decode import (
    ClipError,
    Decoded,
    Decoder,
    DecodeRequest,
    TestView,
    TrainView,
    build_decoder,
    probe,
    unavailable_backends,
)
from frozen_fast.errors import UserError
from support import videos

MAX_PIXELS = 50_000_000
BACKENDS = ("dali", "torchcodec", "decord", "pyav", "auto")
# what a backend by itself cannot read, and says so: (backend, clip) -> words of the error
CANNOT = {
    **{
        ("dali", name): "reads mjpeg, vp8, vp9 and not"
        for name in ("h264_b", "vfr_h264", "rotated_h264", "edit_list_h264", "mpeg4")
    },
    **{(backend, "mpeg4"): "has no frame times" for backend in ("torchcodec", "decord")},
    **{("decord", name): "hides frames" for name in ("vp8_hidden", "edit_list_h264", "edit_list_vp9")},
    ("torchcodec", "vp8_hidden"): "counts 20 frames, the file has 19",
}


def made(backend: str, **changes: object) -> Decoder:
    settings = {"device": "cpu", "resolution": 64, "threads": 2, "max_pixels": MAX_PIXELS}
    return build_decoder(backend, **{**settings, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backends")


@pytest.fixture(scope="module", params=BACKENDS)
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    reason = unavailable_backends().get(request.param)
    if reason is not None:
        assert request.param == "torchcodec", reason
        pytest.skip(reason)
    decoder = made(request.param)
    yield decoder
    decoder.close()


def pixels(frames_TCHW: torch.Tensor) -> np.ndarray:
    """[T, H, W, C] floats."""
    return frames_TCHW.permute(0, 2, 3, 1).numpy().astype(np.float64)


def whole_view(path: Path) -> TrainView:
    info = probe(path, "video", max_pixels=MAX_PIXELS)
    return TrainView(0, 0, info.height, info.width, False)


def one(decoder: Decoder, path: Path, indices: tuple[int, ...], view: TrainView | TestView) -> Decoded | ClipError:
    (outcome,) = decoder.decode([DecodeRequest(path, "video", indices, view)])
    return outcome


@pytest.mark.parametrize("name", sorted(videos.GOOD))
def test_the_same_index_gives_the_same_frame(folder: Path, decoder: Decoder, name: str) -> None:
    path = videos.GOOD[name](folder)
    num_frames = probe(path, "video", max_pixels=MAX_PIXELS).num_frames
    codes = videos.expected_codes(name, num_frames)
    for indices in (tuple(range(num_frames)), (num_frames - 1, 0, num_frames // 2, 0), (num_frames - 1,)):
        request = DecodeRequest(path, "video", indices, whole_view(path))
        if (decoder.name, name) in CANNOT:
            words = CANNOT[decoder.name, name]
            try:
                (outcome,) = decoder.decode([request])
            except UserError as error:
                assert words in str(error) and decoder.name == "dali"
            else:
                assert isinstance(outcome, ClipError) and words in outcome.message
            continue
        (outcome,) = decoder.decode([request])
        assert isinstance(outcome, Decoded), outcome
        assert outcome.frames_TCHW.shape == (len(indices), 3, 64, 64)
        assert outcome.frames_TCHW.dtype == torch.uint8 and outcome.frames_TCHW.is_contiguous()
        assert [videos.read_code(frame) for frame in pixels(outcome.frames_TCHW)] == [codes[i] for i in indices]
        assert outcome.backend == decoder.name or decoder.name == "auto"


def upright_frames(path: Path) -> torch.Tensor:
    """Every frame by plain PyAV, [T, C, H, W] uint8."""
    with av.open(str(path)) as container:
        frames = [
            np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in container.decode(video=0)
        ]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["vp9", "odd", "odd_420", "rotated_vp9", "upside_down"])
@pytest.mark.parametrize("kind", ["crop", "crop_and_flip", "test_down", "test_up", "test_same"])
def test_views_agree_with_torchvision(folder: Path, decoder: Decoder, name: str, kind: str) -> None:
    path = videos.GOOD[name](folder)
    source = upright_frames(path)[[2, 0]]
    height, width = source.shape[-2:]
    view: TrainView | TestView
    if kind.startswith("crop"):
        view = TrainView(7, 11, height - 20, width - 31, kind == "crop_and_flip")
        expected = v2.functional.resized_crop(source, 7, 11, height - 20, width - 31, [64, 64], antialias=True)
        expected = expected.flip(-1) if view.flip else expected
    else:
        short = {"test_down": 73, "test_up": 250, "test_same": 64}[kind]
        view = TestView(short)
        expected = v2.Compose([v2.Resize(short), v2.CenterCrop(short), v2.Resize(64)])(source)
    outcome = one(decoder, path, (2, 0), view)
    assert isinstance(outcome, Decoded), outcome
    difference = np.abs(pixels(outcome.frames_TCHW) - expected.permute(0, 2, 3, 1).numpy())
    # the chroma of 4:2:0 is upsampled in different ways; "odd" is 4:4:4
    assert difference.mean() < 3.0
    if name == "odd":
        assert difference.mean() < 0.6 and np.quantile(difference, 0.99) <= 4.0


def test_one_bad_clip_harms_no_other(folder: Path, decoder: Decoder) -> None:
    good = videos.vp9(folder)
    broken = videos.broken_files(folder / "broken")
    requests, causes = [], []
    for path, kind, allowed in broken.values():
        requests.append(DecodeRequest(path, kind, (0,), TestView(64)))
        requests.append(DecodeRequest(good, "video", (4,), whole_view(good)))
        causes += [allowed, None]
    for outcome, allowed, request in zip(decoder.decode(requests), causes, requests, strict=True):
        if allowed is None:
            assert isinstance(outcome, Decoded), outcome
            assert videos.read_code(pixels(outcome.frames_TCHW)[0]) == 4
        else:
            assert isinstance(outcome, ClipError), request
            assert outcome.cause in allowed and outcome.path == str(request.path)


@pytest.mark.parametrize("name", ["vp9", "vp9_long", "mjpeg", "h264_b"])
def test_noise_inside_a_frame_is_an_error_and_the_next_clip_is_fine(folder: Path, decoder: Decoder, name: str) -> None:
    if (decoder.name, name) in CANNOT:
        pytest.skip("DALI reads no H.264 on the CPU")
    whole = videos.GOOD[name](folder)
    path = videos.noise_in_packet(whole, folder / f"noise_{whole.name}")
    num_frames = probe(path, "video", max_pixels=MAX_PIXELS).num_frames
    good = DecodeRequest(whole, "video", (6,), whole_view(whole))
    bad = DecodeRequest(path, "video", tuple(range(num_frames)), whole_view(path))
    for requests, place in (([good, bad, good], 1), ([bad], 0), ([good], None)):
        for position, outcome in enumerate(decoder.decode(requests)):
            if position == place:
                assert isinstance(outcome, ClipError) and outcome.cause == "decode_failed", outcome
                assert "\n" not in outcome.message and len(outcome.message) < 400
            else:
                assert isinstance(outcome, Decoded), outcome
                assert videos.read_code(pixels(outcome.frames_TCHW)[0]) == 6


def test_a_black_clip_is_believed(folder: Path, decoder: Decoder) -> None:
    path = folder / "black.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=25, options=videos.VP9)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((96, 96, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    outcome = one(decoder, path, (0, 3), whole_view(path))
    assert isinstance(outcome, Decoded), outcome
    assert pixels(outcome.frames_TCHW).max() < 3


def test_black_frames_of_dali_where_there_are_pictures_are_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dali = made("dali")
    real = dali._run_pipeline

    def blind(jobs: list, capacity: int) -> tuple:
        frames, peaks = real(jobs, capacity)
        return frames, [np.zeros_like(peak) for peak in peaks]

    monkeypatch.setattr(dali, "_run_pipeline", blind)
    path = videos.vp9(folder)
    outcome = one(dali, path, (1, 5), whole_view(path))
    dali.close()
    assert isinstance(outcome, ClipError) and outcome.cause == "decode_failed" and "black" in outcome.message


@pytest.mark.parametrize("indices", [(), (-1,), (20,), (0, 99)])
def test_frame_numbers_that_do_not_exist_are_the_callers_mistake(
    folder: Path, decoder: Decoder, indices: tuple[int, ...]
) -> None:
    path = videos.vp9(folder)
    with pytest.raises(ValueError, match="allowed: 0 to 19"):
        one(decoder, path, indices, whole_view(path))


def test_a_batch_of_many_kinds_keeps_its_order(folder: Path, decoder: Decoder) -> None:
    paths = [videos.GOOD[name](folder) for name in ("vp9", "mjpeg", "odd", "rotated_vp9", "one_frame")]
    requests, codes = [], []
    for repeat in range(15):
        for path in paths:
            num_frames = probe(path, "video", max_pixels=MAX_PIXELS).num_frames
            index = repeat % num_frames
            view = TestView(64) if repeat % 2 and path != paths[3] else whole_view(path)
            requests.append(DecodeRequest(path, "video", (index,), view))
            codes.append(None if isinstance(view, TestView) and path == paths[2] else index)
    outcomes = decoder.decode(requests)
    for outcome, code in zip(outcomes, codes, strict=True):
        assert isinstance(outcome, Decoded)
        if code is not None:
            assert videos.read_code(pixels(outcome.frames_TCHW)[0]) == code


def _decode_in_child(decoder: Decoder, request: DecodeRequest, queue: multiprocessing.Queue) -> None:
    (outcome,) = decoder.decode([request, request])[:1]
    queue.put(outcome.frames_TCHW.numpy() if isinstance(outcome, Decoded) else str(outcome))


@pytest.mark.parametrize("backend", ["dali", "decord", "pyav"])
def test_a_decoder_made_before_a_fork_works_after_it(folder: Path, backend: str) -> None:
    path = videos.vp9(folder)
    request = DecodeRequest(path, "video", (9,), whole_view(path))
    decoder = made(backend)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_decode_in_child, args=(decoder, request, queue), daemon=True)
    child.start()
    result = queue.get(timeout=60)
    child.join(timeout=30)
    assert child.exitcode == 0
    assert not isinstance(result, str), result
    assert videos.read_code(pixels(torch.from_numpy(result))[0]) == 9
    decoder.close()


def test_no_file_stays_open_and_memory_stays_level(folder: Path, decoder: Decoder) -> None:
    path = videos.vp9(folder)
    requests = [DecodeRequest(path, "video", (index, 19), whole_view(path)) for index in range(10)]

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(5):
        decoder.decode(requests)
    files, memory = len(os.listdir("/proc/self/fd")), resident_bytes()
    for _ in range(15):
        decoder.decode(requests)
    assert len(os.listdir("/proc/self/fd")) <= files
    assert resident_bytes() - memory < 30 * 1024 * 1024


def test_an_unknown_backend_is_named_with_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"data.decode.backend: got 'torchcodek' \(did you mean 'torchcodec'\?\)"):
        made("torchcodek")
