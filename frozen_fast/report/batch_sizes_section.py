"""The report's section on the largest batches (`frozen-fast find-batch-size`)."""

from __future__ import annotations

from frozen_fast.report.document import Section, Table, Text, count, gibibytes, significant
from frozen_fast.report.run_data import RunData


def batch_sizes_section(run: RunData) -> Section | None:
    """The result of `frozen-fast find-batch-size`; None without its file."""
    found = run.batch_sizes
    if not found.get("rows"):
        return None
    rows = [
        [
            str(row["frames"]),
            count(row["batch_size"]),
            significant(row.get("clips_per_second")),
            gibibytes(row.get("peak_memory_bytes")),
        ]
        for row in found["rows"]
    ]
    limit = f"Limit {gibibytes(found['memory_limit_bytes'])} on {found['device']}, per {found['per']}."
    return Section("Largest batches", [Table(["Frames", "Batch", "Clips/s", "Peak memory"], rows), Text(limit)])
