"""Memory of converting and reading a synthetic feature store of 50,000 videos.

    python benchmarks/feature_store_memory.py [--videos 50000] [--width 1024] [--batches 300] [--folder FOLDER]
        [--output benchmarks/results/feature_store_memory.json]

Writes a released pickle of one expert and one of token features, converts them, and reads training batches of 64
videos. Printed: sizes on disk, and the process's own memory (RssAnon of /proc/self/status, which leaves out pages of
mapped files) before and after each part.
"""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import write_result
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.features.convert_features import convert_features
from frozen_fast.data.load.feature_loader import ExpertFormat, FeatureFormat, FeatureTrainingLoader
from frozen_fast.data.plan.samplers import DataPosition, plan_steps
from frozen_fast.data.sources import read_source

EXPERT = "i3d.i3d.0"
TOKENS, TEXT_WIDTH = 8, 32


def own_mebibytes() -> float:
    """Memory of this process that belongs to no file."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def write_released(root: Path, videos: int, width: int) -> None:
    """The two pickles, one entry at a time, so that writing does not take the memory that is measured.

    Memo numbers repeat from entry to entry: each is set before it is read.
    """
    for path, entry in (
        (root / "aggregated_i3d_25fps_256px_stride25_offset0_inner_stride1" / "i3d-avg.pickle", (width,)),
        (root / "aggregated_text_feats" / "openai.pkl", (TOKENS, TEXT_WIDTH)),
    ):
        path.parent.mkdir(parents=True)
        rng = np.random.default_rng(0)
        with path.open("wb") as file:
            file.write(b"\x80\x03}(")
            for number in range(videos):
                value: object = rng.standard_normal(entry, dtype=np.float32)
                value = value if len(entry) == 1 else [value]
                name = f"video{number}".encode()
                file.write(b"X" + struct.pack("<I", len(name)) + name)
                file.write(pickle.dumps(value, protocol=3)[2:-1])  # without the protocol's and the last opcode
            file.write(b"u.")
    lines = "\n".join(f"video{number}" for number in range(videos))
    (root / "train_list.txt").write_text(lines + "\n", encoding="utf-8")


def main() -> None:
    """Write, convert, read, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root, store = Path(name) / "released", Path(name) / "store"
        write_released(root, options.videos, options.width)
        result = {"videos": options.videos, "own_mebibytes": {"before": own_mebibytes()}}
        convert_features(root, store, [EXPERT], ["openai"])
        result["own_mebibytes"]["converted"] = own_mebibytes()
        source = read_source(SourceConfig(name="s", format="features", path=str(store), split="train_list"))
        format = FeatureFormat(experts={EXPERT: ExpertFormat(options.width)}, text="openai", text_tokens=TOKENS)
        specs = plan_steps(
            {"s": len(source)},
            {"s": 1.0},
            "round_robin",
            0,
            batch_sizes={"s": 64},
            frames=1,
            num_steps=options.batches,
            start=DataPosition(),
        )
        for _ in FeatureTrainingLoader({"s": source}, format).batches(specs):
            pass
        result["own_mebibytes"]["read"] = own_mebibytes()
        result["released_mebibytes"] = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) / 2**20
        result["store_mebibytes"] = sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) / 2**20
        print(json.dumps(result, indent=2))
    if options.output:
        write_result(options.output, torch.device("cpu"), vars(options), result)


if __name__ == "__main__":
    main()
