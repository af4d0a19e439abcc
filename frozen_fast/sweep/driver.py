"""The sweep itself: trials into free places, results into results.jsonl as they come, a ranking at the end."""

from __future__ import annotations

import logging
import queue
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

from frozen_fast.common.files import append_json_line, read_json_lines
from frozen_fast.sweep.config import SweepConfig
from frozen_fast.sweep.devices import device_groups
from frozen_fast.sweep.outcome import Outcome, classify, read_figures, telling_line
from frozen_fast.sweep.process import free_port, run_limited
from frozen_fast.sweep.ranking import rank, write_ranking
from frozen_fast.sweep.space import Trial, draw_trials, enumerate_trials, survivors
from frozen_fast.sweep.winner import write_winner

log = logging.getLogger(__name__)


class Sweep:
    """One sweep over the settings of a file; a second call goes on where the first was stopped.

    Args:
        config: the sweep file.
        base: folder that the sweep file's paths are relative to.
        folder: where results go.
        train_script: train.py, which every trial starts.
    """

    def __init__(self, config: SweepConfig, *, base: Path, folder: Path, train_script: Path) -> None:
        self.config = config
        self.folder = folder
        self.base = base
        self.train_script = train_script
        axes = {name: list(values) for name, values in config.axes}
        everything = enumerate_trials(axes, [dict(trial) for trial in config.trials])
        self.trials = {trial.name: trial for trial in draw_trials(everything, config.max_trials, config.seed)}
        self.results = folder / "results.jsonl"
        self.outcomes = [Outcome(**row) for row in read_json_lines(self.results) if row["trial"] in self.trials]
        self._writing = threading.Lock()

    def run(self) -> Outcome | None:
        """Measure what is not measured yet, write the ranking and the winner; return the winner, None if all failed."""
        rungs = self.config.rungs if self.config.search == "halving" else ((),)
        names = list(self.trials)
        for index, rung_overrides in enumerate(rungs):
            self._measure([self.trials[name] for name in names], index, rung_overrides)
            of_rung = {row.trial: row for row in self.outcomes if row.rung == index}
            names = survivors(
                {name: of_rung[name].clips_per_second_per_device for name in names}, self.config.keep_share
            )
        self._write_ranking()
        best = rank(self.outcomes)[:1]
        if not best or best[0].cause != "ok":
            return None
        write_winner(self.folder, self.base / self.config.experiment, self.trials[best[0].trial], self._accelerate)
        return best[0]

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
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _record(self, outcome: Outcome) -> None:
        with self._writing:
            self.outcomes.append(outcome)
            append_json_line(self.results, outcome.to_row())
        speed = outcome.clips_per_second_per_device
        figure = f"{speed:.2f} clips/s/device" if speed is not None else f"{outcome.cause}: {outcome.message}"
        log.info("%s: %s", self.trials[outcome.trial].label(), figure)

    def _accelerate(self, trial: Trial) -> Path | None:
        name = trial.accelerate or self.config.accelerate
        return None if name is None else (self.base / name).resolve()

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
            str(self.train_script),
            "--config",
            str((self.base / self.config.experiment).resolve()),
            f"run_folder={run_folder}",
            *self.config.overrides,
            *rung_overrides,
            *trial.overrides(),
        ]

    def print_commands(self, out: TextIO) -> None:
        """Write every trial's command line of the first rung, shell-quoted."""
        first = self.config.rungs[0] if self.config.search == "halving" else ()
        for trial in self.trials.values():
            command = self.command(trial, first, self.folder / "trials" / trial.name)
            out.write(f"# {trial.label()}\n{shlex.join(command)}\n")

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
        result = run_limited(
            self.command(trial, rung_overrides, run_folder),
            folder=Path.cwd(),
            environment={**dict(self.config.environment), **place},
            log=log_path,
            seconds=limits.seconds,
            memory_bytes=None if limits.memory_gib is None else int(limits.memory_gib * 2**30),
        )
        output = log_path.read_text(errors="replace")
        cause = classify(result.exit_code, output, timed_out=result.timed_out, over_memory=result.over_memory)
        common: dict[str, Any] = {"trial": trial.name, "rung": rung, "seconds": result.seconds}
        if cause != "ok":
            limit = {
                "timeout": f"limits.seconds={limits.seconds:g}",
                "out_of_memory": f"limits.memory_gib={limits.memory_gib}",
            }
            passed = limit[cause] if (result.timed_out or result.over_memory) else telling_line(output)
            return Outcome(**common, cause=cause, message=passed)
        try:
            figures = read_figures(run_folder, epoch_clips=self.config.epoch_clips)
        except (ValueError, KeyError) as error:
            return Outcome(**common, cause="crash", message=f"exit code 0 without figures: {error}")
        return Outcome(**common, cause="ok", **figures)

    def _write_ranking(self) -> None:
        kinds = "successive halving" if self.config.search == "halving" else "every trial at full length"
        note = (
            f"{len(self.trials)} settings of {self.config.experiment}, {kinds}. Speeds exclude warm-up steps;"
            f" GPU-hours per epoch are projections to {self.config.epoch_clips:,} clips from these short runs."
        )
        path = write_ranking(self.folder, self.config.name, self.outcomes, self.trials, note)
        log.info("ranking: %s", path)
