"""Accelerate's experiment trackers, each set up so that a resumed training continues its run in the tracker.

Addresses and keys come from the environment, as documented by each service.
"""

from __future__ import annotations

import re

from accelerate import tracking

from frozen_fast.records.tracking import TrackedRun, TrackerSetUp


def tensorboard(run: TrackedRun) -> TrackerSetUp:
    """TensorBoard: event files in RUN_FOLDER/tensorboard; a resumed run hides the steps that it repeats."""
    purge = {} if run.step is None else {"purge_step": run.step + 1}
    return TrackerSetUp(tracking.TensorBoardTracker("tensorboard", logging_dir=run.folder, **purge), lambda: run.id)


def wandb(run: TrackedRun) -> TrackerSetUp:
    """Weights & Biases; offline files lie in RUN_FOLDER/wandb."""
    tracker = tracking.WandBTracker(
        run.project,
        name=run.name,
        id=run.id,
        dir=str(run.folder),
        mode=run.wandb_mode,
        resume="allow" if run.wandb_mode == "online" else None,
    )
    return TrackerSetUp(tracker, lambda: run.id)


def mlflow(run: TrackedRun) -> TrackerSetUp:
    """MLflow: one experiment per project; the server chooses the run's id. Names contain no @: t2v/R_at_1."""
    tracker = tracking.MLflowTracker(run.project, run_id=run.known_id, run_name=run.name)

    def name_of(name: str) -> str:
        return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))

    return TrackerSetUp(tracker, lambda: tracker.tracker.info.run_id, takes_text=False, name_of=name_of)


def comet_ml(run: TrackedRun) -> TrackerSetUp:
    """Comet: the run's id is its experiment key."""
    tracker = tracking.CometMLTracker(run.project, experiment_key=run.id, mode="get_or_create")
    return TrackerSetUp(tracker, lambda: run.id)


def aim(run: TrackedRun) -> TrackerSetUp:
    """Aim: a repository in RUN_FOLDER; Aim chooses the run's hash."""
    tracker = tracking.AimTracker(run.name, logging_dir=run.folder, experiment=run.project, run_hash=run.known_id)
    return TrackerSetUp(tracker, lambda: tracker.tracker.hash, takes_text=False)


def clearml(run: TrackedRun) -> TrackerSetUp:
    """ClearML: the server chooses the task's id."""
    tracker = tracking.ClearMLTracker(
        run.project, project_name=run.project, task_name=run.name, continue_last_task=run.known_id or False
    )
    return TrackerSetUp(tracker, lambda: tracker.tracker.id, takes_text=False)


def dvclive(run: TrackedRun) -> TrackerSetUp:
    """DVCLive: files in RUN_FOLDER/dvclive."""
    folder = run.folder / "dvclive"
    tracker = tracking.DVCLiveTracker(run.name, dir=str(folder), resume=run.known_id is not None, save_dvc_exp=False)
    return TrackerSetUp(tracker, lambda: run.id, takes_text=False)


def swanlab(run: TrackedRun) -> TrackerSetUp:
    """SwanLab; local files lie in RUN_FOLDER/swanlab."""
    tracker = tracking.SwanLabTracker(
        run.project, experiment_name=run.name, logdir=str(run.folder / "swanlab"), id=run.id, resume="allow"
    )
    return TrackerSetUp(tracker, lambda: run.id)


def trackio(run: TrackedRun) -> TrackerSetUp:
    """Trackio: the name identifies a run, so a unique suffix is added to it."""
    name = run.known_id or f"{run.name}-{run.id[:8]}"
    return TrackerSetUp(tracking.TrackioTracker(run.project, name=name, resume="allow"), lambda: name)
