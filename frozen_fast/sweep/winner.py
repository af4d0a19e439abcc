"""The winner of a sweep as files: an experiment config and an Accelerate config that train.py accepts as they are."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from frozen_fast.common.files import write_atomically
from frozen_fast.config import dump_yaml, load_config
from frozen_fast.sweep.space import Trial

log = logging.getLogger(__name__)


def write_winner(
    folder: Path,
    experiment: Path,
    trial: Trial,
    accelerate: Path | None,
    environment: Mapping[str, str],
    train_script: Path = Path("train.py"),
) -> tuple[Path, Path | None]:
    """Write winner.yaml and, where the trial had an Accelerate config, winner_accelerate.yaml.

    The experiment keeps its own length and data: only the trial's settings are applied, not the overrides
    that shortened the measurement.

    Args:
        folder: the sweep's folder.
        experiment: the experiment file that the sweep started from.
        trial: the winning settings.
        accelerate: its Accelerate config file.
        train_script: train.py.
        environment: the variables it was measured with; they stand in the command at the top of winner.yaml.

    Returns:
        The two paths (the second None where the sweep used no Accelerate config).
    """
    config = load_config(experiment, trial.overrides())
    experiment_path = folder / "winner.yaml"
    accelerate_path = None
    words = ["accelerate", "launch"]  # with absolute paths: the command works from any folder
    if accelerate is not None:
        accelerate_path = folder / "winner_accelerate.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(accelerate, accelerate_path)
        words += ["--config_file", str(accelerate_path.resolve())]
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    command = variables + shlex.join([*words, str(train_script), "--config", str(experiment_path.resolve())])
    write_atomically(experiment_path, f"# Winner of a sweep: {trial.label()}\n# {command}\n{dump_yaml(config)}")
    log.info("winner: %s", trial.label())
    log.info("train with it: %s", command)
    return experiment_path, accelerate_path
