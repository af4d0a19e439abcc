"""Building C kernels: what they depend on, what happens where they cannot be built, and threads."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

import pytest
import torch

from frozen_kernels import divided_attention, unavailable_backends
from frozen_kernels.cpu_c import library
from frozen_kernels.cpu_c.library import in_parallel, load_kernels
from support.attention_cases import make_case, run


@pytest.fixture
def fresh(forgotten_c_builds, monkeypatch, tmp_path):
    """No kernel loaded or built yet, and none left behind for later tests."""
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path))
    return tmp_path


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_build_is_kept_and_found_again(fresh, monkeypatch):
    load_kernels("probe.c", {"KIND": 1})
    (built,) = (fresh / "cpu_c").iterdir()
    library._load.cache_clear()
    monkeypatch.setattr(library, "_build", lambda *_: pytest.fail("built twice"))
    load_kernels("probe.c", {"KIND": 1})
    assert [path.name for path in (fresh / "cpu_c").iterdir()] == [built.name]


def test_another_size_another_compiler_another_build(fresh, monkeypatch):
    load_kernels("probe.c", {"KIND": 0})
    load_kernels("probe.c", {"KIND": 1})
    monkeypatch.setattr(library, "_compiler_version", lambda: "another")
    library._load.cache_clear()
    load_kernels("probe.c", {"KIND": 1})
    assert len(list((fresh / "cpu_c").iterdir())) == 3


def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    blocked = fresh / "a_file"
    blocked.write_text("")
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(blocked))
    probe = load_kernels("probe.c", {"KIND": 0})
    source, target = torch.randn(5), torch.zeros(5)
    probe.round_trip(*(ctypes.c_void_p(x.data_ptr()) for x in (source, target)), ctypes.c_long(5))
    assert torch.equal(source, target) and blocked.read_text() == ""


@pytest.mark.parametrize("kind", library.KINDS, ids=str)
def test_elements_are_read_and_rounded_as_torch_does(kind):
    """Every 16-bit pattern comes back, NaN as NaN; fp32 to bf16 rounds to even."""
    source = torch.arange(-(2**15), 2**15).to(torch.int16).view(kind) if kind != torch.float32 else torch.randn(1000)
    target = torch.empty_like(source)
    probe = load_kernels("probe.c", {"KIND": library.KINDS[kind]})
    probe.round_trip(*(ctypes.c_void_p(x.data_ptr()) for x in (source, target)), ctypes.c_long(len(source)))
    torch.testing.assert_close(target, source, rtol=0, atol=0, equal_nan=True)


def test_without_a_compiler_the_reason_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no C compiler" in unavailable_backends("cpu", torch.float32)["cpu_c"]
    qkv, _ = make_case(1, 2, 3, 1, 4)
    with pytest.raises(ValueError, match="got 'cpu_c', which cannot run here: no C compiler.*allowed: auto, reference"):
        divided_attention(qkv, 2, "time", backend="cpu_c")


def test_a_compiler_that_fails_is_a_reason_too(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(script(tmp_path, "broken", 'echo "x.c:1: error: no headers" >&2; exit 1')))
    reason = unavailable_backends("cpu", torch.float32)["cpu_c"]
    assert "cannot build probe.c: x.c:1: error: no headers" in reason and "\n" not in reason


def test_a_compiler_that_hangs_is_a_reason_too(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(script(tmp_path, "slow", '[ "$1" = --version ] || sleep 60')))
    monkeypatch.setattr(library, "BUILD_SECONDS", 0.2)
    assert "did not build probe.c within 0.2 s" in unavailable_backends("cpu", torch.float32)["cpu_c"]


@pytest.mark.parametrize(("tasks", "threads"), [(1, 1), (2, 2), (7, 3)])
def test_no_more_threads_than_tasks(tasks, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen = []
    in_parallel(lambda *arguments: seen.append([argument.value for argument in arguments]), tasks)
    assert seen == [[tasks, threads]]


def test_threads_are_those_of_pytorchs_openmp():
    """A second OpenMP runtime's threads would wait busily beside the first's."""
    qkv, _ = make_case(2, 2, 5, 1, 8)
    divided_attention(qkv, 2, "time", backend="cpu_c")
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = {path for path in mapped if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))}
    (chosen,) = library._openmp_runtime()
    assert chosen in runtimes and (len(runtimes) == 1 or "/torch" in chosen)


def test_the_runtime_of_another_package_is_not_taken(monkeypatch):
    """faiss brings an OpenMP of its own, which comes first in the alphabet."""
    package = Path(torch.__file__).parent
    paths = [package.parent / "faiss_cpu.libs/libgomp-1.so", package / "lib/libgomp.so.1", package / "lib/libtorch.so"]
    monkeypatch.setattr(Path, "read_text", lambda self: "".join(f"7f00-7f01 r-xp 0 08:01 1 {path}\n" for path in paths))
    library._openmp_runtime.cache_clear()
    assert library._openmp_runtime() == (str(package / "lib/libgomp.so.1"),)
    library._openmp_runtime.cache_clear()


def test_a_loader_worker_may_compute(monkeypatch):
    """A forked process with one thread, as data loaders fork them: OpenMP's threads do not survive a fork."""
    qkv, _ = make_case(2, 2, 5, 1, 8)
    expected = divided_attention(qkv, 2, "time", backend="cpu_c")
    child = os.fork()
    if not child:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        os._exit(0 if torch.equal(divided_attention(qkv, 2, "time", backend="cpu_c"), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("axis", ["time", "space"])
def test_gradients_do_not_depend_on_the_number_of_threads(axis, monkeypatch):
    qkv, grad = make_case(3, 4, 19, 2, 16)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(run(lambda x: divided_attention(x, 4, axis, backend="cpu_c"), qkv, grad))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)
