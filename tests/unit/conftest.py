"""Fixtures of several unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from frozen_kernels.cpu_c import library


@pytest.fixture
def forgotten_c_builds() -> Iterator[None]:
    """The compiler and the C kernels are looked for again in this test, and again after it."""
    cached = (library._load, library.compiler, library._probe, library._compiler_version)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()
