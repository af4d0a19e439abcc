"""Pictures: every pixel mode has one deliberate result, in the DALI backend as in the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frozen_fast.data.decode import ClipError, Decoded, DecodeRequest, TestView, TrainView, build_decoder, probe
from frozen_fast.data.decode.pictures import is_plain_jpeg, read_picture
from support import videos

MAX_PIXELS = 10**6
CODE = 77
PICTURE = Image.fromarray(videos.code_frame(CODE, 96, 64))


def save(folder: Path, name: str) -> Path:
    """The coded picture in one of Pillow's modes or formats."""
    path = folder / name
    exif = Image.Exif()
    match name:
        case "palette.png" | "palette.gif":
            PICTURE.convert("P", palette=Image.Palette.ADAPTIVE).save(path)
        case "rgba.png":
            PICTURE.convert("RGBA").save(path)
        case "cmyk.jpg":
            PICTURE.convert("CMYK").save(path, quality=95)
        case "turned.jpg":
            exif[0x0112] = 6  # stored lying on its side: turn clockwise
            PICTURE.transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)
        case "turned.png":
            exif[0x0112] = 3
            PICTURE.transpose(Image.Transpose.ROTATE_180).save(path, exif=exif)
        case _:
            PICTURE.save(path, **({"quality": 95} if name.endswith("jpg") else {}))
    return path


NAMES = (
    "plain.jpg plain.png plain.webp plain.bmp palette.png palette.gif rgba.png cmyk.jpg turned.jpg turned.png".split()
)


@pytest.mark.parametrize("backend", ["dali", "pyav", "auto"])
def test_every_mode_is_upright_rgb(tmp_path: Path, backend: str) -> None:
    decoder = build_decoder(backend, device="cpu", resolution=64, threads=2, max_pixels=MAX_PIXELS)
    paths = [save(tmp_path, name) for name in NAMES]
    infos = [probe(path, "image", max_pixels=MAX_PIXELS) for path in paths]
    assert {(info.width, info.height, info.codec, info.num_frames) for info in infos} == {(96, 64, "image", 1)}
    for view in (TrainView(0, 0, 64, 96, False), TrainView(0, 0, 64, 96, True)):
        outcomes = decoder.decode([DecodeRequest(path, "image", (0,), view) for path in paths])
        for name, outcome in zip(NAMES, outcomes, strict=True):
            assert isinstance(outcome, Decoded), (name, outcome)
            frames = outcome.frames_TCHW.flip(-1) if view.flip else outcome.frames_TCHW
            assert videos.read_code(frames[0].permute(1, 2, 0).numpy()) == CODE, name
            fast = backend == "dali" and name in ("plain.jpg", "turned.jpg")
            assert outcome.backend == ("dali" if fast else "pil")
    decoder.close()


def test_dali_and_pillow_agree_on_a_jpeg(tmp_path: Path) -> None:
    path = save(tmp_path, "plain.jpg")
    frames = []
    for backend in ("dali", "pyav"):
        decoder = build_decoder(backend, device="cpu", resolution=32, threads=1, max_pixels=MAX_PIXELS)
        (outcome,) = decoder.decode([DecodeRequest(path, "image", (0,), TestView(40))])
        frames.append(outcome.frames_TCHW)
        decoder.close()
    assert (frames[0].float() - frames[1].float()).abs().mean() < 2


def test_a_picture_as_a_clip_of_several_frames_repeats(tmp_path: Path) -> None:
    for backend in ("dali", "pyav"):
        decoder = build_decoder(backend, device="cpu", resolution=32, threads=1, max_pixels=MAX_PIXELS)
        (outcome,) = decoder.decode([DecodeRequest(save(tmp_path, "plain.jpg"), "image", (0, 0, 0), TestView(40))])
        decoder.close()
        assert outcome.frames_TCHW.shape == (3, 3, 32, 32)
        assert torch.equal(outcome.frames_TCHW[0], outcome.frames_TCHW[2])


def test_transparency_is_white_and_deep_grey_keeps_its_scale(tmp_path: Path) -> None:
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, :, 3] = 128
    Image.fromarray(half, "RGBA").save(tmp_path / "half.png")
    assert abs(int(read_picture(str(tmp_path / "half.png"), max_pixels=MAX_PIXELS)[0, 0, 0, 0]) - 127) <= 1
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = read_picture(str(tmp_path / "deep.png"), max_pixels=MAX_PIXELS)
    assert grey.shape == (1, 8, 8, 3) and grey[0, 0, 0, 0] == 0 and grey[0, -1, -1, 0] == 255
    assert np.abs(grey[0, :, :, 0].astype(float) - deep / 257).max() <= 0.51


def test_the_pixel_limit_holds_at_its_edge(tmp_path: Path) -> None:
    path = videos.picture(tmp_path, width=100, height=50)
    assert probe(path, "image", max_pixels=5000).width == 100
    with pytest.raises(ClipError, match="too_large"):
        probe(path, "image", max_pixels=4999)


def test_a_cut_jpeg_is_left_to_pillow_which_tells(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    whole = tmp_path / "whole.jpg"
    Image.fromarray(noise).save(whole)
    cut = videos.truncated(whole, tmp_path / "cut.jpg", 0.7)
    assert is_plain_jpeg(str(whole), max_pixels=MAX_PIXELS) and not is_plain_jpeg(str(cut), max_pixels=MAX_PIXELS)
    for backend in ("dali", "pyav"):
        decoder = build_decoder(backend, device="cpu", resolution=32, threads=1, max_pixels=MAX_PIXELS)
        (outcome,) = decoder.decode([DecodeRequest(cut, "image", (0,), TestView(40))])
        decoder.close()
        assert isinstance(outcome, ClipError) and outcome.cause == "truncated", outcome
