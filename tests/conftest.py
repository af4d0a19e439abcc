"""Settings of every test: no hub, few threads, and what to do with tests that need a GPU."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")

# What auto chooses is measured, and the machine is busy while tests run: nothing of it may outlive them.
if "FROZEN_FAST_CACHE" not in os.environ:
    os.environ["FROZEN_FAST_CACHE"] = tempfile.mkdtemp(prefix="frozen_fast_tests_")
    atexit.register(shutil.rmtree, os.environ["FROZEN_FAST_CACHE"], ignore_errors=True)

import pytest


@pytest.fixture(autouse=True)
def untouched_log() -> None:
    """Undo what set_up_logging did in an earlier test of this process, so that caplog hears the package once.

    It stops the package's records from reaching the root logger. pytest (9.2) then hangs its own handlers on the
    package's logger too, and a test that lets the records through again hears each of them twice.
    """
    logging.disable(logging.NOTSET)
    for name in ("frozen_fast", "frozen_kernels"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("frozen_fast", "frozen_kernels")):
            logging.getLogger(name).disabled = False  # a library's dictConfig may have switched it off


FAST_INTEGRATION_TESTS = ("test_train.py", "test_evaluate.py", "test_loss_two_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every integration test slow but those of a few files, so that `-m "not slow"` takes three minutes."""
    for item in items:
        if item.path.parent.name == "integration" and item.path.name not in FAST_INTEGRATION_TESTS:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked gpu where there is no CUDA device; with FAIL_WITHOUT_CUDA=1 they fail instead."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail("FAIL_WITHOUT_CUDA=1 and there is no CUDA device", pytrace=False)
    pytest.skip("no CUDA device")
