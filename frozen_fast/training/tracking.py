"""Weights & Biases, when it is switched on; rank 0 only."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from frozen_fast.common.files import write_atomically
from frozen_fast.config.schema import ExperimentConfig
from frozen_fast.errors import UserError


class Tracker:
    """Sends numbers to Weights & Biases, or nowhere."""

    def __init__(self, run: Any = None) -> None:
        self._run = run

    @classmethod
    def start(cls, config: ExperimentConfig, plain_config: dict[str, Any], folder: Path, *, is_main: bool) -> Tracker:
        """Open a run as config.wandb says; its files go into the run folder.

        Raises:
            UserError: it is switched on and wandb is missing or refuses.
        """
        if config.wandb.mode == "off" or not is_main:
            return cls()
        try:
            import wandb
        except ImportError:
            mode = config.wandb.mode
            raise UserError(f"wandb.mode: got {mode!r}, but wandb is not installed; allowed: off") from None
        try:
            run = wandb.init(
                mode=config.wandb.mode,
                project=config.wandb.project,
                name=config.wandb.name or config.name,
                dir=str(folder),
                config=plain_config,
                id=_run_id(folder),
                resume="allow" if config.wandb.mode == "online" else None,
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            mode = config.wandb.mode
            raise UserError(f"wandb.mode: got {mode!r}, but wandb refuses: {error}; allowed: off, offline") from None
        return cls(run)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send values at an optimizer step."""
        if self._run is not None:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run, so that nothing is lost at exit."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _run_id(folder: Path) -> str:
    """The run's id at Weights & Biases: drawn once and kept in the run folder, so that a resumed run goes on there."""
    path = folder / "wandb_id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
