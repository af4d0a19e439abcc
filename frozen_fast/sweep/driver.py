"""The sweep itself: trials on free devices, results into results.jsonl as they come, a ranking at the end."""

from __future__ import annotations

import logging
import queue
import shlex
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TextIO

from frozen_fast.common.files import append_json_line
from frozen_fast.config import load_config
from frozen_fast.errors import UserError
from frozen_fast.records.tracking import Trackers
from frozen_fast.sweep.devices import device_groups
from frozen_fast.sweep.outcome import Cause, Outcome, whole_lines
from frozen_fast.sweep.ranking import rank, write_ranking
from frozen_fast.sweep.space import Trial, draw_trials, enumerate_trials, survivors
from frozen_fast.sweep.sweep_file import SweepConfig
from frozen_fast.sweep.trial_runner import TrialRunner
from frozen_fast.sweep.winner import write_winner

log = logging.getLogger(__name__)


class Sweep:
    """One sweep over the settings of a file; a second call continues where the first was stopped.

    Args:
        config: the sweep file, its paths absolute.
        folder: where results go.
        train_script: train.py, which every trial starts.
        again: causes of failure whose trials are measured once more.

    Raises:
        UserError: the experiment cannot be read, a listed trial cannot run, or no trial can.
    """

    def __init__(self, config: SweepConfig, *, folder: Path, train_script: Path, again: Collection[Cause] = ()) -> None:
        self.config = config
        self.folder = folder
        self.runner = TrialRunner(config, folder=folder, train_script=train_script)
        axes = {name: list(values) for name, values in config.axes}
        product = draw_trials(enumerate_trials(axes, []), config.max_trials, config.seed)
        listed = enumerate_trials({}, [dict(trial) for trial in config.trials])
        self.trials = {trial.name: trial for trial in (*product, *listed)}
        self.rungs = config.rungs if config.search == "halving" else ((),)
        self._check_trials({trial.name for trial in listed})
        self.results = folder / "results.jsonl"
        self.outcomes: list[Outcome] = []
        for row in whole_lines(self.results):
            trial, rung = self.trials.get(row["trial"]), row["rung"]
            measured_alike = (
                trial is not None
                and rung < len(self.rungs)
                and row.get("conditions") == self.runner.conditions(trial, self.rungs[rung])
            )
            if measured_alike and row["cause"] not in again:
                self.outcomes.append(Outcome(**row))
        self._stop = threading.Event()
        self._trackers = Trackers()
        self._train_script = train_script

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
            self.runner.accelerate_file(winner),
            self.runner.environment(winner),
            self._train_script,
        )
        return best[0]

    def print_commands(self, out: TextIO) -> None:
        """Write every trial's command line of the first rung, shell-quoted, with the variables it sets."""
        for trial in self.trials.values():
            command = self.runner.command(trial, self.rungs[0], self.runner.folder / trial.name)
            variables = [f"{name}={shlex.quote(value)} " for name, value in self.runner.environment(trial).items()]
            out.write(f"# {trial.label()}\n{''.join(variables)}{shlex.join(command)}\n")

    def _check_trials(self, listed: Collection[str]) -> None:
        """Refuse a listed trial that cannot run, and a product of axes of which no trial can."""
        refused: UserError | None = None
        usable = False
        for name in sorted(self.trials, key=lambda name: name not in listed):
            if usable and name not in listed:
                return
            try:
                load_config(self.config.experiment, self.runner.overrides(self.trials[name], self.rungs[0]))
                usable = True
            except UserError as error:
                if name in listed:
                    raise UserError(f"trials: {error}") from None
                refused = refused or error
        if refused is not None and not usable:
            raise refused

    def _measure(self, trials: Sequence[Trial], rung: int, rung_overrides: Sequence[str]) -> None:
        """Measure the trials of a rung that have no result yet, as many at a time as there are groups of devices."""
        done = {row.trial for row in self.outcomes if row.rung == rung}
        pending = [trial for trial in trials if trial.name not in done]
        if done:
            log.info("rung %d: %d of %d trials are measured already", rung, len(trials) - len(pending), len(trials))
        free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        groups = device_groups(self.config.parallel, self.config.devices_per_trial)
        for group in groups:
            free.put(group)

        def measure_on_free_devices(trial: Trial) -> Outcome:
            devices = free.get()
            try:
                return self.runner.measure(trial, rung, rung_overrides, devices=devices, stop=self._stop)
            finally:
                free.put(devices)

        started = time.monotonic()
        with ThreadPoolExecutor(len(groups)) as pool:
            running = [pool.submit(measure_on_free_devices, trial) for trial in pending]
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
        """Keep a result: in results.jsonl, in the ranking, at the trackers and in the log."""
        self.outcomes.append(outcome)
        append_json_line(self.results, outcome.to_row())
        self._write_ranking(plots=False)
        row = {name: value for name, value in outcome.to_row().items() if value is not None}
        settings = {f"settings/{name}": value for name, value in self.trials[outcome.trial].settings}
        self._trackers.log({**row, **settings}, len(self.outcomes))
        speed = outcome.clips_per_second_per_device
        figure = f"{speed:.2f} clips/s/device" if speed is not None else f"{outcome.cause}: {outcome.message}"
        log.info("%s: %s", self.trials[outcome.trial].label(), figure)

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
