"""The data sets that the files under configs/ name, as tiny folders in their published form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from frozen_fast.config import ExperimentConfig, config_from_mapping, load_config
from frozen_fast.config.fields import to_plain
from support import data_set_folders as folders
from support.datasets import WriteClip, manifest_folder, write_msrvtt, write_placeholder

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENT_FOLDERS = ("pretrain", "finetune", "eval")

PICTURES = ("cc3m", "flickr30k", "coco", "csv", "parquet")
WRITERS: dict[str, Callable[..., Any]] = {
    "webvid": folders.write_webvid_splits,
    "cc3m": folders.write_cc3m_splits,
    "howto100m": folders.write_howto100m,
    "msvd": folders.write_msvd,
    "didemo": folders.write_didemo,
    "lsmdc": folders.write_lsmdc,
    "activitynet": folders.write_activitynet,
    "vatex": folders.write_vatex,
    "flickr30k": folders.write_flickr30k,
    "coco": folders.write_coco,
    "kinetics400": folders.write_kinetics400,
    "ucf101": folders.write_ucf101,
    "hmdb51": folders.write_hmdb51,
    "something_v2": folders.write_something_v2,
    "csv": folders.write_csv,
    "parquet": folders.write_parquet,
}


def experiments() -> list[str]:
    """Every experiment file, relative to configs/; names that begin with _ are parts of others."""
    found = list(CONFIGS.glob("*.yaml"))
    for name in EXPERIMENT_FOLDERS:
        found += CONFIGS.glob(f"{name}/**/*.yaml")
    return sorted(path.relative_to(CONFIGS).as_posix() for path in found if not path.name.startswith("_"))


def small_video_tower(config: ExperimentConfig) -> dict[str, Any]:
    """Keys of model.video for the smallest model of the config's tower at 32 x 32 pixels."""
    return {
        "space_time": {"size": "pico_patch16_32"},
        "timm": {"size": "resnet10t", "resolution": 32},
        "torchvision_video": {"size": "mc3_18", "resolution": 32},
    }[config.model.video.tower or "space_time"]


def write_data(
    root: Path,
    names: Iterable[str],
    clips: int,
    *,
    clip: WriteClip = write_placeholder,
    picture: WriteClip = write_placeholder,
) -> None:
    """Write every data set that these configs name, `clips` a split, below root/<what follows data/>."""
    wanted = {}
    for name in names:
        config = load_config(CONFIGS / name)
        for source in (*config.data.sources, *config.evaluation.sources):
            wanted[moved(root, source.path)] = source.format
    for path, layout in wanted.items():
        if layout == "manifest":
            manifest_folder(path.parent, clips, suffix=".avi", write_clip=clip).rename(path)
        elif layout == "msrvtt":
            write_msrvtt(path, 2 * clips, write_clip=clip)
        else:
            WRITERS[layout](path, clips, picture if layout in PICTURES else clip)


def moved(root: Path, path: str) -> Path:
    """A path of a config, below the test's folder."""
    assert path.startswith("data/"), f"{path}: paths in configs are under data/"
    return root / Path(path).relative_to("data")


def with_data(name: str, root: Path) -> ExperimentConfig:
    """The config with its data/ moved into the test's folder, whose splits have not the published sizes."""
    tree = to_plain(load_config(CONFIGS / name))
    for source in (*tree["data"]["sources"], *tree["evaluation"]["sources"]):
        source["path"] = str(moved(root, source["path"]))
        source["split_counts"] = "off"
    return config_from_mapping(tree)
