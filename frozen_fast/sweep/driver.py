"""The sweep itself: trials into free places, results into results.jsonl as they come, a ranking at the end."""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from frozen_fast.common.files import append_json_line
from frozen_fast.config import load_config, to_plain
from frozen_fast.errors import UserError
from frozen_fast.records.tracking import Trackers
from frozen_fast.sweep.devices import device_groups
from frozen_fast.sweep.outcome import Cause, Outcome, classify, read_figures, telling_line, whole_lines
from frozen_fast.sweep.process import ProcessResult, free_port, run_limited
from frozen_fast.sweep.ranking import rank, write_ranking
from frozen_fast.sweep.space import Trial, draw_trials, enumerate_trials, survivors
from frozen_fast.sweep.sweep_file import SweepConfig
from frozen_fast.sweep.winner import write_winner

log = logging.getLogger(__name__)

ALWAYS = ("tracking.trackers=[]",)
"""Overrides of every trial's measurement: a trial is a row of the sweep's run at Weights & Biases, not a run."""


class Sweep:
    """One sweep over the settings of a file; a second call continues where the first was stopped.

    Args:
        config: the sweep file, its paths absolute.
        folder: where results go.
        train_script: train.py, which every trial starts.
        again: causes of failure whose trials are measured once more.

    Raises:
        UserError: the experiment cannot be read, or refuses every trial (a key that does not exist).
    """

    def __init__(self, config: SweepConfig, *, folder: Path, train_script: Path, again: Collection[Cause] = ()) -> None:
        self.config = config
        self.folder = folder
        self.train_script = train_script
        axes = {name: list(values) for name, values in config.axes}
        product = draw_trials(enumerate_trials(axes, []), config.max_trials, config.seed)
        listed = enumerate_trials({}, [dict(trial) for trial in config.trials])
        self.trials = {trial.name: trial for trial in (*product, *listed)}
        self.rungs = config.rungs if config.search == "halving" else ((),)
        self._experiment = to_plain(load_config(config.experiment))
        self._check_trials([trial.name for trial in listed])
        self.results = folder / "results.jsonl"
        earlier = [outcome for row in whole_lines(self.results) if (outcome := self._usable(row))]
        self.outcomes = [outcome for outcome in earlier if outcome.cause not in again]
        self._stop = threading.Event()
        self._trackers = Trackers()

    def run(self) -> Outcome | None:
        """Measure what is not measured yet, write the ranking and the winner; return the winner, None if all failed.

        Raises:
            KeyboardInterrupt: the caller was told to stop; trials that were running are ended, and not results.
        """
        config = self.config
        self._trackers = Trackers.start(
            config.tracking, name=config.name, config=config, folder=self.folder, step=len(self.outcomes) or None
        )
        try:
            names = list(self.trials)
            for index, rung_overrides in enumerate(self.rungs):
                self._measure([self.trials[name] for name in names], index, rung_overrides)
                of_rung = {row.trial: row for row in self.outcomes if row.rung == index}
                speeds = {name: of_rung[name].clips_per_second_per_device for name in names}
                names = survivors(speeds, config.keep_share)
        finally:
            self._trackers.close()
        log.info("ranking: %s", self._write_ranking(plots=True))
        best = rank(self.outcomes)[:1]
        if not best or best[0].cause != "ok":
            return None
        winner = self.trials[best[0].trial]
        write_winner(
            self.folder,
            Path(config.experiment),
            winner,
            self._accelerate(winner),
            self._environment(winner),
            self.train_script,
        )
        return best[0]

    def print_commands(self, out: TextIO) -> None:
        """Write every trial's command line of the first rung, shell-quoted, with the variables it sets."""
        for trial in self.trials.values():
            command = self.command(trial, self.rungs[0], self.folder / "trials" / trial.name)
            variables = [f"{name}={shlex.quote(value)} " for name, value in self._environment(trial).items()]
            out.write(f"# {trial.label()}\n{''.join(variables)}{shlex.join(command)}\n")

    def command(self, trial: Trial, rung_overrides: Sequence[str], run_folder: Path) -> list[str]:
        """The trial's exact command line."""
        accelerate = self._accelerate(trial)
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
            str(self.train_script),
            "--config",
            self.config.experiment,
            f"run_folder={run_folder}",
            *self._overrides(trial, rung_overrides),
        ]

    def conditions(self, trial: Trial, rung: int) -> str:
        """A hash of what a trial is measured under beside its own settings: a change makes it a trial not yet done."""
        config = self.config
        accelerate = self._accelerate(trial)
        parts = [
            self._experiment,
            config.overrides,
            config.environment,
            self.rungs[rung],
            asdict(config.limits),
            config.devices_per_trial,
            config.epoch_clips,
            accelerate.read_text(encoding="utf-8") if accelerate else None,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]

    def _check_trials(self, listed: Sequence[str]) -> None:
        """Refuse a listed trial that cannot run, and a product of which nothing can: mistakes in the sweep file."""
        for name in listed:
            try:
                load_config(self.config.experiment, self._overrides(self.trials[name], self.rungs[0]))
            except UserError as error:
                raise UserError(f"trials: {error}") from None
        first: UserError | None = None
        for trial in self.trials.values():
            try:
                load_config(self.config.experiment, self._overrides(trial, self.rungs[0]))
                return
            except UserError as error:
                first = first or error
        if first is not None:
            raise first

    def _usable(self, row: dict[str, Any]) -> Outcome | None:
        """An earlier result, if it belongs to this sweep and was measured as it would be now."""
        trial, rung = self.trials.get(row["trial"]), row["rung"]
        if trial is None or rung >= len(self.rungs) or row.get("conditions") != self.conditions(trial, rung):
            return None
        return Outcome(**row)

    def _measure(self, trials: Sequence[Trial], rung: int, rung_overrides: Sequence[str]) -> None:
        done = {row.trial for row in self.outcomes if row.rung == rung}
        pending = [trial for trial in trials if trial.name not in done]
        if done:
            log.info("rung %d: %d of %d trials are measured already", rung, len(trials) - len(pending), len(trials))
        places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        groups = device_groups(self.config.parallel, self.config.devices_per_trial)
        for group in groups:
            places.put(group)
        started = time.monotonic()
        with ThreadPoolExecutor(len(groups)) as pool:
            running = [pool.submit(self._run_trial, trial, rung, rung_overrides, places) for trial in pending]
            try:
                for finished, future in enumerate(as_completed(running), start=1):
                    self._record(future.result())
                    left = (time.monotonic() - started) / finished * (len(pending) - finished)
                    log.info("rung %d: %d of %d trials, about %.0f s left", rung, finished, len(pending), left)
            except BaseException:
                self._stop.set()  # before the pool waits for its threads, which end their trials
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        append_json_line(self.results, outcome.to_row())
        self._write_ranking(plots=False)
        row = {name: value for name, value in outcome.to_row().items() if value is not None}
        settings = {f"settings/{name}": value for name, value in self.trials[outcome.trial].settings}
        self._trackers.log({**row, **settings}, len(self.outcomes))
        speed = outcome.clips_per_second_per_device
        figure = f"{speed:.2f} clips/s/device" if speed is not None else f"{outcome.cause}: {outcome.message}"
        log.info("%s: %s", self.trials[outcome.trial].label(), figure)

    def _accelerate(self, trial: Trial) -> Path | None:
        name = trial.accelerate or self.config.accelerate
        return None if name is None else Path(name)

    def _overrides(self, trial: Trial, rung_overrides: Sequence[str]) -> list[str]:
        return [*ALWAYS, *self.config.overrides, *rung_overrides, *trial.overrides()]

    def _environment(self, trial: Trial) -> dict[str, str]:
        return {**dict(self.config.environment), **trial.environment}

    def _run_trial(
        self, trial: Trial, rung: int, rung_overrides: Sequence[str], places: queue.SimpleQueue[dict[str, str]]
    ) -> Outcome:
        place = places.get()
        try:
            return self._measure_trial(trial, rung, rung_overrides, place)
        finally:
            places.put(place)

    def _measure_trial(self, trial: Trial, rung: int, rung_overrides: Sequence[str], place: dict[str, str]) -> Outcome:
        attempt = f"{trial.name}_rung{rung}_{int(time.time() * 1000)}"
        run_folder = (self.folder / "trials" / attempt).resolve()
        log_path = run_folder.with_suffix(".log")
        limits = self.config.limits
        try:
            result = run_limited(
                self.command(trial, rung_overrides, run_folder),
                folder=Path.cwd(),
                environment={**self._environment(trial), **place},
                log=log_path,
                seconds=limits.seconds,
                memory_bytes=None if limits.memory_gib is None else int(limits.memory_gib * 2**30),
                stop=self._stop,
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
            "conditions": self.conditions(trial, rung),
            "host_memory_bytes": result.peak_resident_bytes,
        }
        if cause != "ok":
            return Outcome(**common, cause=cause, message=self._passed_limit(result) or telling_line(output))
        try:
            figures = read_figures(run_folder, epoch_clips=self.config.epoch_clips)
        except (ValueError, KeyError) as error:
            return Outcome(**common, cause="crash", message=f"exit code 0 without figures: {error}")
        return Outcome(**common, cause="ok", **figures)

    def _passed_limit(self, result: ProcessResult) -> str:
        """Which limit ended a trial; empty where none did."""
        limits = self.config.limits
        if result.over_memory:
            return f"{result.peak_resident_bytes / 2**30:.2f} GiB resident; limits.memory_gib is {limits.memory_gib:g}"
        return f"stopped after limits.seconds, {limits.seconds:g}" if result.timed_out else ""

    def _write_ranking(self, *, plots: bool) -> Path:
        config, total = self.config, len(self.trials)
        kinds = "successive halving" if config.search == "halving" else "every trial at full length"
        measured = len({row.trial for row in self.outcomes})
        note = (
            f"{total} settings of {Path(config.experiment).name}, {kinds}; {measured} measured."
            f" Speeds exclude warm-up steps; GPU-hours per epoch are projections to {config.epoch_clips:,} clips"
            " from these short runs."
        )
        return write_ranking(self.folder, config.name, self.outcomes, self.trials, note, plots=plots)
