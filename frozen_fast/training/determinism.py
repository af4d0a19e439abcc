"""training.deterministic: PyTorch's deterministic operators, and the error for operators without one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from frozen_fast.errors import UserError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_VALUES = (":4096:8", ":16:8")
_MISSING = re.compile(
    r"(\S+) does not have a deterministic implementation|(backend: got '\w+') with deterministic on CUDA"
)


@contextlib.contextmanager
def deterministic_operators(wanted: bool) -> Iterator[None]:
    """Allow deterministic operators only, and restore PyTorch's settings afterwards; does nothing if not enabled.

    Random numbers need no setting: every draw of a run is a function of `seed` and the step.

    Raises:
        UserError: an operator has no deterministic form, or CUBLAS_WORKSPACE_CONFIG holds another value.
    """
    if not wanted:
        yield
        return
    found = os.environ.setdefault(_CUBLAS, _CUBLAS_VALUES[0])  # cuBLAS reads it when it is initialised
    if found not in _CUBLAS_VALUES:
        allowed = f"{' or '.join(_CUBLAS_VALUES)} in the environment variable {_CUBLAS}"
        raise UserError(f"training.deterministic: got {_CUBLAS}={found}; allowed: {allowed}")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except (RuntimeError, ValueError) as error:
        missing = _MISSING.search(str(error))
        if missing is None:
            raise
        raise UserError(
            f"training.deterministic: got true, but {missing[1] or missing[2]} has no deterministic form on this "
            "device; allowed: false, or a model without it (model.video.attention auto avoids such kernels)"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
