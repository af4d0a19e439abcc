"""UCF101: UCF-101/<Class>/<video>.avi and ucfTrainTestlist/{classInd,trainlist0N,testlist0N}.txt, three splits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, folder_with, read_list, require_file
from frozen_fast.data.sources.class_names import in_words
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.errors import UserError


def read_ucf101(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Videos of trainlist0N.txt or testlist0N.txt; the class is the folder, and the caption its name in words."""
    root = Path(config.path)
    lists = folder_with(root, ("ucfTrainTestlist", "."), "classInd.txt", key)
    videos = folder_with(root, ("UCF-101", "videos"), ".", key)
    classes = set()
    for number, line in enumerate(read_list(lists / "classInd.txt"), start=1):
        cells = line.split()
        if len(cells) != 2 or not cells[0].isdigit():
            raise UserError(f"{lists / 'classInd.txt'}:{number}: got {line!r:.80}; allowed: a number and a class")
        classes.add(cells[1])
    collector.classes = [in_words(name) for name in classes]
    split_file = require_file(lists / f"{config.split}list0{config.split_version}.txt", key)
    for number, line in enumerate(read_list(split_file), start=1):
        video = PurePosixPath(line.split()[0])
        if video.parent.name not in classes:
            where = f"{split_file}:{number}"
            raise UserError(f"{where}: got {line!r:.80}; allowed: Class/video.avi with a class of classInd.txt")
        label = in_words(video.parent.name)
        yield Clip(id=str(video), path=str(videos / video), captions=(label,), split=config.split, label=label)


UCF101 = Layout(
    data_set="UCF101",
    read=read_ucf101,
    published={
        "1": {"train": (9537,), "test": (3783,)},
        "2": {"train": (9586,), "test": (3734,)},
        "3": {"train": (9624,), "test": (3696,)},
    },
    get_from="UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip: crcv.ucf.edu/data/UCF101.php",
)
