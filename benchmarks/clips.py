"""Clips to read in a benchmark: a manifest, a folder or shards that are there, or what is rendered on the spot."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from frozen_fast.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
COUNT = 64
"""Rendered clips; a manifest names each of them several times, so that a batch is never larger than the source."""
REPEATS = 64
DATA = "render, shards, stills, a manifest (.jsonl), packed shards, or a folder of clips"
FILLER = "shown again and again " * 16
"""Captions are cut to --text-tokens, so that a real batch costs the text tower what the synthetic one does."""


def data_manifest(data: str, scratch: Path, *, small: bool) -> Path:
    """The manifest of what to decode.

    Args:
        data: "render", "shards" (rendered and packed), "stills" (pictures, which need no video encoder), a manifest
            (.jsonl), a folder that frozen-fast pack wrote, or a folder of clips.
        scratch: where rendered clips and a folder's manifest go.
        small: render small, short clips.

    Raises:
        UserError: nothing to decode there.
    """
    path, scratch = Path(data), scratch.resolve()  # manifests name clips by their absolute path
    if data == "render":
        return render_clips(scratch / "clips", small=small)
    if data == "stills":
        return render_stills(scratch / "stills", small=small)
    if data == "shards":
        return repeated_shards(pack_rendered(scratch, small=small), scratch)
    if (path / "index.json").is_file():
        return repeated_shards(path.resolve(), scratch)
    if path.is_dir():
        clips = sorted(file.resolve() for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
        if not clips:
            raise UserError(f"--data: got {data}; allowed: a folder with {', '.join(VIDEO_SUFFIXES)} files")
        return write_manifest(scratch / "folder.jsonl", clips, repeats=max(1, COUNT * REPEATS // len(clips)))
    if path.suffix == ".jsonl" and path.is_file():
        return path.resolve()
    raise UserError(f"--data: got {data!r}; allowed: {DATA}")


def write_manifest(path: Path, clips: list[Path], *, repeats: int, kind: str = "video") -> Path:
    """One line per clip and repeat; the caption is the file's name and words enough to fill a text tower's input."""
    lines = [
        {
            "id": f"{clip.stem}_{repeat}",
            "path": str(clip),
            "captions": [f"{clip.stem.replace('_', ' ')} {FILLER}"],
            "kind": kind,
        }
        for repeat in range(repeats)
        for clip in clips
    ]
    path.write_text("".join(json.dumps({**line, "split": "train"}) + "\n" for line in lines), encoding="utf-8")
    return path


def render_clips(folder: Path, *, small: bool) -> Path:
    """Render VP9 clips of drifting texture: 456x256, 250 frames, a key frame every 125 (64x64, 24 frames if small)."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height, frames, count = (64, 64, 24, 8) if small else (456, 256, 250, COUNT)
    paths = [folder / f"clip_{index:03d}.webm" for index in range(count)]
    render = partial(render_clip, width=width, height=height, frames=frames)
    if small:
        for index, path in enumerate(paths):
            render(path, index)
    else:
        processes = min(count, len(os.sched_getaffinity(0)))
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(render, paths, range(count)))
    return write_manifest(folder / "clips.jsonl", paths, repeats=REPEATS)


def pack_rendered(scratch: Path, *, small: bool) -> Path:
    """Render clips and pack 8 frames of each; the packed folder."""
    from frozen_fast.config.schema import SourceConfig
    from frozen_fast.data.packing.extract import PackSettings
    from frozen_fast.data.packing.pack_shards import PackLimits, pack_source
    from frozen_fast.data.sources import read_source

    manifest = render_clips(scratch / "clips", small=small)
    distinct = len(list(manifest.parent.glob("*.webm")))
    source = read_source(SourceConfig(name="rendered", path=str(manifest), max_clips=distinct))
    workers = 0 if small else len(os.sched_getaffinity(0))
    return pack_source(source, scratch / "packed", PackSettings(), PackLimits(workers=workers)).folder


def repeated_shards(folder: Path, scratch: Path) -> Path:
    """A manifest of packed clips; those of a small folder several times, so that a batch is not larger than it."""
    lines = [json.loads(line) for line in (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    repeats = COUNT * REPEATS // max(1, len(lines))
    if repeats <= 1:
        return folder / "clips.jsonl"
    path = scratch / "shards.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for repeat in range(repeats):
            for line in lines:
                changed = {"id": f"{line['id']}_{repeat}", "path": f"{folder / line['path']}", "split": "train"}
                file.write(json.dumps({key: value for key, value in line.items() if key != "twin"} | changed) + "\n")
    return path


def render_stills(folder: Path, *, small: bool) -> Path:
    """Render JPEG pictures of texture, 456x256 (64x64 if small): clips of one frame in every stage."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = (64, 64) if small else (456, 256)
    paths = [folder / f"still_{index:03d}.jpg" for index in range(COUNT)]
    for index, path in enumerate(paths):
        Image.fromarray(texture_HWC(np.random.default_rng(index), width, height)).save(path, quality=90)
    return write_manifest(folder / "stills.jsonl", paths, repeats=REPEATS, kind="image")


def texture_HWC(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Coarse noise, uint8 [height, width, 3]."""
    coarse = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]


def render_clip(path: Path, seed: int, *, width: int, height: int, frames: int) -> None:
    """Encode one clip whose texture moves a few pixels a frame, so that every frame costs the decoder something."""
    import av

    rng = np.random.default_rng(seed)
    texture = texture_HWC(rng, width, height)
    down, right = (int(step) for step in rng.integers(1, 4, 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libvpx-vp9", rate=25, options={"deadline": "realtime", "cpu-used": "8", "g": "125"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = np.roll(texture, (down * index, right * index), axis=(0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Render clips, shards or stills and their manifest into a folder.")
    parser.add_argument("data", choices=("render", "shards", "stills"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(data_manifest(options.data, options.folder, small=options.small))
