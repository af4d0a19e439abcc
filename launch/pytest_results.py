"""A pytest plugin: appends every test's outcome to the file named by PYTEST_RESULTS as soon as it is known.

    PYTEST_RESULTS=results.jsonl python -m pytest -p pytest_results tests/gpu

One JSON object a line: test, outcome (passed, failed, skipped), seconds, reason. A run that is stopped leaves what it
knew. With pytest-xdist the process that collects the reports writes.
"""

from __future__ import annotations

import json
import os

import pytest

REASON_CHARACTERS = 500


_writes = False


def pytest_configure(config: pytest.Config) -> None:
    """Write in the process that collects the reports; a run started by a test of another run is no worker of that."""
    global _writes
    _writes = "PYTEST_RESULTS" in os.environ and not hasattr(config, "workerinput")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a test's call, or its set-up where that failed or skipped it, and a failed teardown."""
    if not _writes:
        return
    if report.when != "call" and report.outcome == "passed":
        return
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 3),
        "reason": reason[-REASON_CHARACTERS:],
    }
    with open(os.environ["PYTEST_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
