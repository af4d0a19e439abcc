"""A made-up run folder in the shared formats, for the tests of what reads one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from frozen_fast.profiling import StageMeter


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_run_folder(
    folder: Path,
    *,
    frames: tuple[int, ...] = (1, 4, 8),
    steps_per_stage: int = 40,
    finished_stages: int | None = None,
    paper_row: str = "none",
    device: str = "cpu",
    num_devices: int = 1,
    clips_per_step: int = 16,
    bad_clips: int = 3,
    state: str = "done",
    size: str = "nano_patch16_64",
    name: str = "demo",
    seed: int = 0,
) -> Path:
    """Write the files of a run that a real StageMeter timed on a made-up clock.

    Args:
        folder: made if missing.
        frames: of each stage.
        steps_per_stage: optimizer steps of each stage, of which four are warm-up.
        finished_stages: stages in stages.json and metrics.json; none: all.
        paper_row: as in the config.
        device: cpu or cuda, in name only.
        num_devices: of the run.
        clips_per_step: over all ranks.
        bad_clips: rows of bad_clips.jsonl.
        state: of status.json.
        size: of the video tower.
        name: of the experiment.
        seed: of losses and times.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, clock = random.Random(seed), _Clock()
    finished = len(frames) if finished_stages is None else finished_stages
    steps: list[dict[str, Any]] = []
    stages: list[dict[str, Any]] = []
    for stage, count in enumerate(frames):
        sources = {"clips": clips_per_step, "stills": 2 * clips_per_step}
        meter = StageMeter(stage=stage, frames=count, batch_sizes=sources, num_devices=num_devices, clock=clock)
        for index in range(steps_per_stage):
            steps.append(_step(meter, clock, rng, stage, count, index, len(steps), sources))
        clock.now += 0.01 * steps_per_stage
        with meter.section("evaluation"):
            clock.now += 2.0 * count
        with meter.section("checkpoint"):
            clock.now += 1.5
        stages.append({**meter.stage_row(), "device": device})
    _write(folder / "steps.jsonl", steps, lines=True)
    _write(folder / "stages.json", stages[:finished])
    evaluations = [_evaluation(stage, frames[stage], (stage + 1) * steps_per_stage) for stage in range(finished)]
    _write(folder / "metrics.json", {"evaluations": evaluations})
    _write(folder / "bad_clips.jsonl", [_bad_clip(index) for index in range(bad_clips)], lines=True)
    _write(folder / "environment.json", _environment(device, num_devices))
    exit_code = {"done": 0, "stopped": 75, "failed": 1}.get(state)
    where = {"step": len(steps), "stage": len(frames) - 1, "time": 0}
    _write(folder / "status.json", {"state": state, "exit_code": exit_code, "message": "", **where})
    config = {
        "name": name,
        "seed": seed,
        "paper_row": paper_row,
        "model": {"video": {"size": size, "attention": "auto"}},
        "curriculum": {"stages": [{"frames": count, "steps": steps_per_stage} for count in frames]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def _step(
    meter: StageMeter,
    clock: _Clock,
    rng: random.Random,
    stage: int,
    frames: int,
    index: int,
    before: int,
    sources: dict[str, int],
) -> dict[str, Any]:
    source = list(sources)[index % 2]
    shown = frames if source == "clips" else 1
    with meter.step(warmup=index < 4) as step:
        with step.stall():
            clock.now += 0.02 * rng.random()
        step.count(sources[source], shown)
        clock.now += (1.2 if index < 4 else 0.1) * (0.5 + shown / 4) * (0.9 + 0.2 * rng.random())
    (row,) = meter.end_window()
    loss = 5.5 * math.exp(-before / 60) + 0.4 + (0.3 if index < 10 and stage else 0.0) + 0.25 * rng.random()
    return {
        "step": before + 1,
        "stage": stage,
        "frames": shown,
        "source": source,
        "loss": loss if source == "clips" else loss + 0.5,
        "learning_rate": 1e-4,
        "gradient_norm": None,
        "clips": row.clips,
        "seconds": row.seconds,
        "stall_seconds": row.stall_seconds,
        "warmup": row.warmup,
        "time": 1_760_000_000 + clock.now,
        "bad_clips": 0,
    }


def _evaluation(stage: int, frames: int, step: int) -> dict[str, Any]:
    values = {"R@1": 3.0 + 9.5 * stage, "R@5": 18.0 + 16 * stage, "R@10": 32.0 + 20 * stage, "R@50": 90.0 + 4 * stage}
    values |= {"MdR": 18.5 - 6 * stage, "MnR": 24.0 - 5 * stage, "Geom": 12.0 + 13 * stage}
    metrics = {f"{direction}/{key}": value for direction in ("t2v", "v2t") for key, value in values.items()}
    return {
        "step": step,
        "stage": stage,
        "frames": frames,
        "source": "held_out",
        "protocol": "plain",
        "windows": 240,
        "num_queries": 120,
        "num_videos": 120,
        "metrics": {**metrics, "twin_accuracy": 50.0 + 18.5 * stage, "one_frame_ceiling": 50.0},
        "seconds": 2.0 * frames,
    }


def _bad_clip(index: int) -> dict[str, Any]:
    return {
        "step": 3 * index + 1,
        "source": "clips",
        "clip_id": f"clip_{index}",
        "path": f"videos/<clip & {index}>.webm",
        "cause": "truncated" if index else "missing",
        "message": "ends after 3 of 60 frames" if index else "no such file",
        "replaced_by": f"clip_{index + 100}",
    }


def _environment(device: str, num_devices: int) -> dict[str, Any]:
    return {
        "versions": {"frozen_fast": "0.1.0", "torch": "2.10.0", "accelerate": "1.15.0"},
        "python": "3.11.7",
        "devices": ["NVIDIA H200" if device == "cuda" else "A processor, 2 threads"] * num_devices,
        "world_size": num_devices,
        "distributed_type": "NO" if num_devices == 1 else "MULTI_GPU",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": True,
        "command": ["train.py", "--config", "configs/demo.yaml"],
        "decode_backends": {"clips": {"dali": 700, "pyav": 20}, "stills": "pyav"},
        "sources": {
            "clips": {"clips": 960, "kind": "video", "drops": {"file not on disk": 39, "no caption": 1}},
            "stills": {"clips": 1500, "kind": "image", "drops": {}},
        },
        "evaluation_sources": {"held_out": {"clips": 120, "kind": "video", "drops": {"duplicate id": 2}}},
        "attention_backends": [{"axis": "time", "frames": 4, "backend": "sdpa"}],
        "precision": "bf16",
        "precision_reason": "(auto: the device computes it in hardware)",
        "started": 1_760_000_000.0,
    }


def _write(path: Path, value: Any, *, lines: bool = False) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value, indent=2))
