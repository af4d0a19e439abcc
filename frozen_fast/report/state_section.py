"""The report's first section: problems of the run."""

from __future__ import annotations

from frozen_fast.report.document import Block, Bullets, Caution, Section, Text
from frozen_fast.report.events import describe_events
from frozen_fast.report.run_data import RunData

STATES = {
    "done": "finished",
    "running": "running",
    "dead": "killed: status.json says running, but no process writes to the folder; it can be resumed",
    "stopped": "stopped by a signal after a checkpoint; it can be resumed",
    "failed": "failed",
}


def state_section(run: RunData) -> Section | None:
    """The state of an incomplete run, and missing files; None without problems."""
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
        blocks += [Text("Events:"), Bullets(describe_events(run.events))]
    return Section("State", blocks) if blocks else None
