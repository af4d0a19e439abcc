"""Put the results of several runs side by side: python compare_runs.py RUN_FOLDER RUN_FOLDER .."""

import json
import sys
from pathlib import Path

print(f"{'run':<24} {'source':<16} {'frames':>6} {'R@1':>6} {'R@5':>6} {'hours':>8}")
for folder in map(Path, sys.argv[1:]):
    hours = sum(stage["gpu_hours"] for stage in json.loads((folder / "stages.json").read_text()))
    for row in json.loads((folder / "metrics.json").read_text())["evaluations"]:
        metrics = row["metrics"]
        values = f"{metrics['t2v/R@1']:>6.1f} {metrics['t2v/R@5']:>6.1f} {hours:>8.3f}"
        print(f"{folder.name:<24} {row['source']:<16} {row['frames']:>6} {values}")
