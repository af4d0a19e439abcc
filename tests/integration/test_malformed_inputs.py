"""Two hundred malformed inputs: each is read, is a mistake in one line, or is a bad clip, and does nothing else.

The inputs are drawn by Hypothesis from a fixed seed (derandomize).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frozen_fast import load_video
from frozen_fast.config import config_from_mapping, load_config
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.decode import ClipError, Decoded, DecodeRequest, TestView
from frozen_fast.data.load.feature_loader import read_caption_masks
from frozen_fast.data.load.reading import probe
from frozen_fast.data.packing.extract import PackSettings
from frozen_fast.data.shards import shard_index
from frozen_fast.data.sources import read_source
from frozen_fast.errors import UserError
from frozen_fast.models.load_model import load_model
from frozen_fast.records.checkpoint import read_tensors, verify
from frozen_fast.training.parts import build_model
from support import packing, videos
from support.damage import damaged_bytes, damaged_json, damaged_pickle, damaged_text
from support.datasets import write_msrvtt
from support.released import ReleasedModel, write_released_checkpoint
from support.runs import REPOSITORY, make_data, tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EXAMPLES = 20
LIMIT_SECONDS = 60
from_a_seed = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs are in here; a file beside it was written by one of them."""
    inside = tmp_path_factory.mktemp("malformed") / "inside"
    inside.mkdir()
    return inside


@pytest.fixture(scope="module")
def canary(folder: Path) -> Path:
    """A file that exists where an input has run a command."""
    return folder.parent / "canary"


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise where an input is read for longer than LIMIT_SECONDS."""

    def hung(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still reading after {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def assert_harmless(read: Callable[[], object], folder: Path) -> None:
    """The input is read, refused in one line, or a bad clip; nothing is written beside its folder."""
    with time_limit():
        try:
            read()
        except UserError as error:
            lines = error.args if len(error.args) > 1 else (str(error),)
            assert all(line and "\n" not in str(line) for line in lines), str(error)
        except ClipError as error:
            assert "\n" not in str(error) and error.cause
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    """A model's folder without checksums, as one from before them or from elsewhere."""
    data = make_data(folder / "data", videos=4, pictures=1)
    build_model(tiny_config(data, folder / "run"), torch.device("cpu")).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@given(data=st.data())
@from_a_seed
def test_model_folders(checkpoint: Path, folder: Path, data: st.DataObject) -> None:
    """Weights, architecture and tokenizer."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    path = data.draw(st.sampled_from(sorted(path for path in copy.rglob("*") if path.is_file())))
    strategy = damaged_bytes(path.read_bytes())
    if path.suffix == ".json":
        strategy = st.one_of(strategy, damaged_json(json.loads(path.read_text(encoding="utf-8"))))
    path.write_bytes(data.draw(strategy))
    assert_harmless(lambda: load_model(copy), folder)


@pytest.fixture(scope="module")
def training_state(checkpoint: Path) -> bytes:
    path = checkpoint.parent / "state.pt"
    torch.save({"format": 2, "optimizer": {"weight": {"exp_avg": torch.zeros(3, 2), "step": torch.tensor(1.0)}}}, path)
    return path.read_bytes()


@given(data=st.data())
@from_a_seed
def test_training_states(
    checkpoint: Path, training_state: bytes, folder: Path, canary: Path, data: st.DataObject
) -> None:
    """training_state.pt and state.json of a checkpoint."""
    copy = folder / "resumed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    state = {"format": 1, "step": 3, "stage": 0, "position": {}, "meter": {}, "config": {}, "sources": {}}
    hostile = damaged_pickle({"format": 2, "optimizer": {}}, canary)
    (copy / "training_state.pt").write_bytes(data.draw(st.one_of(damaged_bytes(training_state), hostile)))
    (copy / "state.json").write_bytes(data.draw(damaged_json(state)))
    assert_harmless(lambda: read_tensors(copy), folder)
    assert_harmless(lambda: verify(copy), folder)


@pytest.fixture(scope="module")
def released(folder: Path) -> bytes:
    return write_released_checkpoint(folder / "released.pth.tar", ReleasedModel(text="distilbert").eval()).read_bytes()


@given(data=st.data())
@from_a_seed
def test_released_checkpoints(released: bytes, folder: Path, canary: Path, data: st.DataObject) -> None:
    path = folder / "damaged.pth.tar"
    path.write_bytes(data.draw(st.one_of(damaged_bytes(released), damaged_pickle({"state_dict": {}}, canary))))
    assert_harmless(lambda: load_model(path, kind="frozen"), folder)


DEMO = (REPOSITORY / "configs" / "demo.yaml").read_text(encoding="utf-8")


@given(data=st.data())
@from_a_seed
def test_configs(folder: Path, canary: Path, data: st.DataObject) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data.draw(damaged_text(DEMO, canary)))
    assert_harmless(lambda: load_config(path), folder)


@given(data=st.data())
@from_a_seed
def test_overrides(folder: Path, canary: Path, data: st.DataObject) -> None:
    valid = data.draw(st.sampled_from(("name=x", "data.sources[0].path=x", "curriculum.stages[1].frames=4", "loss={}")))
    override = data.draw(st.one_of(damaged_text(valid, canary), st.text().map(str.encode)))
    assert_harmless(lambda: config_from_mapping({}, [override.decode("utf-8", "replace")]), folder)


@pytest.fixture(scope="module")
def clips(folder: Path) -> Path:
    return packing.manifest(folder / "clips", 3)


@given(data=st.data())
@from_a_seed
def test_manifests(clips: Path, folder: Path, canary: Path, data: st.DataObject) -> None:
    """The manifest, and its clips as far as they can be found."""
    lines = clips.read_text(encoding="utf-8").splitlines()
    line = data.draw(damaged_json({**json.loads(lines[0]), "start_seconds": 0.1, "end_seconds": 0.5, "split": "x"}))
    whole = data.draw(damaged_text("\n".join(lines) + "\n", canary))
    damaged = clips.with_name("damaged.jsonl")
    damaged.write_bytes(data.draw(st.sampled_from((line + b"\n" + "\n".join(lines[1:]).encode(), whole))))

    def read() -> None:
        for clip in read_source(SourceConfig(name="web", format="manifest", path=str(damaged))).clips:
            with contextlib.suppress(ClipError):
                info = probe(clip.path, clip.kind, max_pixels=10**6)
                info.frame_range(clip.start_seconds, clip.end_seconds)

    assert_harmless(read, folder)


@pytest.fixture(scope="module")
def msrvtt(folder: Path) -> Path:
    write_msrvtt(folder / "msrvtt", 8)
    return folder / "msrvtt"


@given(data=st.data())
@from_a_seed
def test_annotations(msrvtt: Path, folder: Path, canary: Path, data: st.DataObject) -> None:
    """Pickled caption numbers, JSON captions, caption masks."""
    indices = msrvtt / "high-quality" / "structured-symlinks" / "jsfusion_val_caption_idx.pkl"
    captions = msrvtt / "annotation" / "MSR_VTT.json"
    good = indices.read_bytes(), captions.read_bytes()
    masks = folder / "masks.pkl"
    masks.write_bytes(data.draw(damaged_pickle({"video0": [1, 0]}, canary)))
    indices.write_bytes(data.draw(damaged_pickle({f"video{number}": number % 3 for number in range(8)}, canary)))
    read = SourceConfig(name="m", format="msrvtt", path=str(msrvtt), split="test", split_counts="off")
    try:
        assert_harmless(lambda: read_source(read), folder)
        indices.write_bytes(good[0])
        captions.write_bytes(data.draw(damaged_json(json.loads(good[1]))))
        assert_harmless(lambda: read_source(read), folder)
    finally:
        indices.write_bytes(good[0])
        captions.write_bytes(good[1])
    assert_harmless(lambda: read_caption_masks(masks), folder)


@pytest.fixture(scope="module")
def packed(clips: Path, folder: Path) -> Path:
    packing.pack(packing.source_of(clips), folder / "packed", PackSettings(frames_per_clip=2, shard_bytes=12_000))
    return folder / "packed"


@given(data=st.data())
@from_a_seed
def test_shards(packed: Path, folder: Path, data: st.DataObject) -> None:
    """Index, tables and tars of packed frames."""
    copy = folder / "packed_copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(packed, copy)
    path = data.draw(st.sampled_from(sorted(path for path in copy.iterdir() if path.is_file() and path.stat().st_size)))
    strategy = damaged_bytes(path.read_bytes())
    if path.suffix == ".json":
        strategy = st.one_of(strategy, damaged_json(json.loads(path.read_text(encoding="utf-8"))))
    path.write_bytes(data.draw(strategy))
    shard_index._open.clear()

    def read() -> None:
        source = packing.source_of(copy)
        requests = [DecodeRequest(clip.path, "video", (0, 1), TestView(96)) for clip in source.clips]
        outcomes = packing.decoder().decode(requests)
        assert all(isinstance(outcome, (Decoded, ClipError)) for outcome in outcomes)

    assert_harmless(read, folder)


@pytest.fixture(scope="module")
def media(folder: Path) -> list[Path]:
    (folder / "media").mkdir()
    makers = (videos.vp9, videos.mjpeg, videos.h264_with_b_frames, videos.mpeg4_avi)
    pictures = [videos.picture(folder / "media", f"picture.{suffix}") for suffix in ("png", "jpg", "webp", "gif")]
    return [*(make(folder / "media") for make in makers), *pictures]


@given(data=st.data())
@from_a_seed
def test_videos(media: list[Path], folder: Path, data: st.DataObject) -> None:
    """Through load_video, and through the decoder of training."""
    whole = data.draw(st.sampled_from(media[:4]))
    path = folder / f"damaged{whole.suffix}"
    path.write_bytes(data.draw(damaged_bytes(whole.read_bytes())))
    assert_harmless(lambda: load_video(path, frames=3), folder)

    def decode() -> None:
        info = probe(path, "video", max_pixels=10**6)
        request = DecodeRequest(str(path), "video", (0, info.num_frames - 1), TestView(96))
        (outcome,) = packing.decoder("auto").decode([request])
        assert isinstance(outcome, (Decoded, ClipError))

    assert_harmless(decode, folder)


@given(data=st.data())
@from_a_seed
def test_pictures(media: list[Path], folder: Path, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(media[4:]))
    path = folder / f"damaged{whole.suffix}"
    path.write_bytes(data.draw(damaged_bytes(whole.read_bytes())))
    assert_harmless(lambda: load_video(path), folder)
