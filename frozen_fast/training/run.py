"""A training run: from a config to a finished run folder and an exit code."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frozen_fast.common.files import write_json
from frozen_fast.common.logs import set_up_logging
from frozen_fast.common.secrets import without_secrets
from frozen_fast.config import (
    ExperimentConfig,
    config_from_mapping,
    dump_yaml,
    loss_batch_size,
    resolve_stages,
    to_plain,
)
from frozen_fast.errors import UserError
from frozen_fast.evaluation.spread import spread_over
from frozen_fast.optimizers import build_optimizer, divergence_advice
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.start import start_parallel
from frozen_fast.profiling.energy import energy_meter
from frozen_fast.profiling.peak import device_peak, measure_peak
from frozen_fast.records import environment
from frozen_fast.records.checkpoint import RunState, read_state, read_tensors, write_state
from frozen_fast.records.checkpoint_folder import Survey, remove_leftovers, set_aside, survey
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.run_lock import RunLock
from frozen_fast.records.same_run import check_same_run
from frozen_fast.records.tracking import Trackers
from frozen_fast.report.gallery import GalleryPage, write_gallery
from frozen_fast.report.write_report import write_report
from frozen_fast.training import compiling
from frozen_fast.training.batch_parts import DeviceMemoryError
from frozen_fast.training.determinism import deterministic_operators
from frozen_fast.training.engine import Engine
from frozen_fast.training.extension import check_extension, extension_keys, with_finished_steps
from frozen_fast.training.journal import Journal
from frozen_fast.training.non_finite import NonFiniteSteps, NotFiniteError
from frozen_fast.training.parts import (
    build_model,
    build_training_loader,
    check_stage_frames,
    described_model,
    described_sources,
    fingerprint,
    flops_counter,
    load_model,
    read_evaluation_sources,
    read_training_sources,
)
from frozen_fast.training.resume_choice import find_checkpoint
from frozen_fast.training.run_parts import RunParts
from frozen_fast.training.signals import StopRequest
from frozen_fast.training.task import build_task
from frozen_fast.training.teachers import build_teachers
from frozen_fast.training.watchdog import Watchdog, switch_on_flight_recorder

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


def train(config: ExperimentConfig, *, resume: str = "none") -> int:
    """Train as a validated config says; every process of a launch calls this.

    Args:
        config: the experiment.
        resume: "none": start a new run; "auto": resume from the run folder's newest checkpoint if there is one;
            "extend": likewise, with more steps in the last stage (training.extension); or a checkpoint folder.

    Returns:
        0 when the run is complete, 75 when SIGTERM or SIGINT stopped it after a checkpoint.

    Raises:
        UserError: a mistake in config, data or launch, bad clips past their share, a loss that is not finite.
    """
    switch_on_flight_recorder(RunFolder(config.run_folder.format(name=config.name)).hangs)
    parallel = start_parallel(config)
    set_up_logging(rank=parallel.rank)
    run = _Run(config, parallel)
    failed, at_once = True, False
    try:
        with StopRequest() as stop, deterministic_operators(config.training.deterministic):
            code = run.train(resume, stop)
        failed = False
        return code
    except BaseException as error:
        own = not isinstance(error, UserError) or isinstance(error, DeviceMemoryError)
        failed = own and not parallel.failure_is_shared
        at_once = isinstance(error, KeyboardInterrupt)
        run.note_failure(error)
        raise
    finally:
        run.close(at_once=at_once)
        parallel.close(failed=failed)


def evaluate_checkpoint(config: ExperimentConfig, checkpoint: str, output: str | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint on the config's evaluation sources; every process of a launch calls this.

    Retrieval pages (evaluation.gallery) are written beside `output`, or into the config's run folder.

    Args:
        config: its evaluation, data.decode and training sections are used; the architecture is the checkpoint's.
        checkpoint: a frozen_fast folder or a released .pth/.pth.tar file.
        output: JSON file to write, from rank 0.

    Returns:
        {"checkpoint", "evaluations": [as in metrics.json, without step and stage]}; with evaluation.average_sources
        also "mean_over_sources", as spread_over by protocol; on rank 0 with evaluation.gallery also "galleries", the
        paths of the retrieval pages.

    Raises:
        UserError: a mistake in config, checkpoint or data, or a signal stopped it.
    """
    parallel = start_parallel(config)
    set_up_logging(rank=parallel.rank)
    failed = True
    try:
        with StopRequest() as stop:
            with parallel.together():
                sources = read_evaluation_sources(config)
                model = load_model(config, Path(checkpoint), parallel.device)
                task = build_task(config)
            rows: list[dict[str, Any]] = []
            pages: list[GalleryPage] = []
            for source in sources.values():
                found = task.evaluate(
                    model,
                    source,
                    parallel,
                    frames=model.learned_frames,
                    loss_batch_size=loss_batch_size(config),
                    gallery=True,
                    stop=stop,
                )
                if found is None:
                    raise KeyboardInterrupt
                rows += found.rows
                pages += [] if found.gallery is None else [found.gallery]
            result: dict[str, Any] = {"checkpoint": checkpoint, "evaluations": rows}
            if config.evaluation.average_sources:
                result["mean_over_sources"] = spread_over(rows, ("protocol",))
            with parallel.together():
                if pages:
                    folder = Path(output).parent if output else Path(config.run_folder.format(name=config.name))
                    videos = config.evaluation.gallery_videos
                    root = Path(videos).expanduser() if videos else None
                    result["galleries"] = [str(write_gallery(folder, page, root)) for page in pages]
                if output is not None and parallel.is_main:
                    try:
                        write_json(Path(output), result)
                    except OSError as error:
                        got = f"got {output!r}; allowed: a file that can be written ({error})"
                        raise UserError(f"--output: {got}") from None
        failed = False
        return result
    except UserError:
        failed = False
        raise
    finally:
        parallel.close(failed=failed)


@dataclass(frozen=True)
class _Start:
    """Where training starts.

    Attributes:
        checkpoint: the checkpoint to load; None: start at the first step.
        state: the checkpoint's state.
        closed_stages: stages that have been evaluated and are in stages.json.
    """

    checkpoint: Path | None
    state: RunState | None
    closed_stages: int


class _Run:
    """One run from its folder to its report."""

    def __init__(self, config: ExperimentConfig, parallel: Parallel) -> None:
        self._config, self._parallel = config, parallel
        self._folder = RunFolder(config.run_folder.format(name=config.name))
        self._lock = RunLock(self._folder)
        self._owned = False
        self._extending = False
        self._finished: dict[int, int] = {}
        self._engine: Engine | None = None
        self._watchdog = Watchdog(config.watchdog, folder=self._folder.hangs, rank=parallel.rank, note=self._note_hang)
        self._journal: Journal | None = None
        self._trackers: Trackers | None = None
        self._origin: Path | None = None
        self._roll_backs = 0

    def train(self, resume: str, stop: StopRequest) -> int:
        """Prepare, run and report; return the exit code."""
        self._extending = resume == "extend"
        log.info("precision %s: %s", self._parallel.precision, self._parallel.precision_reason)
        start = self._cut_folder_back(self._take_folder(resume))
        self._origin = start.checkpoint
        ranks = self._parallel.gather_objects((socket.gethostname(), os.getpid()))
        with self._parallel.together(), self._folder.must_be_writable():
            self._watchdog.start(ranks)
        while True:
            try:
                complete = self._train_from(start, stop)
                break
            except NotFiniteError as error:
                if self._config.training.on_non_finite != "roll_back":
                    raise
                if self._roll_backs >= self._config.training.max_roll_backs:
                    often = f"rolled back {self._roll_backs} times already (training.max_roll_backs)"
                    raise NotFiniteError(f"{error}; {often}") from error
                why = str(error)
            start = self._roll_back(why)  # outside the handler, because the error's frames hold the model
        self._finish(complete)
        return EXIT_DONE if complete else EXIT_STOPPED

    def _train_from(self, start: _Start, stop: StopRequest) -> bool:
        """Build the parts and run the stages; return False if told to stop."""
        config, parallel, folder = self._config, self._parallel, self._folder
        with self._watchdog.phase("start"):
            parts = self._build(start.checkpoint, start.state)
        self._watchdog.loader_state = parts.loader.state
        if self._trackers is None:
            self._trackers = Trackers()
            with parallel.together():
                if parallel.is_main:
                    self._trackers = Trackers.start(
                        config.tracking,
                        name=config.name,
                        config=config,
                        folder=folder.path,
                        step=None if start.state is None else start.state.step,
                    )
        self._journal = Journal(
            folder,
            parallel,
            self._trackers,
            total_steps=parts.total_steps,
            num_stages=len(parts.plans),
            log_every_steps=config.training.log_every_steps,
            non_finite=NonFiniteSteps(config.training, folder, parallel, divergence_advice(config.optimizer)),
        )
        self._engine = Engine(config, parallel, folder, parts, self._journal, stop, start.state)
        return self._engine.run(start.state, closed_stages=start.closed_stages)

    def _roll_back(self, why: str) -> _Start:
        """Go back to the last checkpoint, or to the first step if there is none; every rank calls this.

        Args:
            why: what was not finite.
        """
        parallel, folder = self._parallel, self._folder
        assert self._engine is not None and self._journal is not None
        self._engine.keeper.close()
        self._journal.close()
        self._engine = self._journal = None
        self._watchdog.loader_state = lambda: "no loader yet"
        parallel.release()
        self._roll_backs += 1
        found = Survey(None, {})
        with parallel.together():
            if parallel.is_main:
                found = survey(folder.checkpoints)
                if found.usable is not None:  # so that a resumed run uses the new order too
                    write_state(found.usable, replace(read_state(found.usable), rollbacks=self._roll_backs))
                else:
                    found = Survey(self._origin, found.damaged)
                to = "the first step" if found.usable is None else found.usable.name
                message = f"{why}; back to {to}, with another order of the clips"
                log.warning("roll-back %d: %s", self._roll_backs, message)
                folder.append_event("roll_back", message)
        return self._cut_folder_back(found)

    def note_failure(self, error: BaseException) -> None:
        """Write the error to status.json, unless another run owns the folder."""
        if not self._owned or not self._parallel.is_main:
            return
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_ERROR
        code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else code
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        try:
            self._write_status("failed", exit_code=code, message=message)
        except OSError as second:
            log.warning("status.json could not be written: %s", second)

    def _note_hang(self, message: str) -> None:
        if self._parallel.is_main:
            self._write_status("failed", exit_code=EXIT_ERROR, message=message)
            self._folder.append_event("hang", message)

    def close(self, *, at_once: bool) -> None:
        """Close the writers, and unlock the folder.

        Args:
            at_once: do not wait for a checkpoint that is being written.
        """
        self._watchdog.close()
        if self._engine is not None and not at_once:
            self._engine.keeper.close()
        if self._journal is not None:
            self._journal.close()
        if self._trackers is not None:
            self._trackers.close()
        self._lock.release()

    def _take_folder(self, resume: str) -> Survey:
        """Lock the folder and choose the checkpoint; empty on ranks other than 0."""
        parallel, folder = self._parallel, self._folder
        found = Survey(None, {})
        with parallel.together():
            if parallel.is_main:
                if resume not in ("auto", "extend"):  # a mistake must not create a folder
                    found = find_checkpoint(folder, resume)
                folder.create()
                self._lock.acquire()
                if resume in ("auto", "extend"):
                    found = find_checkpoint(folder, "auto")
        return found

    def _cut_folder_back(self, found: Survey) -> _Start:
        """Truncate the folder's files to a checkpoint, on rank 0."""
        config, parallel, folder = self._config, self._parallel, self._folder
        checkpoint = parallel.gather_objects(found.usable)[0]
        state: RunState | None = None
        closed, finished = 0, dict[int, int]()
        with parallel.together(), folder.must_be_writable():
            if checkpoint is not None:
                state = read_state(checkpoint)
                saved = to_plain(config_from_mapping(state.config))  # old names and keys added since included
                longer = extension_keys(saved) if self._extending else ()
                for change in check_same_run(without_secrets(saved), without_secrets(to_plain(config)), also=longer):
                    log.info("resuming with another %s", change)
            if self._extending:
                check_extension(state, len(config.curriculum.stages))
            if parallel.is_main:
                self._owned = True
                events = folder.repair() + set_aside(found.damaged)
                remove_leftovers(folder.checkpoints)
                if state is None:
                    if folder.holds_a_run():
                        log.warning("%s contains steps but no checkpoint: starting at step 1", folder.path)
                    folder.cut_back(0, 0, stage_complete=False)
                else:
                    folder.cut_back(
                        state.step, state.stage, stage_complete=state.stage_complete, evaluated=state.evaluated
                    )
                    rows = folder.stage_rows()
                    closed = state.stage
                    if self._extending:
                        folder.append_event("extended", f"the run continues after step {state.step}", step=state.step)
                    else:
                        closed += any(row["stage"] == state.stage for row in rows)
                    finished = {row["stage"]: row["steps"] for row in rows if row["stage"] < closed}
                for event in events:
                    folder.append_event("damage", event)
                folder.write_config(dump_yaml(config))
                self._write_status("running", checkpoint=None if state is None else state.step)
        if checkpoint is not None and state is not None:
            log.info("resuming from %s", checkpoint)
            if state.world_size != parallel.world_size:
                log.warning(
                    "resuming on %d processes instead of %d: the same clips in the same steps, but not bit-identical",
                    parallel.world_size,
                    state.world_size,
                )
            self._roll_backs = max(self._roll_backs, state.rollbacks)
        closed, self._finished = parallel.gather_objects((closed, finished))[0]
        return _Start(checkpoint, state, closed)

    def _build(self, checkpoint: Path | None, state: RunState | None) -> RunParts:
        """Read the sources, plan the stages, build model, optimizer and loader."""
        config, parallel = self._config, self._parallel
        devices = parallel.gather_objects(environment.device_description(parallel.device))
        with parallel.together():
            if parallel.is_main:
                described = environment.describe(
                    devices=devices,
                    world_size=parallel.world_size,
                    distributed_type=parallel.distributed_type,
                    precision=parallel.precision,
                    precision_reason=parallel.precision_reason,
                )
                self._folder.update_environment(**described, strategy=parallel.strategy)
            sources = read_training_sources(config)
            evaluation_sources = read_evaluation_sources(config) if config.evaluation.every != "never" else {}
            fingerprints = {name: fingerprint(source) for name, source in sources.items()}
            if parallel.is_main:
                self._folder.update_environment(
                    sources=described_sources(sources), evaluation_sources=described_sources(evaluation_sources)
                )
            if state is not None:
                _check_same_clips(state.sources, fingerprints)
            plans = resolve_stages(
                config,
                {name: len(source) for name, source in sources.items()},
                parallel.world_size,
                image_sources=[name for name, source in sources.items() if source.kind == "image"],
            )
            plans = with_finished_steps(plans, self._finished, state, extending=self._extending)
            check_stage_frames(config.model, plans)
            task = build_task(_without_cache(config))
            sources = task.training_sources(sources)
            model = build_model(config, parallel.device, resume_from=checkpoint, sources=sources)
            optimizer = build_optimizer(model, config.optimizer)
            frames = {number for plan in plans for number in plan.source_frames.values()}
            flops_per_clip = flops_counter(model, frames)
            if parallel.is_main:
                self._folder.update_environment(model=described_model(model))
            loader = build_training_loader(config, sources, model, parallel.device)
            teachers = build_teachers(config, model, parallel.device)
            if config.training.compile:
                compiling.compile_towers(model)
        parallel.prepare(model, optimizer)
        if checkpoint is not None:
            with parallel.together():
                parallel.state.load_optimizer_state(read_tensors(checkpoint)[1])
        wanted = config.training.measure_peak
        measured = wanted == "on" or (wanted == "auto" and parallel.device.type == "cuda")
        energy, reason = energy_meter(parallel.device)
        log.info("energy: %s", reason)
        with parallel.together():
            if parallel.is_main:
                self._folder.update_environment(energy=reason)
        return RunParts(
            model=model,
            task=task,
            sources=sources,
            evaluation_sources=evaluation_sources,
            fingerprints=fingerprints,
            loader=loader,
            plans=plans,
            flops_per_clip=flops_per_clip,
            peak=device_peak(devices[0], parallel.precision),
            measured_peak=measure_peak(parallel.device, parallel.precision) if measured else None,
            energy=energy,
            teachers=teachers,
            watchdog=self._watchdog,
            roll_backs=self._roll_backs,
        )

    def _finish(self, complete: bool) -> None:
        """Wait for the final checkpoint, write the final status and the report."""
        assert self._engine is not None
        self._engine.keeper.finish(stopped=not complete)
        with self._parallel.together():
            if self._parallel.is_main:
                refused = self._folder.write_pending()
                if refused:
                    names = ", ".join(path.name for path in refused)
                    log.warning("%s could not be written to the end: the disk of %s refuses", names, self._folder.path)
                if complete:
                    self._write_status("done", exit_code=EXIT_DONE)
                else:
                    message = "stopped by a signal after a checkpoint; --resume auto continues"
                    self._write_status("stopped", exit_code=EXIT_STOPPED, message=message)
                self._report()

    def _report(self) -> None:
        """Write the report; a failure is logged only, because the results are on disk already."""
        try:
            log.info("report: %s", write_report(self._folder.path)[1])
        except Exception as error:  # noqa: BLE001  whatever fails in a report, the run has not failed
            log.warning(
                "the report could not be written (%s: %s); `frozen-fast report %s` writes it later",
                type(error).__name__,
                error,
                self._folder.path,
            )

    def _write_status(
        self, state: str, *, exit_code: int | None = None, message: str = "", checkpoint: int | None = None
    ) -> None:
        step, stage = (0, 0) if self._engine is None else (self._engine.step, self._engine.stage)
        self._folder.write_status(
            state, step=step, stage=stage, exit_code=exit_code, message=message, checkpoint=checkpoint
        )


def _without_cache(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config for evaluations inside a run, without the cache, because the weights change."""
    return replace(config, evaluation=replace(config.evaluation, embedding_cache=None))


def _check_same_clips(saved: dict[str, str], current: dict[str, str]) -> None:
    for name, mark in current.items():
        if saved.get(name) != mark:
            raise UserError(
                f"data.sources: source {name!r} holds {mark}, but the run started with {saved.get(name)}; "
                "allowed: the same clips in the same order, or another run_folder"
            )
