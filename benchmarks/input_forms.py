"""Input alone, clip by clip of the same content in several forms: VP9, H.264 and packed JPEG shards.

    python benchmarks/input_forms.py --output results/input_forms_cpu.json
    python benchmarks/input_forms.py --frames 1,4,8 --workers 4 --clips 64

Renders clips of smooth drifting texture under a little noise (456x256, 250 frames at 25 a second, a key frame every
125), encodes each as VP9 and as H.264 with B-frames, packs the H.264 ones (8 frames a clip), and times the training
loader on one form after the other: draw frames, read, decode, crop, resize, stack. With --resize device on a CPU a
batch ends where its copy to a GPU would begin, so that the resize is not part of it. No model; captions cost nothing.
Files are in the page cache, so disks are not measured. Clips per CPU second (all threads of the loader's process) tell
the cost where other work shares the machine; they are not told of --workers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from clips import write_manifest
from measure import pick_device, summarize, write_result
from PIL import Image

from frozen_fast.config.schema import AugmentationConfig, DecodeConfig, SourceConfig
from frozen_fast.data import Batch, DataPosition, Source, TrainingLoader, plan_steps, read_source
from frozen_fast.data.load.reading import build_decoder
from frozen_fast.data.packing.extract import PackSettings
from frozen_fast.data.packing.pack_shards import PackLimits, pack_source
from frozen_fast.errors import UserError

WIDTH, HEIGHT, FRAMES, RATE, KEY_FRAME_EVERY = 456, 256, 250, 25, 125
ENCODERS = {
    "vp9": ("libvpx-vp9", ".webm", {"deadline": "realtime", "cpu-used": "8", "g": str(KEY_FRAME_EVERY)}),
    "h264": ("libx264", ".mp4", {"preset": "veryfast", "crf": "23", "bf": "3", "g": str(KEY_FRAME_EVERY)}),
}
AUGMENTATION = AugmentationConfig()
RESOLUTION = 224
RESIZES = ("cpu", "device")


class HandOver:
    """Stands for the copy to a GPU: batches end where it would begin."""

    def sent(self, batches: Iterator[Batch], move: Callable[[Batch], Batch]) -> Iterator[tuple[Batch, None]]:
        """The batches as the loader made them."""
        for batch in batches:
            yield batch, None

    def received(self, batches: Iterator[tuple[Batch, None]]) -> Iterator[Batch]:
        """The same."""
        return (batch for batch, _ in batches)


def render(path: Path, seed: int, encoder: str, options: dict[str, str], frames: int) -> None:
    """Encode one clip: texture that moves a few pixels a frame under a little noise, as a camera has it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    down, right = (int(step) for step in rng.integers(1, 4, 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(frames):
            noise = rng.integers(-2, 3, texture.shape, dtype=np.int16)
            picture = np.clip(np.roll(texture, (down * index, right * index), axis=(0, 1)) + noise, 0, 255)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))


def sources(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Source], dict[str, int]]:
    """The same clips in every form, and the bytes of each form."""
    found: dict[str, Source] = {}
    size: dict[str, int] = {}
    for form, (encoder, suffix, settings) in ENCODERS.items():
        paths = [folder / f"{form}_{number:03d}{suffix}" for number in range(options.clips)]
        for number, path in enumerate(paths):
            render(path, number, encoder, settings, options.clip_frames)
        manifest = write_manifest(folder / f"{form}.jsonl", paths, repeats=1)
        found[form] = read_source(SourceConfig(name=form, path=str(manifest)))
        size[form] = sum(path.stat().st_size for path in paths)
    packed = pack_source(found["h264"], folder / "packed", PackSettings(), PackLimits())
    found["shards"] = read_source(SourceConfig(name="shards", format="shards", path=str(packed.folder)))
    size["shards"] = packed.bytes
    return found, size


def no_tokens(captions: list[str]) -> dict[str, torch.Tensor]:
    """Captions cost nothing here."""
    return {"input_ids": torch.zeros(len(captions), 1, dtype=torch.int64)}


def endless(loader: TrainingLoader, source: Source, frames: int, batch: int) -> Iterator[Batch]:
    """Batches of one source without end."""
    return loader.batches(
        plan_steps(
            {source.name: len(source)},
            {source.name: 1.0},
            "round_robin",
            0,
            batch_sizes={source.name: batch},
            frames=frames,
            num_steps=10**6,
            start=DataPosition(),
        )
    )


def rates(
    source: Source, frames: int, resize: str, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Clips a second over windows of about --window-seconds each, after warm-up."""
    later = resize == "device"
    decoder = partial(
        build_decoder,
        options.backend,
        device="cpu" if options.workers else device,
        resolution=RESOLUTION,
        threads=options.threads,
        max_pixels=10**7,
        crops_only=later,
    )
    ahead = 2 * max(1, options.workers)
    decode = DecodeConfig(threads=options.threads, workers=options.workers, prefetch_batches=ahead)
    loader = TrainingLoader(
        {source.name: source},
        decoder,
        no_tokens,
        augmentation=AUGMENTATION,
        decode=decode,
        device=device,
        resolution=RESOLUTION,
        transfer=HandOver() if later and device.type == "cpu" else None,
    )
    backends: set[str] = set()
    try:
        batches = endless(loader, source, frames, options.batch_size)
        for _ in range(2 + 2 * options.workers):
            batch = next(batches)
            backends |= set(batch.backends)
        moved = sum(tensor.nbytes for tensor in batch.tensors())
        began = time.perf_counter()
        for _ in range(2):
            next(batches)
        steps = max(2, round(options.window_seconds * 2 / (time.perf_counter() - began)))
        seconds = []
        cpu_began = time.process_time()
        for _ in range(options.windows):
            began = time.perf_counter()
            for _ in range(steps):
                next(batches)
            seconds.append((time.perf_counter() - began) / steps)
        cpu_seconds = time.process_time() - cpu_began
    finally:
        loader.close()
    timing = summarize(seconds, steps)
    clips = {name: options.batch_size / getattr(timing, name) for name in ("median", "p20", "p80")}
    return {
        "resize": resize,
        "bytes_per_clip": moved / options.batch_size,
        "backends": sorted(backends),
        "clips_per_second": clips["median"],
        "clips_per_second_p20": clips["p80"],  # slow windows have few clips a second
        "clips_per_second_p80": clips["p20"],
        "clips_per_cpu_second": None if options.workers else options.batch_size * steps * len(seconds) / cpu_seconds,
        "seconds_per_batch": asdict(timing),
    }


def tell(rows: list[dict[str, Any]]) -> None:
    """Print the forms of one number of frames, and how much faster shards (the last) are than each."""
    for row in rows:
        row["shards_are_faster_by"] = rows[-1]["clips_per_second"] / row["clips_per_second"]
        cpu = f"{row['clips_per_cpu_second']:8.1f} per CPU second" if row["clips_per_cpu_second"] else ""
        head = (
            f"{row['frames']} frames  {row['form']:7s} resize {row['resize']:6s} {row['bytes_per_clip'] / 1000:.0f} kB"
        )
        faster = f"(shards: {row['shards_are_faster_by']:.1f} x)"
        print(head, f"{row['clips_per_second']:8.1f} clips/s {cpu} {faster}  {', '.join(row['backends'])}", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", default="1,4", help="frames per clip, comma-separated (default 1,4)")
    parser.add_argument("--clips", type=int, default=16, help="rendered clips")
    parser.add_argument("--clip-frames", type=int, default=FRAMES)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="decoding threads")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0: a background thread")
    parser.add_argument("--resize", default="cpu,device", help="data.decode.resize: cpu, device, or both")
    parser.add_argument("--backend", default="auto", help="decoder of the videos")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--window-seconds", type=float, default=3.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    try:
        options.frames = [int(text) for text in options.frames.split(",")]
    except ValueError:
        parser.error(f"--frames: got {options.frames!r}; allowed: whole numbers, comma-separated")
    options.resize = options.resize.split(",")
    for one in options.resize:
        if one not in RESIZES:
            parser.error(f"--resize: got {one!r}; allowed: {', '.join(RESIZES)}, comma-separated")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 2 for a mistake in the arguments."""
    options = parse(arguments)
    torch.set_num_threads(1)
    device = pick_device(options.device)
    rows = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found, size = sources(Path(scratch), options)
            for frames in options.frames:
                for resize in options.resize:
                    for form, source in found.items():
                        rows.append({"frames": frames, "form": form, **rates(source, frames, resize, options, device)})
                    tell(rows[-len(found) :])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    result = {
        "bytes_per_clip": {form: total / options.clips for form, total in size.items()},
        "stored_frames_per_clip": PackSettings().frames_per_clip,
        "rows": rows,
    }
    if options.output is not None:
        write_result(options.output, device, vars(options), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
