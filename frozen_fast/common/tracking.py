"""Weights & Biases, when it is switched on; rank 0 only."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Literal

from frozen_fast.common.files import write_atomically
from frozen_fast.errors import UserError

Mode = Literal["off", "offline", "online"]


class Tracker:
    """Sends numbers to Weights & Biases, or nowhere."""

    def __init__(self, run: Any = None) -> None:
        self._run = run

    @classmethod
    def start(
        cls, mode: Mode, *, project: str, name: str, plain_config: dict[str, Any], folder: Path, field: str
    ) -> Tracker:
        """Open a run; its files go into a folder.

        Args:
            mode: "off" (nothing is opened), "offline" or "online".
            project: the project at Weights & Biases.
            name: the run's name there.
            plain_config: JSON-able settings that the run is listed with.
            folder: where its files and its id are kept.
            field: the config key that switched it on, for messages.

        Raises:
            UserError: it is switched on and wandb is missing or refuses.
        """
        if mode == "off":
            return cls()
        try:
            import wandb
        except ImportError:
            raise UserError(f"{field}: got {mode!r}, but wandb is not installed; allowed: off") from None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                mode=mode,
                project=project,
                name=name,
                dir=str(folder),
                config=plain_config,
                id=_run_id(folder),
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(f"{field}: got {mode!r}, but wandb refuses: {error}; allowed: off, offline") from None
        return cls(run)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send values at a step (an optimizer step of a run, a trial of a sweep)."""
        if self._run is not None:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run, so that nothing is lost at exit."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _run_id(folder: Path) -> str:
    """The run's id at Weights & Biases: drawn once and kept in its folder, so that a resumed run goes on there."""
    path = folder / "wandb_id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
