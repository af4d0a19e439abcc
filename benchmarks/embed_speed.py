"""Clips embedded per second: this library through files and packed shards, beside a plain loop of the released code.

    python benchmarks/embed_speed.py --output results/embed_speed_cpu.json
    python benchmarks/embed_speed.py --clips 256 --batch-size 32 --workers 12 --device cuda

One run on the same rendered clips (VP9, 456x256, 250 frames) with the same random weights, one window of T frames a
clip. `released` is a PyTorch DataLoader that seeks to each frame with OpenCV, resizes, crops and normalises it with
torchvision, and benchmarks/released_tower.py in fp32. `files` and `shards` are what `frozen-fast embed` runs, in fp32
and, where the device computes it in hardware, in bf16; shards hold the same T frames as JPEGs. Each takes its turn in
every round, after one batch that is not timed. Rows also state how close the vectors are to those of `released`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clips import render_clip
from measure import pick_device, synchronize, write_result
from released_tower import ReleasedTower
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from frozen_fast.config.schema import DecodeConfig, SourceConfig
from frozen_fast.data import Clip, read_source
from frozen_fast.data.packing.extract import PackSettings
from frozen_fast.data.packing.pack_shards import PackLimits, pack_source
from frozen_fast.data.plan.frame_sampling import test_windows
from frozen_fast.errors import UserError
from frozen_fast.models import VIDEO_SIZES, DualEncoder, SpaceTimeTransformer, TransformersTower
from frozen_fast.models.text.transformers_tower import KNOWN_ARCHITECTURES, model_from_config
from frozen_fast.parallel.precision import bf16_hardware
from frozen_fast.search.checkpoint_settings import EmbedSettings
from frozen_fast.search.embed import clip_source, clip_vectors, loader_for

RESIZE = 256
Embed = Callable[[Sequence[int]], Tensor]
"""Numbers of clips -> their vectors [V, D] of L2 norm 1, on the CPU."""


class ReleasedClips(Dataset[Tensor]):
    """Frames of clips by OpenCV: a seek for each frame."""

    def __init__(self, paths: Sequence[Path], frames: int, model: DualEncoder) -> None:
        self.paths, self.frames = paths, frames
        side = model.resolution
        self.transform = v2.Compose(
            [v2.Resize(RESIZE), v2.CenterCrop(RESIZE), v2.Resize(side), v2.Normalize(model.mean, model.std)]
        )

    def __len__(self) -> int:
        """Clips."""
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        """[T, 3, R, R], normalised."""
        import cv2

        capture = cv2.VideoCapture(str(self.paths[number]))
        try:
            (wanted,) = test_windows(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), self.frames, stride_frames=0)
            pictures = []
            for index in wanted:
                capture.set(cv2.CAP_PROP_POS_FRAMES, index)
                found, picture = capture.read()
                if not found:
                    raise RuntimeError(f"OpenCV reads no frame {index} of {self.paths[number].name}")
                pictures.append(torch.from_numpy(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).permute(2, 0, 1))
        finally:
            capture.release()
        return self.transform(torch.stack(pictures).float() / 255)


@torch.no_grad()
def released_vectors(
    numbers: Sequence[int], *, clips: ReleasedClips, tower: ReleasedTower, model: DualEncoder, batch: int, workers: int
) -> Tensor:
    """The plain loop."""
    chosen = torch.utils.data.Subset(clips, list(numbers))
    loader = DataLoader(chosen, batch, num_workers=workers, pin_memory=model.device.type == "cuda")
    rows = [F.normalize(model.vid_proj(tower(video.to(model.device))), dim=-1).cpu() for video in loader]
    return torch.cat(rows)


def our_vectors(
    numbers: Sequence[int],
    *,
    clips: Sequence[Clip],
    model: DualEncoder,
    settings: EmbedSettings,
    batch: int,
    workers: int,
    bf16: bool,
) -> Tensor:
    """What `frozen-fast embed` runs on each process."""
    decode = DecodeConfig(backend="auto", workers=workers)
    loader = loader_for(model, clip_source([clips[number] for number in numbers]), settings, decode, batch)
    half = partial(torch.autocast, model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext
    rows = torch.empty(len(numbers), model.vector_width)
    for index, row_D in clip_vectors(model, loader, half):
        rows[index] = row_D
    return rows


def contenders(folder: Path, options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Embed]]:
    """Render and pack the clips, build the models, and give each way to embed them by name."""
    size = VIDEO_SIZES[options.size]
    torch.manual_seed(0)
    tower = SpaceTimeTransformer(size, options.frames, time_init="random")
    text = TransformersTower(model_from_config(KNOWN_ARCHITECTURES["distilbert-base-uncased"]()), None, "auto")
    model = DualEncoder(tower, text).to(device).eval()
    released = ReleasedTower(size, options.frames)
    released.load_state_dict(tower.state_dict())
    paths = render(folder / "clips", options.clips, small=options.small)
    same: dict[str, Any] = {"model": model, "batch": options.batch_size, "workers": options.workers}
    plain = ReleasedClips(paths, options.frames, model)
    yield "released fp32", partial(released_vectors, clips=plain, tower=released.to(device).eval(), **same)
    source = clip_source([Clip(path.stem, str(path), ("drifting texture",), "video") for path in paths])
    packing = PackLimits(workers=0 if options.small else 2)
    packed = pack_source(source, folder / "packed", PackSettings(frames_per_clip=options.frames), packing).folder
    shards = read_source(SourceConfig(path=str(packed), format="shards")).clips
    settings = EmbedSettings(frames=options.frames, stride_seconds=0.0, max_windows=0, resize=RESIZE)
    for name, clips in (("files", source.clips), ("shards", shards)):
        for precision in ("fp32", "bf16") if bf16_hardware(device) else ("fp32",):
            bf16 = precision == "bf16"
            yield f"{name} {precision}", partial(our_vectors, clips=clips, settings=settings, bf16=bf16, **same)


def render(folder: Path, count: int, *, small: bool) -> list[Path]:
    """Clips of drifting texture."""
    folder.mkdir(parents=True)
    width, height, frames = (64, 64, 24) if small else (456, 256, 250)
    paths = [folder / f"clip_{number:03d}.webm" for number in range(count)]
    draw = partial(render_clip, width=width, height=height, frames=frames)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(draw, paths, range(count)))
    return paths


def measure(ways: dict[str, Embed], options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each way: clips per second of every round, and how close its vectors are to the first's."""
    every, first = range(options.clips), range(min(options.batch_size, options.clips))
    vectors: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for embed in ways.values():
        embed(first)
    for _ in range(options.rounds):
        for name, embed in ways.items():
            synchronize(device)
            begin = time.perf_counter()
            vectors[name] = embed(every)
            seconds[name].append(time.perf_counter() - begin)
    baseline = next(iter(ways))
    return [
        {
            "way": name,
            "clips_per_second": options.clips / statistics.median(took),
            "seconds": took,
            "times_released": statistics.median(seconds[baseline]) / statistics.median(took),
            "least_cosine_to_released": float((vectors[name] * vectors[baseline]).sum(1).min()),
        }
        for name, took in seconds.items()
    ]


def main() -> int:
    """Measure and write a result file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12, help="rendered clips (default 12)")
    parser.add_argument("--frames", type=int, default=4, help="frames per clip (default 4)")
    parser.add_argument("--size", default="base_patch16_224", help="of the video tower (default base_patch16_224)")
    parser.add_argument("--batch-size", type=int, default=4, help="clips per forward pass (default 4)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of every way (default 0)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each way (default 1)")
    parser.add_argument("--small", action="store_true", help="render clips of 64x64 pixels and 24 frames")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--output", type=Path, default=Path("embed_speed.json"), help="result file")
    options = parser.parse_args()
    if options.size not in VIDEO_SIZES or min(options.clips, options.frames, options.batch_size, options.rounds) < 1:
        mistake = UserError(f"--size, counts: got {vars(options)}; allowed: {', '.join(VIDEO_SIZES)}; from 1")
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    device = pick_device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(dict(contenders(Path(scratch), options, device)), options, device)
    write_result(options.output, device, vars(options), {"rows": rows})
    for row in rows:
        print(f"{row['way']:>14}: {row['clips_per_second']:7.2f} clips/s, {row['times_released']:.2f} x released")
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
