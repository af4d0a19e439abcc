"""One trial of a sweep: its command line, the process that measures it, and what came out."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frozen_fast.config import load_config, to_plain
from frozen_fast.sweep.outcome import Outcome, classify, read_figures, telling_line
from frozen_fast.sweep.process import free_port, run_limited
from frozen_fast.sweep.space import Trial
from frozen_fast.sweep.sweep_file import SweepConfig

ALWAYS = ("tracking.trackers=[]",)
"""Overrides of every trial's measurement: the sweep itself reports to the trackers, one row per trial."""


class TrialRunner:
    """Starts trials under the limits of a sweep file.

    Args:
        config: the sweep file, its paths absolute.
        folder: of the sweep; run folders and logs of trials are under trials/.
        train_script: train.py, which every trial starts.

    Raises:
        UserError: the experiment cannot be read.
    """

    def __init__(self, config: SweepConfig, *, folder: Path, train_script: Path) -> None:
        self.folder = folder / "trials"
        self._config = config
        self._train_script = train_script
        self._experiment = to_plain(load_config(config.experiment))

    def accelerate_file(self, trial: Trial) -> Path | None:
        """The accelerate config that starts a trial; None: one process."""
        name = trial.accelerate or self._config.accelerate
        return None if name is None else Path(name)

    def overrides(self, trial: Trial, rung_overrides: Sequence[str]) -> list[str]:
        """What a trial changes in the experiment."""
        return [*ALWAYS, *self._config.overrides, *rung_overrides, *trial.overrides()]

    def environment(self, trial: Trial) -> dict[str, str]:
        """Variables that a trial's process gets."""
        return {**dict(self._config.environment), **trial.environment}

    def command(self, trial: Trial, rung_overrides: Sequence[str], run_folder: Path) -> list[str]:
        """The trial's exact command line."""
        accelerate = self.accelerate_file(trial)
        config_file = ["--config_file", str(accelerate)] if accelerate else []
        return [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *config_file,
            "--main_process_port",
            str(free_port()),
            "--gpu_ids",
            "all",  # of those in CUDA_VISIBLE_DEVICES; a file's "0" would put all trials on one GPU
            str(self._train_script),
            "--config",
            self._config.experiment,
            f"run_folder={run_folder}",
            *self.overrides(trial, rung_overrides),
        ]

    def conditions(self, trial: Trial, rung_overrides: Sequence[str]) -> str:
        """A hash of all that a measurement depends on apart from the trial's settings; another hash measures again."""
        config = self._config
        accelerate = self.accelerate_file(trial)
        parts = [
            self._experiment,
            config.overrides,
            config.environment,
            rung_overrides,
            asdict(config.limits),
            config.devices_per_trial,
            config.epoch_clips,
            accelerate.read_text(encoding="utf-8") if accelerate else None,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]

    def measure(
        self,
        trial: Trial,
        rung: int,
        rung_overrides: Sequence[str],
        *,
        devices: Mapping[str, str],
        stop: threading.Event,
    ) -> Outcome:
        """Run a trial to its end or to a limit; a failure is an outcome with its cause.

        Args:
            trial: what to run.
            rung: of successive halving, from 0.
            rung_overrides: changes to the experiment in this rung.
            devices: variables that select the trial's devices.
            stop: ends the trial when set.
        """
        run_folder = (self.folder / f"{trial.name}_rung{rung}_{int(time.time() * 1000)}").resolve()
        log_path = run_folder.with_suffix(".log")
        limits = self._config.limits
        try:
            result = run_limited(
                self.command(trial, rung_overrides, run_folder),
                folder=Path.cwd(),
                environment={**self.environment(trial), **devices},
                log=log_path,
                seconds=limits.seconds,
                memory_bytes=None if limits.memory_gib is None else int(limits.memory_gib * 2**30),
                stop=stop,
            )
        finally:
            shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)  # gigabytes that no run resumes from
        output = log_path.read_text(errors="replace")
        cause = classify(result.exit_code, output, timed_out=result.timed_out, over_memory=result.over_memory)
        common: dict[str, Any] = {
            "trial": trial.name,
            "label": trial.label(),
            "rung": rung,
            "seconds": result.seconds,
            "conditions": self.conditions(trial, rung_overrides),
            "host_memory_bytes": result.peak_resident_bytes,
        }
        if cause != "ok":
            message = telling_line(output)
            if result.over_memory:
                used = f"{result.peak_resident_bytes / 2**30:.2f} GiB resident"
                message = f"{used}; limits.memory_gib is {limits.memory_gib:g}"
            elif result.timed_out:
                message = f"stopped after limits.seconds, {limits.seconds:g}"
            return Outcome(**common, cause=cause, message=message)
        try:
            figures = read_figures(run_folder, epoch_clips=self._config.epoch_clips)
        except (ValueError, KeyError) as error:
            return Outcome(**common, cause="crash", message=f"exit code 0 without figures: {error}")
        return Outcome(**common, cause="ok", **figures)
