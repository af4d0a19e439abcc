"""Tiny synthetic folders in the published form of every layout of config.extensions.layouts.

`write_clip(path, number)` fills a file, so that a test that never decodes pays for nothing. Every writer takes
(root, clips per split, write_clip) and returns split -> ids in order.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from support.datasets import (
    WriteClip,
    write_cc3m,
    write_msrvtt,
    write_msrvtt_clip4clip,
    write_placeholder,
    write_table,
    write_webvid,
)

Ids = dict[str, list[str]]
Writer = Callable[..., Ids]


def fill(paths: Iterable[Path], write_clip: WriteClip) -> None:
    """Write a clip to every path."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, number)


def write_json(path: Path, value: Any) -> Path:
    """A JSON file with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """A text file with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def numbered(prefix: str, splits: Iterable[str], count: int) -> Ids:
    """split -> ids, all different."""
    return {
        split: [f"{prefix}{place * count + number}" for number in range(count)] for place, split in enumerate(splits)
    }


def with_suffix(ids: Ids, suffix: str) -> Ids:
    """The ids as file names."""
    return {split: [f"{name}{suffix}" for name in own] for split, own in ids.items()}


def all_ids(ids: Ids) -> list[str]:
    """The ids of all splits."""
    return [name for own in ids.values() for name in own]


def _lists(folder: Path, ids: Ids) -> None:
    for split, own in ids.items():
        write_lines(folder / f"{split}_list.txt", own)


def write_msvd(root: Path, count: int, write_clip: WriteClip = write_placeholder, *, clip4clip: bool = False) -> Ids:
    """MSVD: Collaborative Experts' folders, or CLIP4Clip's; three captions a video."""
    ids = numbered("vid", ("train", "val", "test"), count)
    lists = root / ("msvd_data" if clip4clip else "structured-symlinks")
    _lists(lists, ids)
    captions = {name: [["caption", str(index), "of", name] for index in range(3)] for name in all_ids(ids)}
    (lists / "raw-captions.pkl").write_bytes(pickle.dumps(captions))
    videos = root / ("MSVD_Videos" if clip4clip else "videos")
    fill((videos / f"{name}{'.mp4' if clip4clip else '.avi'}" for name in all_ids(ids)), write_clip)
    return ids


def write_msvd_clip4clip(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """MSVD in CLIP4Clip's folders."""
    return write_msvd(root, count, write_clip, clip4clip=True)


def write_didemo(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """DiDeMo: lists with file names; two descriptions a video, one of piece 0, one of piece 2."""
    ids = with_suffix(numbered("4", ("train", "val", "test"), count), "@N00.mov")
    _lists(root, ids)
    marked = {"start": [[0, 0], [0, 0], [0, 1], [0, 0]], "later": [[2, 2], [2, 3], [2, 2], [1, 2]]}
    for split, own in ids.items():
        rows = [
            {"video": video, "description": f"{word} of {video}", "times": times, "annotation_id": 1}
            for video in own
            for word, times in marked.items()
        ]
        write_json(root / f"{split}_data.json", rows)
    fill((root / "videos" / name for name in all_ids(ids)), write_clip)
    return ids


def write_lsmdc(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """LSMDC as the released code reads it: one caption a clip, two movies."""
    ids = numbered("1004_Juno_00.", ("train", "val", "test"), count)
    lists = root / "structured-symlinks"
    _lists(lists, ids)
    names = all_ids(ids)
    (lists / "raw-captions.pkl").write_bytes(pickle.dumps({name: [["someone", "opens", name]] for name in names}))
    movies = {name: f"movie{number % 2}" for number, name in enumerate(names)}
    write_lines(root / "frame_tar_list.txt", [f"frames/{movies[name]}/{name}.tar" for name in names])
    fill((root / "videos" / movies[name] / f"{name}.avi" for name in names), write_clip)
    return ids


def write_lsmdc_clip4clip(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """LSMDC's challenge tables; the first clip of train has two sentences."""
    ids = numbered("1004_Juno_00.", ("train", "val", "test"), count)
    tables = {
        "train": "LSMDC16_annos_training.csv",
        "val": "LSMDC16_annos_val.csv",
        "test": "LSMDC16_challenge_1000_publictect.csv",
    }
    for split, own in ids.items():
        rows = [f"{name}\t00.01\t00.02\t00.01\t00.02\tSOMEONE opens {name}." for name in own]
        if split == "train":
            rows.append(rows[0].replace("opens", "closes"))
        write_lines(root / tables[split], rows)
    fill((root / "LSMDC_Videos" / name[:9] / f"{name}.mp4" for name in all_ids(ids)), write_clip)
    return ids


def write_activitynet(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """ActivityNet Captions: three sentences a video, files without the ids' v_."""
    ids = numbered("v_act", ("train", "val"), count)
    for split, captions in (("train", "train.json"), ("val", "val_1.json")):
        write_json(root / f"{split}_ids.json", ids[split])
        sentences = [f" Sentence {index}." for index in range(3)]
        stamps = [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
        entries = {name: {"duration": 3.0, "timestamps": stamps, "sentences": sentences} for name in ids[split]}
        write_json(root / captions, entries)
    fill((root / "Activity_Videos" / f"{name[2:]}.mp4" for name in all_ids(ids)), write_clip)
    return ids


def write_vatex(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """VATEX: ten English captions a clip; the two test lists overlap by half."""
    ids = numbered("abc_000", ("train", "val", "test", "test1k5"), count)
    half = count // 2
    ids["test1k5"] = ids["test"][:half] + ids["test1k5"][half:]
    for split, own in ids.items():
        write_lines(root / f"{'test1k5_sec' if split == 'test1k5' else split}_list.txt", own)
    names = sorted(set(all_ids(ids)))
    captions = {name: {"enCap": [f"English {index} of {name}" for index in range(10)]} for name in names}
    write_json(root / "vatex_data.json", captions)
    fill((root / "videos" / f"{name}.mp4" for name in names), write_clip)
    return ids


def _karpathy_image(name: str, split: str, **fields: Any) -> dict[str, Any]:
    sentences = [{"tokens": ["a"], "raw": f"Sentence {index} of {name}", "sentid": index} for index in range(5)]
    return {"filename": name, "split": split, "sentences": sentences, "imgid": 0, **fields}


def write_flickr30k(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """Flickr30K with Karpathy's splits."""
    ids = with_suffix(numbered("10", ("train", "val", "test"), count), ".jpg")
    images = [_karpathy_image(name, split) for split, own in ids.items() for name in own]
    write_json(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    fill((root / "flickr30k-images" / name for name in all_ids(ids)), write_clip)
    return ids


def write_coco(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """COCO with Karpathy's splits; the second half of train is restval."""
    ids = {
        split: [f"COCO_val2014_{int(name):012d}.jpg" for name in own]
        for split, own in numbered("1", ("train", "val", "test"), count).items()
    }
    images = []
    for split, own in ids.items():
        for number, name in enumerate(own):
            restval = split == "train" and number >= count // 2
            images.append(_karpathy_image(name, "restval" if restval else split, filepath="val2014", cocoid=number))
    write_json(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    fill((root / "val2014" / name for name in all_ids(ids)), write_clip)
    return ids


HOWTO_PAIRS = 12


def write_howto100m(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """HowTo100M: twelve pairs of a tenth of a second a video, so that five joined give three clips of it."""
    videos = [f"how{number}" for number in range(-(-count // 3))]
    rows = [[name, "task", "1", "Food", "Baking"] for name in videos]
    write_table(root / "HowTo100M_v1.csv", ["video_id", "task_id", "rank", "category_1", "category_2"], rows)
    times = [0.1 * index for index in range(HOWTO_PAIRS + 1)]
    speech = {
        name: {"text": [f"word{index}" for index in range(HOWTO_PAIRS)], "start": times[:-1], "end": times[1:]}
        for name in videos
    }
    write_json(root / "caption.json", speech)
    fill((root / "videos" / f"{name}.webm" for name in videos), write_clip)
    return {"train": [f"{name}-{number}" for name in videos for number in range(3)]}


UCF_CLASSES = ("ApplyEyeMakeup", "Archery", "WallPushups")


def write_ucf101(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """UCF101 with three classes; the same videos in each of the three splits."""
    lists = root / "ucfTrainTestlist"
    write_lines(lists / "classInd.txt", [f"{number} {name}" for number, name in enumerate(UCF_CLASSES, start=1)])
    ids: Ids = {}
    for place, split in enumerate(("train", "test")):
        ids[split] = [
            f"{name}/v_{name}_g{place:02d}_c{number:02d}.avi"
            for number, name in ((number, UCF_CLASSES[number % 3]) for number in range(count))
        ]
    for number in (1, 2, 3):
        train = [f"{video} {1 + UCF_CLASSES.index(video.split('/')[0])}" for video in ids["train"]]
        write_lines(lists / f"trainlist0{number}.txt", train)
        write_lines(lists / f"testlist0{number}.txt", ids["test"])
    fill((root / "UCF-101" / name for name in all_ids(ids)), write_clip)
    return ids


HMDB_CLASSES = ("brush_hair", "cartwheel")


def write_hmdb51(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """HMDB51 with two classes and one unused video in each."""
    ids: Ids = {"train": [], "test": []}
    unused = []
    for place, name in enumerate(HMDB_CLASSES):
        lines = [f"{name}_unused.avi 0"]
        unused.append(f"{name}/{name}_unused.avi")
        for number in range(place, count, len(HMDB_CLASSES)):
            for code, split in (("1", "train"), ("2", "test")):
                lines.append(f"{name}_{split}_{number}.avi {code}")
                ids[split].append(f"{name}/{name}_{split}_{number}.avi")
        for number in (1, 2, 3):
            write_lines(root / "testTrainMulti_7030_splits" / f"{name}_test_split{number}.txt", lines)
    fill((root / "hmdb51_org" / name for name in (*all_ids(ids), *unused)), write_clip)
    return ids


KINETICS_CLASSES = ("abseiling", "air drumming")


def write_kinetics400(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """Kinetics-400 with two classes; clips below a folder of their class."""
    ids: Ids = {}
    paths = []
    for place, split in enumerate(("train", "val", "test")):
        rows = []
        ids[split] = []
        for number in range(count):
            label, video = KINETICS_CLASSES[number % 2], f"kin{place}{number}"
            rows.append([label, video, "2", "12", split])
            ids[split].append(f"{video}_000002_000012")
            paths.append(root / split / label / f"{ids[split][-1]}.mp4")
        write_table(root / f"{split}.csv", ["label", "youtube_id", "time_start", "time_end", "split"], rows)
    fill(paths, write_clip)
    return ids


SOMETHING_CLASSES = ("Putting something on a surface", "Throwing something")


def write_something_v2(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """Something-Something v2 with two classes."""
    ids = numbered("7", ("train", "val"), count)
    write_json(root / "labels" / "labels.json", {name: str(number) for number, name in enumerate(SOMETHING_CLASSES)})
    for split, name in (("train", "train.json"), ("val", "validation.json")):
        rows = []
        for number, video in enumerate(ids[split]):
            template = SOMETHING_CLASSES[number % 2].replace("something", "[something]")
            label = template.replace("[something]", "a cup").lower()
            rows.append({"id": video, "label": label, "template": template, "placeholders": ["a cup"]})
        write_json(root / "labels" / name, rows)
    fill((root / "20bn-something-something-v2" / f"{name}.webm" for name in all_ids(ids)), write_clip)
    return ids


def write_csv(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """SBU-like: a tsv of picture files and captions, in train and test."""
    ids = numbered("pic", ("train", "test"), count)
    rows = [[f"pictures/{name}.jpg", f"a picture {name}", split] for split, own in ids.items() for name in own]
    lines = ["\t".join(row) for row in (["file", "text", "split"], *rows)]
    write_lines(root / "table.tsv", lines)
    fill((root / "pictures" / f"{name}.jpg" for name in all_ids(ids)), write_clip)
    return {split: [f"pictures/{name}.jpg" for name in own] for split, own in ids.items()}


def write_parquet_file(path: Path, ids: list[str], paths: list[str], split: str) -> None:
    """A parquet table of pictures."""
    import pyarrow
    from pyarrow import parquet

    columns = {"id": ids, "path": paths, "caption": [f"a picture {name}" for name in ids], "split": [split] * len(ids)}
    parquet.write_table(pyarrow.table(columns), path)


def write_parquet(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """The same as two parquet files of one folder, one a split."""
    root.mkdir(parents=True, exist_ok=True)
    ids = numbered("pic", ("train", "test"), count)
    for place, (split, own) in enumerate(ids.items()):
        write_parquet_file(root / f"part-{place}.parquet", own, [f"pictures/{name}.jpg" for name in own], split)
    fill((root / "pictures" / f"{name}.jpg" for name in all_ids(ids)), write_clip)
    return ids


def manifest_line(name: str, split: str) -> str:
    """A line of a manifest."""
    row = {"id": name, "path": f"clips/{name}.webm", "captions": [f"clip {name}"], "kind": "video", "split": split}
    return json.dumps(row)


def write_manifest_splits(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """A manifest with train and test."""
    ids = numbered("clip", ("train", "test"), count)
    write_lines(root / "manifest.jsonl", [manifest_line(name, split) for split, own in ids.items() for name in own])
    fill((root / "clips" / f"{name}.webm" for name in all_ids(ids)), write_clip)
    return ids


def write_msrvtt_splits(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """MSR-VTT as the released code reads it."""
    ids = write_msrvtt(root, 2 * count, write_clip=write_clip)
    return {"train": ids[:count], "test": ids[count:]}


def write_msrvtt_clip4clip_splits(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """MSR-VTT in CLIP4Clip's form."""
    ids = write_msrvtt_clip4clip(root, 2 * count, write_clip=write_clip)
    return {"train": ids[:count], "test": ids[count:]}


def write_webvid_splits(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """WebVid-2M; the validation clips have the ids of the first training clips, in tables of their own."""
    return {split: write_webvid(root, count, split=split, write_clip=write_clip) for split in ("train", "val")}


def write_cc3m_splits(root: Path, count: int, write_clip: WriteClip = write_placeholder) -> Ids:
    """CC3M."""
    return {split: write_cc3m(root, count, split=split, write_clip=write_clip) for split in ("train", "val")}
