"""Own clips from pretrained weights beside the same config from scratch: R@10 on held-out clips, over seeds.

    python benchmarks/pretrained_start.py --train data/pictures/train.jsonl --test data/pictures/test.jsonl

Trains configs/finetune/own_clips_pretrained.yaml and the same without its weights (the blocks that it freezes then
learn, at the learning rate of the rest) from the same seeds with the same clips and steps, and evaluates both at the
end. benchmarks/picture_clips.py makes a data set. Runs lie under --work; a finished one is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import ROOT, pick_device, write_result
from frozen_fast.common.files import write_atomically
from frozen_fast.errors import UserError

CONFIG = ROOT / "configs/finetune/own_clips_pretrained.yaml"
ARMS = {
    "pretrained": [],
    "scratch": ["model.video.weights=none", "model.video.time_init=random", "optimizer.groups=[]"],
}
"""What each arm changes in the config."""

METRICS = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/MdR", "v2t/R@10")


def run_arm(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one arm from one seed unless that is done; its row.

    Raises:
        UserError: the run ended with an error, which is above.
    """
    folder = options.work / f"{arm}_seed{seed}"
    if not is_done(folder):
        overrides = [
            f"name={arm}_seed{seed}",
            f"run_folder={json.dumps(str(folder))}",
            f"seed={seed}",
            f"data.sources[0].path={options.train}",
            f"evaluation.sources[0].path={options.test}",
            "evaluation.every=end",
            "checkpoints.every_steps=0",
            *ARMS[arm],
            *options.overrides,
        ]
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(CONFIG), "--resume", "auto", *overrides]
        code = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode
        if code:
            raise UserError(f"{arm}, seed {seed}: ended with exit code {code}; its messages are above")
    stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))["stages"]
    last = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["evaluations"][-1]
    return {
        "arm": arm,
        "seed": seed,
        "queries": last["num_queries"],
        "clips": sum(stage["clips"] for stage in stages),
        "training_minutes": 60 * sum(stage["gpu_hours"] for stage in stages),
        "metrics": {name: last["metrics"][name] for name in METRICS},
    }


def is_done(folder: Path) -> bool:
    """Whether a run has ended well."""
    status = folder / "status.json"
    return status.is_file() and json.loads(status.read_text(encoding="utf-8")).get("state") == "done"


def table(rows: list[dict[str, Any]]) -> str:
    """A row per run, means, and the margin of R@10."""
    lines = ["| start | seed | minutes | " + " | ".join(METRICS) + " |", "|---|---|---|" + "---|" * len(METRICS)]
    means: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        means[arm] = {name: statistics.fmean(row["metrics"][name] for row in own) for name in METRICS}
        for row in own:
            cells = [arm, str(row["seed"]), f"{row['training_minutes']:.1f}"]
            lines.append("| " + " | ".join([*cells, *(f"{row['metrics'][name]:.1f}" for name in METRICS)]) + " |")
        lines.append(f"| {arm} | mean | | " + " | ".join(f"{value:.1f}" for value in means[arm].values()) + " |")
    margin = means["pretrained"]["t2v/R@10"] - means["scratch"]["t2v/R@10"]
    chance = 1000 / rows[0]["queries"]
    note = f"{rows[0]['queries']} held-out clips, chance of R@10 {chance:.1f} %; t2v R@10 {margin:+.1f} points."
    return "\n".join([*lines, "", note, ""])


def main(arguments: list[str]) -> int:
    """Train what is not trained yet, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="manifest of training clips")
    parser.add_argument("--test", type=Path, required=True, help="manifest of held-out clips")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs/pretrained_start"), help="run folders")
    parser.add_argument("--output", type=Path, default=Path("pretrained_start.json"), help="result file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config, for every run")
    options = parser.parse_args(arguments)
    try:
        rows = [run_arm(options, arm, seed) for seed in options.seeds for arm in options.arms]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if set(options.arms) == set(ARMS):
        text = table(rows)
        print(text)
        write_atomically(options.output.with_suffix(".md"), text)
    write_result(options.output, pick_device("auto"), vars(options), {"runs": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
