"""The winner of a sweep as files: an experiment config and an Accelerate config that train.py accepts as they are."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from frozen_fast.common.files import write_atomically
from frozen_fast.config import dump_yaml, load_config
from frozen_fast.sweep.space import Trial

log = logging.getLogger(__name__)


def write_winner(
    folder: Path, experiment: Path, trial: Trial, accelerate_of: Callable[[Trial], Path | None]
) -> tuple[Path, Path | None]:
    """Write winner.yaml and, where the trial had an Accelerate config, winner_accelerate.yaml.

    The experiment keeps its own length and data: only the trial's settings are applied, not the overrides
    that shortened the measurement.

    Args:
        folder: the sweep's folder.
        experiment: the experiment file that the sweep started from.
        trial: the winning settings.
        accelerate_of: the Accelerate config file of a trial.

    Returns:
        The two paths (the second None where the sweep used no Accelerate config).
    """
    config = load_config(experiment, trial.overrides())
    experiment_path = folder / "winner.yaml"
    write_atomically(experiment_path, f"# Winner of a sweep: {trial.label()}\n{dump_yaml(config)}")
    source = accelerate_of(trial)
    accelerate_path = None
    command = f"accelerate launch train.py --config {experiment_path}"
    if source is not None:
        accelerate_path = folder / "winner_accelerate.yaml"
        shutil.copyfile(source, accelerate_path)
        command = f"accelerate launch --config_file {accelerate_path} train.py --config {experiment_path}"
    log.info("winner: %s", trial.label())
    log.info("train with it: %s", command)
    return experiment_path, accelerate_path
