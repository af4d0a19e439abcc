"""The sweep file's typed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from frozen_fast.config import yaml_text
from frozen_fast.config.convert import build
from frozen_fast.config.keys import Named, dataclass, key, section
from frozen_fast.config.overrides import apply_overrides
from frozen_fast.config.renamed import Renames, rename_keys, trackers_of_wandb_mode
from frozen_fast.config.schema import TrackingConfig
from frozen_fast.config.yaml_text import Origins
from frozen_fast.errors import UserError
from frozen_fast.sweep.space import ACCELERATE_AXIS, TOGETHER_PREFIX


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits of a trial; a trial that exceeds one is stopped and recorded."""

    seconds: float = key(600.0, "wall time of one trial, start-up included")
    memory_gib: float | None = key(None, "resident memory of a trial's processes together, GiB; null: no limit")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which settings to measure, and how."""

    name: str = key("sweep", "name in reports")
    folder: str = key("runs/sweeps/{name}", "output folder")
    experiment: str = key("", "experiment that every trial changes, relative to the sweep file")
    accelerate: str | None = key(None, "Accelerate config of trials that do not name one, relative to the sweep file")
    overrides: tuple[str, ...] = key((), "key.path=value for every trial's measurement (not part of the winner)")
    environment: Named[str] = key((), "environment variables of every trial (a mapping in YAML)")
    axes: Named[tuple[Any, ...]] = key(
        (),
        "config key, accelerate, environment.NAME or together.NAME -> values; the product is tried (YAML: a mapping)",
    )
    trials: tuple[Named[Any], ...] = key((), "single trials in addition to the product (a list of mappings in YAML)")
    max_trials: int = key(0, "number of trials drawn at random from the product, 0: all; listed trials always run")
    seed: int = key(0, "seed of that draw")
    search: Literal["all", "halving"] = key("all", "all at full length, or successive halving over the rungs")
    rungs: tuple[tuple[str, ...], ...] = key((), "halving: overrides of each rung, short runs first")
    keep_share: float = key(0.5, "halving: share of trials that advances to the next rung")
    parallel: int = key(0, "trials at a time; 0: one per free group of GPUs, one on CPU")
    devices_per_trial: int = key(1, "GPUs of one trial")
    epoch_clips: int = key(2_500_000, "number of clips for the projected GPU-hours")
    limits: LimitsConfig = section(LimitsConfig, "limits of one trial")
    tracking: TrackingConfig = section(TrackingConfig, "experiment trackers: one run for the sweep, a row per trial")


RENAMES: Renames = {"wandb": trackers_of_wandb_mode, "wandb_project": "tracking.project"}
"""Keys of a sweep file under former names."""


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read and check a sweep file.

    Args:
        path: the YAML file; the paths in it are relative to its folder.
        overrides: texts `key.path=value`; the paths in them are relative to the working directory.

    Raises:
        UserError: for an unknown key, a wrong type, or a sweep that has nothing to try.
    """
    tree, origins = yaml_text.read(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: got a {type(tree).__name__} at the top; allowed: a mapping of keys")
    rename_keys(tree, RENAMES, origins)
    apply_overrides(tree, overrides, origins, SweepConfig, RENAMES)
    config = _with_whole_paths(build(SweepConfig, tree, origins=origins), path.parent, origins)
    check(config)
    return config


def _with_whole_paths(config: SweepConfig, base: Path, origins: Origins) -> SweepConfig:
    """The sweep with absolute paths of the experiment and the Accelerate files, listed and in axes alike."""

    def whole(value: Any, *places: str) -> Any:
        """A path made absolute, by where the first of these places that is known was written."""
        origin = next((origins[place] for place in places if place in origins), "")
        root = Path.cwd() if origin == "command line" else base
        return str((root / value).resolve()) if isinstance(value, str) and value else value

    def settings_of(index: int, trial: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
        places = (f"trials[{index}].{ACCELERATE_AXIS}", f"trials[{index}]", "trials")
        return tuple((name, whole(value, *places) if name == ACCELERATE_AXIS else value) for name, value in trial)

    return replace(
        config,
        experiment=whole(config.experiment, "experiment"),
        accelerate=whole(config.accelerate, "accelerate"),
        axes=tuple(
            (name, tuple(whole(value, f"axes.{name}", "axes") for value in values))
            if name == ACCELERATE_AXIS
            else (name, values)
            for name, values in config.axes
        ),
        trials=tuple(settings_of(index, trial) for index, trial in enumerate(config.trials)),
    )


def check(config: SweepConfig) -> None:
    """Check a sweep.

    Raises:
        UserError: no experiment, nothing to try, an empty axis, an Accelerate file that is not there, halving without
            rungs, limits that allow nothing.
    """
    if not config.experiment:
        raise UserError("experiment: got nothing; allowed: the path of an experiment file")
    if not config.axes and not config.trials:
        raise UserError("axes: got nothing; allowed: config keys with lists of values (or trials: a list of mappings)")
    for name, values in config.axes:
        if not values:
            raise UserError(f"axes.{name}: got an empty list; allowed: at least one value")
        if name.startswith(TOGETHER_PREFIX) and not all(isinstance(value, Mapping) for value in values):
            raise UserError(
                f"axes.{name}: got {list(values)}; allowed: a list of mappings, each of settings that go together"
            )
    named = [dict(trial).get(ACCELERATE_AXIS) for trial in config.trials]
    for file in (config.accelerate, *dict(config.axes).get(ACCELERATE_AXIS, ()), *named):
        if file is not None and not Path(file).is_file():
            raise UserError(f"accelerate: got {file}; allowed: an Accelerate config file, relative to the sweep file")
    if config.search == "halving" and not config.rungs:
        raise UserError("rungs: got nothing; allowed with search halving: a list of lists of key.path=value")
    if not 0 < config.keep_share < 1:
        raise UserError(f"keep_share: got {config.keep_share}; allowed: between 0 and 1, both excluded")
    if config.limits.seconds <= 0:
        raise UserError(f"limits.seconds: got {config.limits.seconds}; allowed: above 0")
    if config.limits.memory_gib is not None and config.limits.memory_gib <= 0:
        raise UserError(f"limits.memory_gib: got {config.limits.memory_gib}; allowed: above 0, or null")
    if config.devices_per_trial < 1:
        raise UserError(f"devices_per_trial: got {config.devices_per_trial}; allowed: at least 1")
