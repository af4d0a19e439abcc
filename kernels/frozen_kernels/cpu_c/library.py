"""C kernels for CPUs, compiled by the machine's C compiler at first use and cached on disk.

The sources are in frozen_kernels/cpu_c. Sizes and element types are macros, so that inner loops have fixed lengths. A
library is stored in the folder of frozen_kernels.cache under a hash of all its inputs. The compiler is the one named by
the environment variable CC, otherwise cc, gcc or clang.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frozen_kernels.cache import cache_folder, leads_outside

SOURCES = Path(__file__).parent
# The compiler may reorder sums to vectorise them; NaN and infinity keep their meaning.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-fopenmp",
)
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Macro values for the element types."""

BUILD_SECONDS = 120


@lru_cache(maxsize=1)
def compiler() -> str:
    """Return the path of the C compiler; empty if there is none."""
    named = os.environ.get("CC")
    for name in (named,) if named else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    return ""


@torch.compiler.assume_constant_result
def why_not_cpu_c() -> str:
    """Return why no C kernel can be compiled here, after compiling a small one; empty if it works."""
    return _probe()


@lru_cache(maxsize=1)
def _probe() -> str:
    if not compiler():
        return "no C compiler: CC is not set and none of cc, gcc, clang is on PATH"
    try:
        load_kernels("probe.c", {"KIND": KINDS[torch.float16]})
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error).splitlines()[0]
    return ""


@lru_cache(maxsize=256)
def _load(source: str, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    text = b"".join(path.read_bytes() for path in (*sorted(SOURCES.glob("*.h")), SOURCES / source))
    flags = [*FLAGS, *_wide_vectors(), *_openmp_runtime(), *(f"-D{name}={value}" for name, value in macros)]
    identity = "\n".join((*flags, _compiler_version(), _processor())).encode()
    name = f"{source.removesuffix('.c')}_{hashlib.sha256(identity + text).hexdigest()[:24]}.so"
    folder = cache_folder() / "cpu_c"
    outside = leads_outside(folder / name)
    if (folder / name).exists() and not outside:
        return ctypes.CDLL(str(folder / name))
    try:
        if outside:
            raise OSError(f"{folder} leads out of the cache through a symbolic link")
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=folder)
    except OSError:  # the cache cannot be written: every process compiles its own
        scratch, folder = tempfile.mkdtemp(), Path()
    try:
        built = Path(scratch) / name
        _build(source, flags, built)
        if folder != Path():
            built = built.replace(folder / name)
        return ctypes.CDLL(str(built))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build(source: str, flags: list[str], target: Path) -> None:
    command = [compiler(), *flags, "-o", str(target), str(SOURCES / source), *_openmp_runtime(), "-lm"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{compiler()} did not build {source} within {BUILD_SECONDS} s") from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or [f"exit code {result.returncode}"]
        raise RuntimeError(f"{compiler()} cannot build {source}: {lines[0]}")


@lru_cache(maxsize=1)
def _openmp_runtime() -> tuple[str, ...]:
    """Return PyTorch's OpenMP library; the threads of a second one would compete with PyTorch's for cores."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/lib" in line}
    except OSError:
        return ()
    found = sorted(path for path in mapped if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))
    package = Path(torch.__file__).parent
    own = [path for path in found if Path(path).parent in (package / "lib", package.parent / "torch.libs")]
    return tuple(own or found)[:1]  # other packages (faiss) load their own OpenMP libraries


def _wide_vectors() -> tuple[str, ...]:
    """Compilers use half the width of AVX-512 by default."""
    return ("-mprefer-vector-width=512",) if torch.backends.cpu.get_cpu_capability() == "AVX512" else ()


@lru_cache(maxsize=1)
def _compiler_version() -> str:
    command = [compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False).stdout


@lru_cache(maxsize=1)
def _processor() -> str:
    """Return the processor's features as Linux lists them, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def load_kernels(source: str, macros: Mapping[str, int]) -> ctypes.CDLL:
    """Compile and load a source of frozen_kernels/cpu_c with these macros.

    Raises:
        RuntimeError: if compilation fails, with the compiler's first error.
    """
    return _load(source, tuple(sorted(macros.items())))


def in_parallel(function: Callable[..., Any], tasks: int, *arguments: Any) -> None:
    """Call function(tasks, threads, *arguments), which distributes the tasks over as many threads as PyTorch uses.

    Tensors are passed as the address of their data. They must be contiguous, and the caller keeps them alive.
    """
    passed = [ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value for value in arguments]
    threads = max(1, min(torch.get_num_threads(), tasks))
    function(ctypes.c_long(tasks), ctypes.c_int(threads), *passed)
