"""The data of a report: the files of a run folder, and the stages' totals computed from steps.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from frozen_fast.common.files import read_rows
from frozen_fast.config.video_sizes import VIDEO_SIZES
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint_folder import best_checkpoint
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.run_lock import is_alive

Row = dict[str, Any]

# Fields that the report uses, and their types.
_NUMBER = (int, float)
_STEP = {"step": int, "stage": int, "frames": int, "clips": int, "seconds": _NUMBER, "stall_seconds": _NUMBER}
_STEP |= {"warmup": bool, "loss": (*_NUMBER, type(None))}  # None: not finite, the step was skipped
_STAGE = {"stage": int, "steps": int, "clips": int, "seconds": _NUMBER, "training_seconds": _NUMBER}
_STAGE |= {"stall_seconds": _NUMBER, "warmup_seconds": _NUMBER, "gpu_hours": _NUMBER, "evaluation_gpu_hours": _NUMBER}
_GALLERY = {"source": str, "page": str, "shown": int, "all_queries": int, "best": list, "worst": list}
_EVALUATION = {"step": int, "stage": int, "source": str, "protocol": str, "frames": int, "metrics": dict}

# stages.json may differ from the sums of steps.jsonl by this share: rounding, and time between two steps.
AGREEMENT = 0.02
# Differences below this many seconds are no disagreement, whatever their share.
AGREEMENT_SECONDS = 0.05


@dataclass(frozen=True)
class StageTotals:
    """Totals of one stage from steps.jsonl; `timed` excludes warm-up steps."""

    stage: int
    frames: int
    steps: int
    clips: int
    seconds: float
    stall_seconds: float
    warmup_seconds: float
    timed_clips: int
    timed_seconds: float
    bad_clips: int
    last_loss: float | None

    @property
    def clips_per_second(self) -> float | None:
        """Clips over training and stall after warm-up."""
        return self.timed_clips / self.timed_seconds if self.timed_seconds > 0 else None

    @property
    def stall_share(self) -> float | None:
        """Stall over training and stall after warm-up."""
        return self.stall_seconds / self.timed_seconds if self.timed_seconds > 0 else None


@dataclass(frozen=True)
class RunData:
    """A run folder's content.

    `events` and `non_finite` are the rows of events.jsonl and non_finite.jsonl; `alive` says that a process writes to
    the folder. `best_step` is the step of the checkpoint that checkpoints/best names; `galleries` are the best and
    worst queries beside each retrieval page; `missing` names missing and unreadable files, with the consequence.
    """

    folder: Path
    config: Row
    config_text: str
    environment: Row
    status: Row
    steps: list[Row]
    stages: list[Row]
    evaluations: list[Row]
    bad_clips: list[Row]
    kernels: list[Row]
    batch_sizes: Row
    events: list[Row] = field(default_factory=list)
    non_finite: list[Row] = field(default_factory=list)
    alive: bool = False
    best_step: int | None = None
    galleries: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The experiment's name."""
        return str(self.config.get("name") or self.folder.name)

    @property
    def on_gpu(self) -> bool:
        """Whether the stages ran on CUDA devices."""
        return any(row.get("device") == "cuda" for row in self.stages)

    @property
    def video_size(self) -> str:
        """Name of the video tower's size: the built or loaded model's, or the config's where no model was noted."""
        model = self.environment.get("model") or self.config.get("model") or {}
        size = (model.get("video") or {}).get("size")
        if not isinstance(size, dict):
            return str(size)
        named = (name for name, known in VIDEO_SIZES.items() if asdict(known) == size)
        return next(named, ", ".join(f"{key} {value}" for key, value in size.items()))

    def totals(self) -> list[StageTotals]:
        """Stages that have a step, from steps.jsonl."""
        by_stage: dict[int, list[Row]] = {}
        for row in self.steps:
            by_stage.setdefault(int(row["stage"]), []).append(row)
        return [_total(stage, rows) for stage, rows in sorted(by_stage.items())]

    def stage_row(self, stage: int) -> Row | None:
        """A stage's entry of stages.json, if it has one."""
        return next((row for row in self.stages if row.get("stage") == stage), None)

    def is_classifier(self) -> bool:
        """Whether the run's evaluations are those of a trained classifier, which ranks nothing."""
        return any("finetuned" in row for row in self.evaluations)

    def stage_evaluations(self) -> list[Row]:
        """The last evaluation of each set in each stage, and those of the best checkpoint, in their order."""
        last = {(row["stage"], row["source"], row["protocol"]): row["step"] for row in self.evaluations}
        return [
            row
            for row in self.evaluations
            if row["step"] in (last[row["stage"], row["source"], row["protocol"]], self.best_step)
        ]

    def evaluates_inside_stages(self) -> bool:
        """Whether a stage has evaluations at more than one step."""
        evaluated = {(row["stage"], row["step"]) for row in self.evaluations}
        return len(evaluated) > len({stage for stage, _ in evaluated})

    def disagreements(self) -> list[str]:
        """Differences between stages.json and the sums of steps.jsonl."""
        totals = {total.stage: total for total in self.totals()}
        found = []
        for row in self.stages:
            total = totals.get(row["stage"])
            if total is None:
                found.append(f"stage {row['stage'] + 1}: stages.json has it, steps.jsonl has no step of it")
                continue
            charged = row["training_seconds"] + row["stall_seconds"] + row["warmup_seconds"]
            allowed_seconds = AGREEMENT * max(charged, total.seconds) + AGREEMENT_SECONDS
            pairs = [
                ("steps", row["steps"], total.steps, 0.0),
                ("clips", row["clips"], total.clips, 0.0),
                ("seconds of steps", charged, total.seconds, allowed_seconds),
                ("stall seconds", row["stall_seconds"], total.stall_seconds, allowed_seconds),
            ]
            for what, stated, summed, allowed in pairs:
                if abs(stated - summed) > allowed:
                    found.append(
                        f"stage {row['stage'] + 1}: {what} {stated:g} in stages.json, {summed:g} in steps.jsonl"
                    )
        return found

    def bad_clip_counts(self) -> list[tuple[str, str, int]]:
        """(source, cause, how many) of unreadable clips, most first."""
        counts = Counter((str(row.get("source")), str(row.get("cause"))) for row in self.bad_clips)
        return [(source, cause, count) for (source, cause), count in counts.most_common()]


def read_run(folder: str | Path) -> RunData:
    """Read a run folder in any state.

    Raises:
        UserError: it contains neither config.yaml nor steps.jsonl.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() and not (folder / "steps.jsonl").is_file():
        raise UserError(f"run folder: got {str(folder)!r}; allowed: a folder with config.yaml or steps.jsonl of a run")
    reader = _Reader(folder)
    config_text = reader.read_text("config.yaml", "the settings are unknown")
    config = reader.parse_yaml(config_text)
    evaluates = _evaluates(config) or (folder / "metrics.json").exists()
    metrics = reader.read_json("metrics.json", {}, "no evaluation has finished") if evaluates else {}
    stages = reader.read_json("stages.json", [], "no stage has finished; figures are from steps.jsonl")
    return RunData(
        folder=folder,
        config=config,
        config_text=config_text,
        environment=reader.read_json("environment.json", {}, "versions and devices are unknown"),
        status=reader.read_json("status.json", {}, "how the run ended is unknown"),
        steps=reader.sound("steps.jsonl", reader.read_lines("steps.jsonl", "no step has finished"), _STEP),
        stages=reader.sound("stages.json", stages, _STAGE),
        evaluations=reader.sound("metrics.json", metrics.get("evaluations", []), _EVALUATION),
        bad_clips=reader.read_lines("bad_clips.jsonl", None),
        kernels=[
            table
            for path in sorted(folder.glob("traces/*.kernels.json"))
            if (table := reader.read_json(f"traces/{path.name}", {}, None))
        ],
        batch_sizes=reader.read_json("batch_sizes.json", {}, None),
        events=reader.read_lines("events.jsonl", None),
        non_finite=reader.read_lines("non_finite.jsonl", None),
        alive=is_alive(RunFolder(folder)),
        best_step=_best_step(folder),
        galleries=[
            page
            for path in sorted(folder.glob("gallery_*.json"))
            for page in reader.sound(path.name, reader.read_json(path.name, {}, None), _GALLERY)
        ],
        missing=reader.missing,
    )


class _Reader:
    """Reads files of a folder and records the unreadable ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: list[str] = []

    def read_text(self, name: str, means: str | None) -> str:
        """A file's text; with `means` None its absence is normal."""
        path = self.folder / name
        if not path.is_file():
            if means is not None:
                self.missing.append(f"{name} is missing: {means}")
            return ""
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            self.missing.append(f"{name} cannot be read ({error}): {means or 'it is left out'}")
            return ""

    def read_json(self, name: str, default: Any, means: str | None) -> Any:
        """A JSON file's content, of the default's kind; with `means` None its absence is normal."""
        text = self.read_text(name, means)
        if not text:
            return default
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.missing.append(f"{name} cannot be read ({error}): {means or 'it is left out'}")
            return default
        if isinstance(value, type(default)):
            return value
        wanted = "list" if isinstance(default, list) else "object"
        self.missing.append(f"{name} cannot be read (it holds no {wanted}): {means or 'it is left out'}")
        return default

    def read_lines(self, name: str, means: str | None) -> list[Row]:
        """Rows of a JSON-lines file; with `means` None its absence is normal."""
        path = self.folder / name
        if not path.is_file():
            if means is not None:
                self.missing.append(f"{name} is missing: {means}")
            return []
        rows, problems = read_rows(path)
        if problems:
            first = f"line {problems[0][0]}: {problems[0][1]}"
            self.missing.append(f"{name}: {len(problems)} line(s) cannot be read ({first}) and are left out")
        return rows

    def sound(self, name: str, rows: Any, kinds: dict[str, Any]) -> list[Row]:
        """The rows that have every field that the report counts with; the others are named."""
        rows = rows if isinstance(rows, list) else [rows]
        kept = []
        for row in rows:
            wrong = [key for key, kind in kinds.items() if not isinstance(row, dict) or not _fits(row.get(key), kind)]
            if not wrong:
                kept.append(row)
        if len(kept) < len(rows):
            self.missing.append(f"{name} cannot be read in full: {len(rows) - len(kept)} row(s) are left out")
        return kept

    def parse_yaml(self, text: str) -> Row:
        try:
            values = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            why = " ".join(str(error).split())
            self.missing.append(f"config.yaml cannot be read ({why}): the settings are unknown")
            return {}
        return values if isinstance(values, dict) else {}


def _best_step(folder: Path) -> int | None:
    """The step of the checkpoint that checkpoints/best names; None where there is none."""
    best = best_checkpoint(folder / "checkpoints")
    return None if best is None else int(best.name.removeprefix("step_"))


def _fits(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _evaluates(config: Row) -> bool:
    """Whether a run with this config evaluates at all; yes where the config does not say."""
    evaluation = config.get("evaluation")
    return not isinstance(evaluation, dict) or (bool(evaluation.get("sources")) and evaluation.get("every") != "never")


def _total(stage: int, rows: list[Row]) -> StageTotals:
    timed = [row for row in rows if not row["warmup"]]
    return StageTotals(
        stage=stage,
        frames=max(int(row["frames"]) for row in rows),
        steps=len(rows),
        clips=sum(int(row["clips"]) for row in rows),
        seconds=sum(row["seconds"] for row in rows),
        stall_seconds=sum(row["stall_seconds"] for row in timed),
        warmup_seconds=sum(row["seconds"] for row in rows if row["warmup"]),
        timed_clips=sum(int(row["clips"]) for row in timed),
        timed_seconds=sum(row["seconds"] for row in timed),
        bad_clips=sum(int(row.get("bad_clips") or 0) for row in rows),
        last_loss=next((float(row["loss"]) for row in reversed(rows) if row["loss"] is not None), None),
    )
