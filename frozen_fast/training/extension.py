"""`--extend`: continues a run in its last stage with more steps, whether it is finished or not.

Finished stages keep their steps, and the new config determines the steps of the last stage. The learning rate at each
step is that of the longer run: a constant rate does not change; a cosine is computed with the new total, so that it
rises where the run continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from frozen_fast.config import StagePlan
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import RunState


def extension_keys(saved: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the config keys that an extension may change, in addition to those that any resumed run may change.

    Args:
        saved: the checkpoint's config in plain values.
    """
    last = len(saved["curriculum"]["stages"]) - 1
    return "curriculum.budget_clips", "curriculum.budget_epochs", f"curriculum.stages[{last}].steps"


def check_extension(state: RunState | None, num_stages: int) -> None:
    """Refuse to extend a run that has no checkpoint or is not in its last stage.

    Args:
        state: state of the newest checkpoint; None: there is none.
        num_stages: stages of the run.

    Raises:
        UserError: naming the state of the run.
    """
    if state is None:
        raise UserError(
            "--extend: got a run_folder without a checkpoint; allowed: that of a run (without --extend: start)"
        )
    if state.stage != num_stages - 1:
        got = f"got a run in stage {state.stage + 1} of {num_stages}"
        raise UserError(f"--extend: {got}; allowed: a run in its last stage (--resume auto continues this one)")


def with_finished_steps(
    plans: Sequence[StagePlan], finished: Mapping[int, int], state: RunState | None, *, extending: bool
) -> tuple[StagePlan, ...]:
    """Return the stages' plans, in which finished stages have the steps that they took.

    Args:
        plans: the plans of the config.
        finished: index of a finished stage -> its steps.
        state: state of the checkpoint that the run resumes from.
        extending: whether the last stage gets more steps.

    Raises:
        UserError: an extension without more steps.
    """
    kept = tuple(replace(plan, steps=finished.get(plan.index, plan.steps)) for plan in plans)
    if extending and state is not None and kept[-1].steps <= state.steps_in_stage:
        got = f"got {kept[-1].steps} steps for the last stage, which has done {state.steps_in_stage}"
        keys = "curriculum.budget_epochs, budget_clips or the last stage's steps"
        raise UserError(f"--extend: {got}; allowed: more, through {keys}")
    return kept
