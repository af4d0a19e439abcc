"""The report's first section: what is wrong with the run, if anything is."""

from __future__ import annotations

from frozen_fast.report.document import Block, Bullets, Caution, Section, Text
from frozen_fast.report.events import describe_events
from frozen_fast.report.run_data import RunData

STATES = {
    "done": "finished",
    "running": "running",
    "dead": "killed: it says that it is running, but no process writes to its folder; it can be resumed",
    "stopped": "stopped by a signal after a checkpoint; it can be resumed",
    "failed": "failed",
}


def state_section(run: RunData) -> Section | None:
    """How the run ended where it is not done, and the files that are missing; None where nothing is wrong."""
    blocks: list[Block] = []
    state = run.status.get("state")
    if state == "running" and not run.alive:
        state = "dead"
    if state != "done":
        words = STATES.get(str(state), "unknown")
        message = f": {run.status['message']}" if run.status.get("message") else ""
        code = f" (exit code {run.status['exit_code']})" if run.status.get("exit_code") else ""
        blocks.append(Caution(f"This run is not complete. State: {words}{message}{code}"))
    if run.missing:
        blocks += [Text("Not in the run folder:"), Bullets(run.missing)]
    if run.events:
        blocks += [Text("What happened to the run:"), Bullets(describe_events(run.events))]
    return Section("State", blocks) if blocks else None
