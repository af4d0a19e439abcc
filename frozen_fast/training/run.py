"""A whole run: from a config to a finished run folder and an exit code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from frozen_fast.common.files import write_atomically, write_json
from frozen_fast.common.logs import set_up_logging
from frozen_fast.config import (
    ExperimentConfig,
    config_from_mapping,
    dump_yaml,
    loss_batch_size,
    resolve_stages,
    to_plain,
)
from frozen_fast.errors import UserError
from frozen_fast.losses import build_loss
from frozen_fast.optimizers import build_optimizer, divergence_advice
from frozen_fast.parallel.base import Parallel
from frozen_fast.profiling.energy import energy_meter
from frozen_fast.profiling.peak import device_peak
from frozen_fast.records import environment
from frozen_fast.records.checkpoint import (
    RunState,
    check_same_run,
    newest_checkpoint,
    read_state,
    read_tensors,
    remove_leftovers,
)
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.tracking import Trackers
from frozen_fast.report.write_report import write_report
from frozen_fast.training import compiling
from frozen_fast.training.engine import Engine, RunParts
from frozen_fast.training.evaluate import evaluate_with
from frozen_fast.training.journal import Journal
from frozen_fast.training.parts import (
    build_model,
    build_training_loader,
    described_sources,
    fingerprint,
    flops_counter,
    load_model,
    read_evaluation_sources,
    read_training_sources,
)
from frozen_fast.training.signals import StopRequest

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


def train(config: ExperimentConfig, *, resume: str = "none") -> int:
    """Train as a checked config says; every process of a launch calls it.

    Args:
        config: the experiment.
        resume: "none": start anew; "auto": go on from the run folder's newest checkpoint if there is one; or a
            checkpoint folder.

    Returns:
        0 when the run is complete, 75 when SIGTERM or SIGINT stopped it after a checkpoint.

    Raises:
        UserError: a mistake in config, data or launch, bad clips past their share, a loss that is not finite.
    """
    parallel = Parallel.start(config)
    set_up_logging(rank=parallel.rank)
    run = _Run(config, parallel)
    failed = True
    try:
        with StopRequest() as stop:
            code = run.train(resume, stop)
        failed = False
        return code
    except BaseException as error:
        failed = not (parallel.failure_is_shared or isinstance(error, UserError))
        run.note_failure(error)
        raise
    finally:
        run.close()
        parallel.close(failed=failed)


def evaluate_checkpoint(config: ExperimentConfig, checkpoint: str, output: str | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint on the config's evaluation sources; every process of a launch calls it.

    Args:
        config: its evaluation, data.decode and training sections count; the architecture is the checkpoint's.
        checkpoint: a frozen_fast folder or a released .pth/.pth.tar file.
        output: JSON file to write, from rank 0.

    Returns:
        {"checkpoint", "evaluations": [as in metrics.json, without step and stage]}.

    Raises:
        UserError: a mistake in config, checkpoint or data, or a signal stopped it.
    """
    parallel = Parallel.start(config)
    set_up_logging(rank=parallel.rank)
    failed = True
    try:
        with StopRequest() as stop:
            with parallel.together():
                sources = read_evaluation_sources(config)
                model = load_model(config, Path(checkpoint), parallel.device)
            rows: list[dict[str, Any]] = []
            for source in sources.values():
                found = evaluate_with(
                    config, model, source, parallel,
                    frames=model.learned_frames, loss_batch_size=loss_batch_size(config), stop=stop,
                )  # fmt: skip
                if found is None:
                    raise KeyboardInterrupt
                rows += found.rows
            result = {"checkpoint": checkpoint, "evaluations": rows}
            with parallel.together():
                if output is not None and parallel.is_main:
                    write_json(Path(output), result)
        failed = False
        return result
    except UserError:
        failed = False
        raise
    finally:
        parallel.close(failed=failed)


class _Run:
    """One run from its folder to its report."""

    def __init__(self, config: ExperimentConfig, parallel: Parallel) -> None:
        self._config, self._parallel = config, parallel
        self._folder = RunFolder(config.run_folder.format(name=config.name))
        self._owned = False
        self._engine: Engine | None = None
        self._journal: Journal | None = None
        self._trackers = Trackers()

    def train(self, resume: str, stop: StopRequest) -> int:
        """Prepare, run, report; returns the exit code."""
        config, parallel, folder = self._config, self._parallel, self._folder
        log.info("precision %s: %s", parallel.precision, parallel.precision_reason)
        checkpoint, state, closed = self._prepare_folder(resume)
        parts = self._build(checkpoint, state)
        with parallel.together():
            if parallel.is_main:
                self._trackers = Trackers.start(
                    config.tracking, name=config.name, config=config, folder=folder.path,
                    step=None if state is None else state.step,
                )  # fmt: skip
        self._journal = Journal(
            folder,
            parallel,
            self._trackers,
            total_steps=sum(plan.steps for plan in parts.plans),
            num_stages=len(parts.plans),
            log_every_steps=config.training.log_every_steps,
            advice=divergence_advice(config.optimizer),
        )
        self._engine = Engine(config, parallel, folder, parts, self._journal, stop, state)
        complete = self._engine.run(state, closed_stages=closed)
        self._finish(complete)
        return EXIT_DONE if complete else EXIT_STOPPED

    def note_failure(self, error: BaseException) -> None:
        """Say in status.json why the run ended, unless the folder belongs to another run."""
        if not self._owned or not self._parallel.is_main:
            return
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_ERROR
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        try:
            self._write_status("failed", exit_code=code, message=message)
        except OSError as second:
            log.warning("status.json could not be written: %s", second)

    def close(self) -> None:
        """Close what writes."""
        if self._journal is not None:
            self._journal.close()
        self._trackers.close()

    def _prepare_folder(self, resume: str) -> tuple[Path | None, RunState | None, int]:
        """Choose the checkpoint and cut the folder back to it.

        Returns:
            (checkpoint, its state, how many stages are closed: evaluated and in stages.json).
        """
        config, parallel, folder = self._config, self._parallel, self._folder
        found: Path | None = None
        with parallel.together():
            if parallel.is_main:
                found = find_checkpoint(folder, resume)
        found = parallel.gather_objects(found)[0]
        state: RunState | None = None
        closed = 0
        with parallel.together():
            if found is not None:
                state = read_state(found)
                saved = to_plain(config_from_mapping(state.config))  # old names and keys added since included
                for change in check_same_run(saved, to_plain(config)):
                    log.info("resuming with another %s", change)
            if parallel.is_main:
                folder.create()
                self._owned = True
                remove_leftovers(folder.checkpoints)
                if state is None:
                    folder.cut_back(0, 0, stage_complete=False)
                else:
                    folder.cut_back(
                        state.step, state.stage, stage_complete=state.stage_complete, evaluated=state.evaluated
                    )
                    rows = folder.stage_rows()
                    closed = state.stage + any(row["stage"] == state.stage for row in rows)
                write_atomically(folder.config, dump_yaml(config))
                self._write_status("running")
        if found is not None and state is not None:
            log.info("resuming from %s", found)
            if state.world_size != parallel.world_size:
                log.warning(
                    "resuming on %d processes instead of %d: the same clips in the same steps, but not bit for bit",
                    parallel.world_size, state.world_size,
                )  # fmt: skip
        return found, state, parallel.gather_objects(closed)[0]

    def _build(self, checkpoint: Path | None, state: RunState | None) -> RunParts:
        """Read the sources, settle the stages, build model, optimizer and loader."""
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
                write_json(self._folder.environment, {**described, "strategy": parallel.strategy})
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
            model = build_model(config, parallel.device, resume_from=checkpoint)
            optimizer = build_optimizer(model, config.optimizer)
            loader = build_training_loader(config, sources, model, parallel.device)
            if config.training.compile:
                compiling.compile_towers(model)
        parallel.prepare(model, optimizer)
        if checkpoint is not None:
            with parallel.together():
                parallel.load_optimizer_state(read_tensors(checkpoint)[1])
        energy, reason = energy_meter(parallel.device)
        log.info("energy: %s", reason)
        with parallel.together():
            if parallel.is_main:
                self._folder.update_environment(energy=reason)
        return RunParts(
            model=model,
            loss=build_loss(config.loss),
            sources=sources,
            evaluation_sources=evaluation_sources,
            fingerprints=fingerprints,
            loader=loader,
            plans=plans,
            flops_per_clip=flops_counter(model),
            peak=device_peak(devices[0], parallel.precision),
            energy=energy,
        )

    def _finish(self, complete: bool) -> None:
        """Final status and report."""
        with self._parallel.together():
            if self._parallel.is_main:
                if complete:
                    self._write_status("done", exit_code=EXIT_DONE)
                else:
                    message = "stopped by a signal after a checkpoint; --resume auto goes on"
                    self._write_status("stopped", exit_code=EXIT_STOPPED, message=message)
                log.info("report: %s", write_report(self._folder.path)[1])

    def _write_status(self, state: str, *, exit_code: int | None = None, message: str = "") -> None:
        step, stage = (0, 0) if self._engine is None else (self._engine.step, self._engine.stage)
        self._folder.write_status(state, step=step, stage=stage, exit_code=exit_code, message=message)


def find_checkpoint(folder: RunFolder, resume: str) -> Path | None:
    """What to go on from.

    Args:
        folder: the run's folder.
        resume: "none", "auto" or a checkpoint's path.

    Raises:
        UserError: there is a run that would be overwritten, or no such checkpoint.
    """
    if resume == "none":
        folder.refuse_to_overwrite()
        return None
    newest = newest_checkpoint(folder.checkpoints)
    if resume == "auto":
        return newest
    path = Path(resume).resolve() if Path(resume).is_symlink() else Path(resume)  # checkpoints/best
    if not (path / "state.json").is_file():
        raise UserError(f"--resume: got {resume!r}; allowed: none, auto, or a checkpoint folder of a run (step_...)")
    if path.resolve().parent != folder.checkpoints.resolve():
        folder.refuse_to_overwrite()
    elif newest is not None and newest.name != path.name:
        raise UserError(
            f"--resume: got {resume!r}, but this run has got to {newest.name}; allowed: auto, or another run_folder"
        )
    return path


def _check_same_clips(saved: dict[str, str], current: dict[str, str]) -> None:
    for name, mark in current.items():
        if saved.get(name) != mark:
            raise UserError(
                f"data.sources: source {name!r} holds {mark}, but the run was begun with {saved.get(name)}; "
                "allowed: the same clips in the same order, or another run_folder"
            )
