"""Render the demo's data set: clips of moving shapes as real VP9 .webm files, still pictures, and their manifests.

Every clip has a twin: the same frames played backwards, with the caption of the reversed motion. A single frame,
wherever it is taken from, is as likely under one twin as under the other, so a model that sees one frame can do no
better than guess between the two. The encoding is lossless, so this holds for the decoded pixels as well.

    python launch/render_demo.py --folder data/demo

The set depends only on the recipe (seed and counts). A second run keeps existing files, a run after an interruption
renders the missing ones, and a run with another recipe renders everything again.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from demo_scenes import (
    POLYGONS,
    RADIUS,
    STILL_PLACES,
    THINGS,
    Recipe,
    Scene,
    Spot,
    draw_scenes,
    plan,
    spot_of,
)
from frozen_fast.common.files import read_json_lines, write_atomically, write_json
from frozen_fast.errors import UserError

# Axis letters: T frames, H and W pixels, C channels (RGB, uint8).

logger = logging.getLogger("frozen_fast.render_demo")

CLIP_PIXELS = 64
STILL_PIXELS = 96
FRAMES_PER_SECOND = 16
SUPERSAMPLING = 4

BACKGROUNDS: tuple[tuple[int, int, int], ...] = ((12, 12, 14), (28, 28, 30), (34, 26, 20), (18, 26, 32))


def background_HWC(pixels: int, rng: random.Random) -> np.ndarray:
    """One of a few plain backgrounds, float32 [pixels, pixels, 3] from 0 to 255.

    Few, because a background of its own for every pair would be a name tag that a small model learns by heart
    instead of the motion.
    """
    return np.broadcast_to(np.asarray(rng.choice(BACKGROUNDS), dtype=np.float32), (pixels, pixels, 3))


def coverage_HW(spot: Spot, pixels: int) -> np.ndarray:
    """How much of each pixel a spot covers, float32 [pixels, pixels] from 0 to 1, antialiased."""
    side = pixels * SUPERSAMPLING
    mask = Image.new("L", (side, side), 0)
    x, y, radius = spot.x * side, spot.y * side, spot.radius * side
    if spot.shape == "circle":
        ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        corners = [(x + radius * dx, y + radius * dy) for dx, dy in POLYGONS[spot.shape]]
        ImageDraw.Draw(mask).polygon(corners, fill=255)
    return np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32) / 255.0


def paint_HWC(spots: Sequence[Spot], background: np.ndarray) -> np.ndarray:
    """One picture, uint8 [H, W, 3]: the spots over the background, in order."""
    picture = background
    for spot in spots:
        share_HW = (coverage_HW(spot, background.shape[0]) * spot.opacity)[..., None]
        picture = picture * (1.0 - share_HW) + np.asarray(spot.rgb, dtype=np.float32) * share_HW
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def render_clip_THWC(scene: Scene, rng: random.Random) -> np.ndarray:
    """The frames of a scene, uint8 [CLIP_FRAMES, CLIP_PIXELS, CLIP_PIXELS, 3]; its twin is the reverse."""
    background = background_HWC(CLIP_PIXELS, rng)
    return np.stack([paint_HWC(spots, background) for spots in plan(scene, rng)])


def encode_webm(frames_THWC: np.ndarray) -> bytes:
    """Encode frames as lossless VP9 in WebM; the same frames always give the same bytes.

    Only the step from RGB to 4:2:0 loses anything, and it looks at one frame at a time: frames that were
    equal before are equal after decoding, in whatever order they stand.
    """
    import av

    buffer = io.BytesIO()
    options = {"lossless": "1", "deadline": "realtime", "cpu-used": "6", "flags": "+bitexact"}
    with av.open(buffer, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=FRAMES_PER_SECOND, options=options)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def frame_multiset(path: Path) -> tuple[tuple[bytes, int], ...]:
    """The decoded frames of a clip without their order: the frames available to a retriever with one frame."""
    import av

    with av.open(str(path)) as container:
        frames = Counter(frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0))
    return tuple(sorted(frames.items()))


def one_frame_ceiling(paths: Sequence[Path]) -> dict[str, Any]:
    """The best R@1 (percent) that retrieval from a single frame per clip can reach on average.

    Clips with the same frames in another order give a randomly chosen frame the same distribution, so whatever is
    computed from it ranks one clip of such a group first as often as any other: one hit per group at best.
    """
    groups = Counter(frame_multiset(path) for path in paths)
    return {"clips": len(paths), "groups": len(groups), "R@1": 100.0 * len(groups) / len(paths)}


def clip_id(split: str, pair: int, part: str) -> str:
    """The name of one clip of a pair; part is a (as drawn) or b (reversed)."""
    return f"{split}_{pair:03d}{part}"


def render_pair(folder: Path, recipe: Recipe, split: str, pair: int, scene: Scene) -> int:
    """Write the two clips of a pair where they are missing; returns how many were written."""
    paths = [folder / "videos" / f"{clip_id(split, pair, part)}.webm" for part in "ab"]
    if all(path.exists() for path in paths):
        return 0
    frames = render_clip_THWC(scene, random.Random(f"{split}:{pair}:{recipe.seed}"))
    for path, ordered in zip(paths, (frames, frames[::-1]), strict=True):
        write_atomically(path, encode_webm(ordered))
    return len(paths)


def pair_rows(split: str, pair: int, scene: Scene) -> list[dict[str, Any]]:
    """The two manifest lines of a pair."""
    rows = []
    for part, other, caption in zip("ab", "ba", scene.captions(), strict=True):
        name = clip_id(split, pair, part)
        rows.append(
            {
                "id": name,
                "path": f"videos/{name}.webm",
                "captions": [caption],
                "kind": "video",
                "split": split,
                "twin": clip_id(split, pair, other),
            }
        )
    return rows


def render_still(folder: Path, recipe: Recipe, index: int) -> dict[str, Any]:
    """Write one still picture where it is missing, JPEG and PNG in turn; returns its manifest line."""
    rng = random.Random(f"still:{index}:{recipe.seed}")
    thing = rng.choice(THINGS)
    place, (x, y) = rng.choice(list(STILL_PLACES.items()))
    spot = spot_of(
        thing,
        x=x + rng.uniform(-0.08, 0.08),
        y=y + rng.uniform(-0.08, 0.08),
        radius=RADIUS * rng.uniform(0.9, 1.1),
    )
    name, (suffix, format_name) = f"still_{index:03d}", (("jpg", "JPEG"), ("png", "PNG"))[index % 2]
    path = folder / "images" / f"{name}.{suffix}"
    if not path.exists():
        buffer = io.BytesIO()
        picture = Image.fromarray(paint_HWC([spot], background_HWC(STILL_PIXELS, rng)))
        picture.save(buffer, format_name, **({"quality": 92} if format_name == "JPEG" else {}))
        write_atomically(path, buffer.getvalue())
    caption = f"a {thing.words} {place}"
    return {"id": name, "path": f"images/{path.name}", "captions": [caption], "kind": "image", "split": "train"}


def start_folder(folder: Path, recipe: Recipe) -> None:
    """Clear a folder of another recipe and write down the recipe that its files will follow."""
    recipe_file = folder / "recipe.json"
    if recipe_file.exists() and json.loads(recipe_file.read_text(encoding="utf-8")) == asdict(recipe):
        return
    if not recipe_file.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"--folder: got {folder}, which contains other files; allowed: a new or empty folder, or an older set"
        )
    for name in ("videos", "images"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("train_videos.jsonl", "train_images.jsonl", "test.jsonl", "ceiling.json"):
        (folder / name).unlink(missing_ok=True)
    write_json(recipe_file, asdict(recipe))


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a manifest, unless it already says the same."""
    if read_json_lines(path) != list(rows):
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def render_set(folder: Path, recipe: Recipe, processes: int) -> int:
    """Render what is missing of a set, then write its manifests and ceiling.json; returns the clips written."""
    train, test = draw_scenes(recipe)
    start_folder(folder, recipe)
    jobs = [
        (split, pair, scene)
        for split, scenes in (("train", train), ("test", test))
        for pair, scene in enumerate(scenes)
    ]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        columns = list(zip(*jobs, strict=True))
        written = sum(pool.map(partial(render_pair, folder, recipe), *columns, chunksize=8))
    stills = [render_still(folder, recipe, index) for index in range(recipe.stills)]
    rows = {split: [row for job in jobs if job[0] == split for row in pair_rows(*job)] for split in ("train", "test")}
    write_manifest(folder / "train_videos.jsonl", rows["train"])
    write_manifest(folder / "train_images.jsonl", stills)
    write_manifest(folder / "test.jsonl", rows["test"])
    if written or not (folder / "ceiling.json").exists():
        write_json(folder / "ceiling.json", one_frame_ceiling([folder / row["path"] for row in rows["test"]]))
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data/demo"), help="output folder (data/demo)")
    parser.add_argument("--seed", type=int, default=recipe.seed, help="random seed of the set")
    parser.add_argument("--train-pairs", type=int, default=recipe.train_pairs, help="pairs of training clips")
    parser.add_argument("--test-pairs", type=int, default=recipe.test_pairs, help="pairs of held-out clips")
    parser.add_argument("--stills", type=int, default=recipe.stills, help="still pictures")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="rendering processes")
    options = parser.parse_args(arguments)
    try:
        wanted = Recipe(
            seed=options.seed, train_pairs=options.train_pairs, test_pairs=options.test_pairs, stills=options.stills
        )
        written = render_set(options.folder, wanted, options.processes)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("%s: wrote %d clips, the others exist already", options.folder, written)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
