"""Packing: what is kept of a clip, that a killed pack goes on, and that nothing is lost, doubled or overwritten."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from frozen_fast.cli import main
from frozen_fast.data.decode import ClipError, DecodeRequest, TestView
from frozen_fast.data.decode.geometry import view_steps
from frozen_fast.data.packing.extract import PackSettings, StoredFrames, extract, frames_to_store
from frozen_fast.data.packing.pack_shards import PackLimits, pack_source
from frozen_fast.data.packing.pool import map_clips
from frozen_fast.data.shards import layout
from frozen_fast.data.sources import Clip, PackedClips, Source
from frozen_fast.errors import UserError
from support import packing, videos
from support.datasets import write_manifest
from support.packing import FRAMES, SMALL, files_of, pack, source_of

CLIPS = 6


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packing.manifest(tmp_path_factory.mktemp("source"), CLIPS, split="train")


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pack that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "packed"
    pack(source_of(manifest), folder)
    files = files_of(folder)
    assert sum(name.endswith(".tar") for name in files) == 3, "the tests below want several shards"
    return files


@pytest.mark.parametrize("stored", [1, 4, 8, 12])
@pytest.mark.parametrize("available", [1, 3, 8, 9, 20, 250])
def test_a_draw_from_the_stored_frames_is_a_draw_from_the_clip_s_segments(stored: int, available: int) -> None:
    numbers = frames_to_store(available, stored)
    assert numbers == sorted(set(numbers)) and len(numbers) == min(stored, available)
    if available < stored:
        assert numbers == list(range(available))
        return
    for frames in (t for t in range(1, stored + 1) if stored % t == 0):
        per_segment = stored // frames
        for segment in range(frames):
            low, high = segment * available // frames, (segment + 1) * available // frames
            mine = numbers[segment * per_segment : (segment + 1) * per_segment]
            assert all(low <= number < high for number in mine)


VIDEOS = (videos.h264_with_b_frames, videos.vp9, videos.variable_rate, videos.rotated_phone_clip, videos.odd_size)
HARMS = ("tar_cut", "tar_longer", "journal_cut", "journal_noise", "tar_noise", "between_renames")
CHANGES = ({"frames_per_clip": 3}, {"short_side": 64}, {"quality": 80}, {"shard_bytes": 10**6})


@pytest.mark.parametrize("make", VIDEOS)
def test_stored_frames_are_the_video_s_frames(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    row = {"id": "a", "path": str(path), "captions": ["x"], "kind": "video"}
    source = source_of(write_manifest(tmp_path / "m.jsonl", [row]))
    packed = tmp_path / "packed"
    pack(source, packed, PackSettings(frames_per_clip=5, short_side=4096))
    stored = json.loads((packed / "shard-00000.jsonl").read_text())
    numbers = stored["frame_numbers"]
    assert numbers == frames_to_store(stored["original_frames"], 5)
    decoder, view = packing.decoder(), TestView(packing.RESOLUTION)
    address = source_of(packed).clips[0].path
    want, got = decoder.decode(
        [
            DecodeRequest(str(path), "video", tuple(numbers), view),
            DecodeRequest(address, "video", (0, 1, 2, 3, 4), view),
        ]
    )
    assert not isinstance(want, ClipError) and not isinstance(got, ClipError)
    assert packing.codes(got.frames_TCHW) == packing.codes(want.frames_TCHW) == numbers
    difference = (got.frames_TCHW.float() - want.frames_TCHW.float()).abs()
    assert difference.mean() < 4, "of 255: JPEG at quality 90, colours at half size"


def test_large_frames_are_shrunk_as_evaluation_would_and_small_ones_kept(tmp_path: Path) -> None:
    path = videos.odd_size(tmp_path)
    clip = Clip("a", str(path), ("x",))
    full = extract(clip, PackSettings(frames_per_clip=2, short_side=4096), 10**6)
    small = extract(clip, PackSettings(frames_per_clip=2, short_side=100), 10**6)
    assert isinstance(full, StoredFrames) and isinstance(small, StoredFrames)
    assert min(full.height, full.width) > 100
    assert (small.height, small.width) == view_steps(TestView(100), full.height, full.width).size
    assert sum(map(len, small.jpegs)) < sum(map(len, full.jpegs))


def test_the_clip_is_the_stretch_between_start_and_end(tmp_path: Path) -> None:
    path = videos.vp9(tmp_path)
    stored = extract(Clip("a", str(path), ("x",), start_seconds=0.2, end_seconds=0.52), SMALL, 10**6)
    assert isinstance(stored, StoredFrames)
    assert stored.original_frames == 8 and stored.numbers == [0, 2, 4, 6]
    assert stored.seconds == pytest.approx([0.0, 0.08, 0.16, 0.24])
    assert stored.frames_per_second == pytest.approx(4 / 0.32)
    row = {"id": "a", "path": str(path), "captions": ["x"], "kind": "video", "start_seconds": 0.2, "end_seconds": 0.52}
    pack(source_of(write_manifest(tmp_path / "m.jsonl", [row])), tmp_path / "packed")
    address = source_of(tmp_path / "packed").clips[0].path
    (got,) = packing.decoder().decode([DecodeRequest(address, "video", (0, 1, 2, 3), TestView(96))])
    assert not isinstance(got, ClipError) and packing.codes(got.frames_TCHW) == [5, 7, 9, 11]


def test_shards_are_plain_tars_named_by_number(manifest: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(whole["shard-00001.tar"])
    with tarfile.open(tmp_path / "shard.tar") as tar:
        names = tar.getnames()
        first = json.load(tar.extractfile(names[0]))  # type: ignore[arg-type]
    stem = names[0].removesuffix(".json")
    assert names[:5] == [f"{stem}.json", *(f"{stem}.{frame:03d}.jpg" for frame in range(4))]
    assert first["id"] == f"c{int(stem)}" and first["frame_numbers"] == [2, 7, 12, 17]
    assert all(len(whole[f"shard-0000{n}.tar"]) <= SMALL.shard_bytes for n in range(3))


@pytest.mark.parametrize("stop_after", range(1, CLIPS + 1))
def test_a_stopped_pack_goes_on(stop_after: int, manifest: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    def stop(done: int, total: int, bad: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_source(source_of(manifest), tmp_path / "packed", SMALL, PackLimits(), stop)
    with pytest.raises(UserError, match="packing is not finished"):
        source_of(tmp_path / "packed")
    seen: list[int] = []
    pack_source(source_of(manifest), tmp_path / "packed", SMALL, PackLimits(), lambda done, *_: seen.append(done))
    assert seen == list(range(stop_after + 1, CLIPS + 1)), "nothing is done twice"
    assert files_of(tmp_path / "packed") == whole


def stopped(manifest: Path, folder: Path, after: int) -> None:
    def stop(done: int, total: int, bad: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_source(source_of(manifest), folder, SMALL, PackLimits(), stop)


@pytest.mark.parametrize("harm", HARMS)
def test_a_power_cut_leaves_what_is_whole(harm: str, manifest: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    stopped(manifest, folder, 2 if harm == "between_renames" else 4)
    (tar,) = folder.glob("*.tar.part")
    (journal,) = folder.glob("*.jsonl.part")
    size = tar.stat().st_size
    assert size > 2000
    if harm == "tar_cut":
        os.truncate(tar, size - 100)
    elif harm == "tar_longer":
        tar.write_bytes(tar.read_bytes() + b"half a clip")
    elif harm == "journal_cut":
        os.truncate(journal, journal.stat().st_size - 5)
    elif harm == "journal_noise":
        journal.write_bytes(journal.read_bytes() + b"\x00" * 300 + b"\n")
    elif harm == "tar_noise":
        data = bytearray(tar.read_bytes())
        data[-1500:-1400] = bytes(100)
        tar.write_bytes(data)
    else:
        tar.write_bytes(tar.read_bytes() + layout.TAR_END)
        tar.replace(tar.with_suffix(""))
    pack(source_of(manifest), folder)
    assert files_of(folder) == whole


def test_a_killed_process_goes_on_and_leaves_no_processes(
    manifest: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    command = [
        sys.executable,
        "-m",
        "frozen_fast",
        "pack",
        "--manifest",
        str(manifest),
        "--output",
        str(folder),
        "--frames-per-clip",
        "4",
        "--shard-bytes",
        str(SMALL.shard_bytes),
        "--workers",
        "1",
    ]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size for path in folder.glob("*.jsonl.part")) and process.poll() is None:
            assert time.monotonic() < deadline, "no clip was packed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 60
    while session_members(process.pid):
        assert time.monotonic() < deadline, "the killed pack's processes live on"
        time.sleep(0.1)
    pack(source_of(manifest), folder)
    assert files_of(folder) == whole


def session_members(session: int) -> list[int]:
    """Living processes of a session (field 6 of /proc/PID/stat)."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            members.append(int(stat.parent.name))
    return members


def test_processes_give_the_same_bytes(manifest: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    pack(source_of(manifest), tmp_path / "packed", workers=2)
    assert files_of(tmp_path / "packed") == whole


def test_a_finished_pack_is_reused(
    manifest: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "packed"
    command = [
        "pack",
        "--manifest",
        str(manifest),
        "--output",
        str(folder),
        "--frames-per-clip",
        "4",
        "--shard-bytes",
        str(SMALL.shard_bytes),
        "--workers",
        "0",
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert f"packed: {CLIPS} clips, {4 * CLIPS} frames" in said.out
    assert f"{CLIPS} of {CLIPS} clips, 0 bad" in said.err and "left" in said.err
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != layout.LOCK}
    assert main(command) == 0
    assert "was packed before" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != layout.LOCK}
    assert before == after and files_of(folder) == whole


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_changed_settings_are_refused(change: dict, finished: bool, manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    pack(source_of(manifest, max_clips=1), folder) if finished else stopped(manifest, folder, 1)
    before = files_of(folder)
    source = source_of(manifest, max_clips=1) if finished else source_of(manifest)
    ((name, value),) = change.items()
    field = f"--{name.replace('_', '-')}: got {value}; allowed: {getattr(SMALL, name)}"
    with pytest.raises(UserError, match=f"^{field}, with which .* was started, or a new folder$"):
        pack(source, folder, PackSettings(**(SMALL.to_json() | change)))
    assert files_of(folder) == before


def test_another_source_or_a_folder_in_use_is_refused(manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    pack(source_of(manifest, max_clips=1), folder)
    with pytest.raises(UserError, match="^the source: got 2 clips, .*; allowed: 1 clips, "):
        pack(source_of(manifest, max_clips=2), folder)
    with pytest.raises(UserError, match="is packed already"):
        pack(source_of(folder), tmp_path / "again")
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds 'letter.txt'"):
        pack(source_of(manifest), other)
    with (folder / layout.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another pack is writing"):
            pack(source_of(manifest, max_clips=1), folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="allowed: a folder that can be written to"):
        pack(source_of(manifest), tmp_path / "file")


def test_a_damaged_finished_shard_is_refused(manifest: Path, tmp_path: Path) -> None:
    stopped(manifest, tmp_path / "a", 4)
    os.truncate(tmp_path / "a" / "shard-00000.tar", 700)
    with pytest.raises(UserError, match="shard-00000.tar: got 700 bytes"):
        pack(source_of(manifest), tmp_path / "a")
    stopped(manifest, tmp_path / "b", 4)
    (tmp_path / "b" / "shard-00000.tar").unlink()
    with pytest.raises(UserError, match="shard-00000.tar: got no file"):
        pack(source_of(manifest), tmp_path / "b")
    stopped(manifest, tmp_path / "c", 4)
    (tmp_path / "c" / "shard-00000.jsonl").write_text("no row\n")
    with pytest.raises(UserError, match=r"shard-00000.jsonl:1: damaged"):
        pack(source_of(manifest), tmp_path / "c")


def with_bad_clips(manifest: Path, folder: Path) -> Path:
    """The manifest with a cut, an empty and a text file among its clips."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["path"] = str(manifest.parent / row["path"])
    cut = videos.truncated(Path(rows[0]["path"]), folder / "cut.webm")
    (folder / "empty.webm").write_bytes(b"")
    (folder / "text.webm").write_text("no video " * 50)
    files = (cut, folder / "empty.webm", folder / "text.webm")
    bad = [{**rows[0], "id": path.stem, "path": str(path)} for path in files]
    bad[0]["twin"], rows[1]["twin"], rows[2]["twin"] = "c0", "cut", "c3"
    return write_manifest(folder / "m.jsonl", [rows[0], bad[0], *rows[1:4], bad[1], *rows[4:], bad[2]])


def test_bad_clips_are_counted_and_named(manifest: Path, tmp_path: Path) -> None:
    source = source_of(with_bad_clips(manifest, tmp_path))
    folder = tmp_path / "packed"

    def stop(done: int, total: int, bad: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_source(source, folder, SMALL, PackLimits(max_bad_share=0.5), stop)
    told: list[tuple[int, int, int]] = []
    summary = pack_source(source, folder, SMALL, PackLimits(max_bad_share=0.5), lambda *state: told.append(state))
    assert told[-1] == (9, 9, 3) and (summary.clips, summary.bad_clips, summary.frames) == (6, 3, 24)
    named = [json.loads(line) for line in (folder / "bad_clips.jsonl").read_text().splitlines()]
    assert [(row["step"], row["clip_id"], row["cause"]) for row in named] == [
        (2, "cut", "truncated"),
        (6, "empty", "empty"),
        (9, "text", "not_a_video"),
    ]
    assert all(row["source"] == "web" and row["replaced_by"] is None and row["message"] for row in named)
    packed = source_of(folder)
    assert packed.drops == {"could not be packed": 3}
    assert [clip.id for clip in packed.clips] == [f"c{n}" for n in range(CLIPS)]
    assert packed.clips[1].twin is None and packed.clips[2].twin == "c3", "a twin that was not packed is none"


def test_too_many_bad_clips_end_the_pack(manifest: Path, tmp_path: Path) -> None:
    source = source_of(with_bad_clips(manifest, tmp_path))
    with pytest.raises(UserError, match=r"max_bad_share: 3 of 9 clips are unreadable, 33.3 %"):
        pack(source, tmp_path / "packed")
    assert pack(source, tmp_path / "packed", max_bad_share=0.4).clips == 6, "a larger share goes on"
    only_bad = Source("bad", "manifest", PackedClips([source.clips[1]]))
    with pytest.raises(UserError, match="no clip could be packed"):
        pack(only_bad, tmp_path / "nothing", max_bad_share=1.0)


def test_a_decoder_that_crashes_or_hangs_costs_its_clip_only() -> None:
    clips = [Clip(f"c{n}", f"/x/{n}", ("x",)) for n in range(4)]
    outcomes = list(map_clips(packing.crash_on_odd, clips[:2], workers=1, timeout_seconds=120))
    assert [clip for clip, _ in outcomes] == clips[:2] and outcomes[0][1] == "c0"
    assert isinstance(outcomes[1][1], ClipError) and outcomes[1][1].cause == "decode_failed"
    outcomes = list(map_clips(packing.hang_on_two, clips[1:], workers=1, timeout_seconds=8))
    assert [outcome for _, outcome in outcomes[::2]] == ["c1", "c3"]
    assert isinstance(outcomes[1][1], ClipError) and outcomes[1][1].cause == "timeout"


def test_ids_never_become_paths(manifest: Path, tmp_path: Path) -> None:
    clip = next(manifest.parent.joinpath("clips").iterdir())
    ids = ["../../escaped", "/etc/passwd", "a/b#1", "shard-00000.tar#0", "ü 字\n", "..", "con", "x" * 5000]
    rows = [{"id": name, "path": str(clip), "captions": [name], "kind": "video"} for name in ids]
    folder = tmp_path / "deep" / "down" / "packed"
    pack(source_of(write_manifest(tmp_path / "m.jsonl", rows)), folder)
    assert [clip.id for clip in source_of(folder).clips] == ids
    assert {path.name for path in tmp_path.iterdir()} == {"m.jsonl", "deep"}
    assert all(
        name.startswith(("shard-0000", "clips.", "frames.", "index.", "pack.", "bad_", ".pack"))
        for name in files_of(folder)
    )


def test_captions_stay_as_they_were(manifest: Path, tmp_path: Path) -> None:
    captions = (" spaces around ", "", "a half of a pair: \ud83d", "two\nlines", "x" * 10_000)
    path = next(manifest.parent.joinpath("clips").iterdir())
    pack(Source("odd", "webvid", PackedClips([Clip("a", str(path), captions)])), tmp_path / "packed")
    assert source_of(tmp_path / "packed").clips[0].captions == captions


@pytest.mark.parametrize(
    ("name", "value"), [("frames_per_clip", 0), ("short_side", 8), ("quality", 101), ("shard_bytes", 0)]
)
def test_settings_have_limits(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: got {value}; allowed: "):
        PackSettings(**{name: value})


def test_the_command_line_names_mistakes(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "x.yaml"
    listed = f"[{{name: a, path: {manifest}}}, {{name: b, path: {manifest}, split: train, max_clips: 2}}]"
    config.write_text(f"data: {{sources: {listed}}}\nevaluation: {{sources: [{{name: a, path: {manifest}}}]}}\n")
    output = ["--output", str(tmp_path / "packed"), "--workers", "0"]

    def mistake(*arguments: str) -> str:
        assert main(["pack", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    assert "evaluation.sources[0] (a)" in mistake("--config", str(config), *output)
    assert "got 'a', which names 2 sources" in mistake("--config", str(config), "--source", "a", *output)
    assert "--source" in mistake("--manifest", str(manifest), "--source", "a", *output)
    assert "is not a file" in mistake("--manifest", str(tmp_path / "none.jsonl"), *output)
    assert "--quality" in mistake("--manifest", str(manifest), "--quality", "1", *output)
    assert "whole number" in mistake("--manifest", str(manifest), "--frames-per-clip", "-3", *output)
    assert "required" in mistake(*output)
    assert main(["pack", "--config", str(config), "--source", "b", *output, "data.sources[1].max_clips=1"]) == 0
    assert source_of(tmp_path / "packed", split="train").clips[0].id == "c0"
    np.testing.assert_array_equal(np.load(tmp_path / "packed" / "clips.npy")["original_frames"], [FRAMES])
