"""Miniature data sets in the layouts that users have on disk, and manifests.

Files are filled by a callback, so that a test that never decodes pays for nothing: `write_clip(path, number)`.
"""

from __future__ import annotations

import csv
import json
import pickle
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WriteClip = Callable[[Path, int], None]


def write_placeholder(path: Path, number: int) -> None:
    """A file that is there and is no clip."""
    path.write_bytes(f"placeholder {number}".encode())


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """A comma-separated table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_manifest(path: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    """A manifest; a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def manifest_folder(
    folder: Path,
    count: int,
    *,
    kind: str = "video",
    suffix: str = ".webm",
    write_clip: WriteClip = write_placeholder,
    **fields: Any,
) -> Path:
    """A manifest of `count` clips c0, c1, .. with their files; `fields` go into every line."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        path = folder / "clips" / f"c{number}{suffix}"
        write_clip(path, number)
        row = {"id": f"c{number}", "path": f"clips/{path.name}", "captions": [f"clip number {number}"], "kind": kind}
        rows.append(row | fields)
    return write_manifest(folder / "manifest.jsonl", rows)


def write_webvid(
    root: Path, count: int, *, cut: str = "2M", split: str = "train", write_clip: WriteClip = write_placeholder
) -> list[str]:
    """WebVid with `count` clips in two page folders; returns their ids."""
    rows = []
    for number in range(count):
        page, identity = f"{number % 2:06d}_{number % 2:06d}", str(1000 + number)
        folder = root / "videos" / page
        folder.mkdir(parents=True, exist_ok=True)
        write_clip(folder / f"{identity}.mp4", number)
        rows.append([identity, f"address/{identity}", "PT00H00M10S", page, f"stock clip, number {number}"])
    header = ["videoid", "contentUrl", "duration", "page_dir", "name"]
    write_table(root / "metadata" / f"results_{cut}_{split}.csv", header, rows)
    return [row[0] for row in rows]


def write_cc3m(root: Path, count: int, *, split: str = "train", write_clip: WriteClip = write_placeholder) -> list[str]:
    """CC3M with `count` pictures; returns their ids."""
    table, folder = {
        "train": ("Train_GCC-training-success-020321-VALIDIMG.csv", "training"),
        "val": ("Validation_GCC-1.1.0-Validation-success-020321-VALIDIMG.csv", "validation"),
    }[split]
    (root / folder).mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        address = f"pictures/{split}/{number}.jpg"
        rows.append([address, f"a picture, number {number}"])
        write_clip(root / folder / str(zlib.crc32(address.encode())), number)
    write_table(root / table, ["thumbnailUrl", "caption"], rows)
    return [str(zlib.crc32(row[0].encode())) for row in rows]


def write_msrvtt(root: Path, count: int, *, write_clip: WriteClip = write_placeholder, captions: int = 3) -> list[str]:
    """MSR-VTT as the released code reads it: the first half trains, the second half is tested (full: val and test)."""
    ids = [f"video{number}" for number in range(count)]
    (root / "videos" / "all").mkdir(parents=True, exist_ok=True)
    for number, identity in enumerate(ids):
        write_clip(root / "videos" / "all" / f"{identity}.mp4", number)
    annotations = [
        {"image_id": identity, "caption": f"{identity} caption {index}"}
        for index in range(captions)
        for identity in ids
    ]
    annotation = root / "annotation" / "MSR_VTT.json"
    annotation.parent.mkdir(parents=True, exist_ok=True)
    annotation.write_text(json.dumps({"annotations": annotations, "images": [{"id": identity} for identity in ids]}))
    lists = root / "high-quality" / "structured-symlinks"
    lists.mkdir(parents=True, exist_ok=True)
    half, quarter = count // 2, 3 * count // 4
    for name, chosen in {
        "train_list_jsfusion": ids[:half],
        "val_list_jsfusion": ids[half:],
        "train_list_miech": ids[:half],
        "test_list_miech": ids[half:],
        "train_list_full": ids[:half],
        "val_list_full": ids[half:quarter],
        "test_list_full": ids[quarter:],
    }.items():
        (lists / f"{name}.txt").write_text("\n".join(chosen) + "\n")
    indices = {identity: number % captions for number, identity in enumerate(ids)}
    (lists / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps(indices))
    return ids


def write_msrvtt_clip4clip(root: Path, count: int, *, write_clip: WriteClip = write_placeholder) -> list[str]:
    """MSR-VTT in CLIP4Clip's form: the first half trains, the second half is tested."""
    ids = [f"video{number}" for number in range(count)]
    (root / "MSRVTT_Videos").mkdir(parents=True, exist_ok=True)
    for number, identity in enumerate(ids):
        write_clip(root / "MSRVTT_Videos" / f"{identity}.mp4", number)
    half = count // 2
    folder = root / "msrvtt_data"
    write_table(folder / "MSRVTT_train.9k.csv", ["video_id"], [[identity] for identity in ids[:half]])
    write_table(folder / "MSRVTT_train.7k.csv", ["video_id"], [[identity] for identity in ids[: half - 1]])
    write_table(
        folder / "MSRVTT_JSFUSION_test.csv",
        ["key", "vid_key", "video_id", "sentence"],
        [[f"ret{identity}", f"msr{identity}", identity, f"the sentence of {identity}"] for identity in ids[half:]],
    )
    splits = ["train"] * half + ["validate"] + ["test"] * (count - half - 1)
    data = {
        "videos": [{"video_id": identity, "split": split} for identity, split in zip(ids, splits, strict=True)],
        "sentences": [{"video_id": name, "caption": f"{name} caption {n}"} for name in ids for n in range(2)],
    }
    (folder / "MSRVTT_data.json").write_text(json.dumps(data))
    return ids
