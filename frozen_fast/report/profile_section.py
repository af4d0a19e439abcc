"""The report's most expensive kernels."""

from __future__ import annotations

from frozen_fast.report.document import Block, Section, Table, Text, count, percent, significant
from frozen_fast.report.run_data import RunData


def profile_section(run: RunData) -> Section | None:
    """The most expensive kernels of each traced stage, with training.profile_steps."""
    blocks: list[Block] = []
    for table in sorted(run.kernels, key=lambda table: table["stage"]):
        steps, stage = table["steps"], table["stage"]
        where = "on the device" if table["what"] == "kernel" else "on the CPU, without the operators that they call"
        blocks.append(
            Text(
                f"Stage {stage + 1}, {count(steps)} step{'' if steps == 1 else 's'} traced after warm-up, "
                f"{significant(table['total_milliseconds'])} ms of {table['what']}s {where}. "
                f"Chrome trace: traces/stage_{stage}.trace.json."
            )
        )
        if table.get("use"):
            blocks.append(Text(_use(table["use"])))
        rows = [
            [row["name"], count(row["calls"]), significant(row["milliseconds"]), percent(row["share"])]
            for row in table["rows"]
        ]
        blocks.append(Table([table["what"].capitalize(), "Calls", "ms", "Share"], rows))
    return Section("Profile", blocks) if blocks else None


def _use(use: dict[str, float | None]) -> str:
    """How host and device spent a step."""
    host = f"Per step: {significant(use['host_milliseconds'])} ms on the host without waiting for the device"
    if use["idle_share"] is None:
        return f"{host}."
    launches, copies = significant(use["launches"]), significant(use["copy_milliseconds"])
    busy = f"kernels run for {significant(use['busy_milliseconds'])} ms, copies for {copies} ms"
    return f"{host}, {launches} launches, {busy}; the device is idle for {percent(use['idle_share'])} of the time."
