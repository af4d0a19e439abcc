"""auto: what it chooses from, what it keeps, and how it refuses."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from frozen_kernels import availability, chosen_backends, divided_attention, resolve_backend
from frozen_kernels.attention import selection
from frozen_kernels.attention.api import load_backend
from frozen_kernels.attention.qkv_layout import read_layout
from frozen_kernels.availability import BACKEND_NAMES, unavailable_backends

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_choices(tmp_path, monkeypatch):
    """Each test has a cache folder of its own and starts without choices."""
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("frozen_kernels"), "propagate", True)
    before = dict(selection._chosen)
    selection.forget_choices()
    yield tmp_path / "cache"
    selection._chosen.clear()
    selection._chosen.update(before)


def qkv(batch=2, frames=2, patches=3):
    return torch.randn(batch, 1 + frames * patches, 3, 2, 4)


def test_other_kernels_are_measured_anew(fresh_choices, monkeypatch):
    times = iter([{"cpu_c": 2.0, "sdpa": 1.0}, {"cpu_c": 1.0, "sdpa": 2.0}])
    monkeypatch.setattr(selection, "_measure", lambda *_: (next(times), {}))
    assert resolve_backend("auto", qkv(), 2, "time") == "sdpa"
    selection.forget_choices()
    monkeypatch.setattr(selection, "_sources_hash", lambda: "changed")
    assert resolve_backend("auto", qkv(), 2, "time") == "cpu_c"
    assert len(json.loads((fresh_choices / selection.CACHE_FILE).read_text())) == 2


def test_measured_once_then_remembered_then_read(fresh_choices, caplog, monkeypatch):
    measured = []
    monkeypatch.setattr(selection, "_measure", lambda *_: measured.append(1) or ({"cpu_c": 2.0, "sdpa": 1.0}, {}))
    with caplog.at_level(logging.INFO, logger="frozen_kernels"):
        assert resolve_backend("auto", qkv(), 2, "time") == "sdpa"
        assert resolve_backend("auto", qkv(), 2, "time") == "sdpa"
    assert len(measured) == 1 and caplog.text.count("attention auto: sdpa") == 1
    (row,) = chosen_backends()
    assert row["how"] == "measured" and row["milliseconds"] == {"cpu_c": 2.0, "sdpa": 1.0}
    assert (row["axis"], row["frames"], row["patches"], row["batch"]) == ("time", 2, 3, 2)

    selection.forget_choices()
    assert resolve_backend("auto", qkv(), 2, "time") == "sdpa"
    assert len(measured) == 1 and chosen_backends()[0]["how"] == "cached"
    assert len(json.loads((fresh_choices / selection.CACHE_FILE).read_text())) == 1


@pytest.mark.parametrize(("other", "expected"), [(0.90, "sdpa"), (0.97, "cpu_c"), (2.0, "cpu_c")])
def test_the_default_stands_unless_clearly_beaten(other, expected, monkeypatch):
    monkeypatch.setattr(selection, "_measure", lambda *_: ({"cpu_c": 1.0, "sdpa": other}, {}))
    assert resolve_backend("auto", qkv(), 2, "space") == expected


def test_another_process_that_wrote_first_decides(fresh_choices, monkeypatch):
    def measure(candidates, device, dtype, case, compute):
        first = {case.key: {"backend": "cpu_c", "milliseconds": {}}}
        (fresh_choices / selection.CACHE_FILE).write_text(json.dumps(first))
        return {"cpu_c": 2.0, "sdpa": 1.0}, {}

    monkeypatch.setattr(selection, "_measure", measure)
    assert resolve_backend("auto", qkv(), 2, "time") == "cpu_c"


def test_a_damaged_file_is_measured_anew(fresh_choices, caplog):
    fresh_choices.mkdir()
    (fresh_choices / selection.CACHE_FILE).write_text('{"half a')
    assert resolve_backend("auto", qkv(), 2, "time") in ("cpu_c", "sdpa")
    assert "is not readable" in caplog.text
    assert json.loads((fresh_choices / selection.CACHE_FILE).read_text())


def test_nothing_is_measured_where_it_cannot_be_kept(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(selection, "_measure", lambda *_: pytest.fail("measured"))
    assert resolve_backend("auto", qkv(), 2, "time") == "cpu_c"
    assert "cannot be written" in caplog.text and chosen_backends()[0]["how"] == "default"


def test_shapes_have_their_own_choices():
    for frames, patches, axis in ((2, 3, "time"), (2, 3, "space"), (3, 2, "time")):
        divided_attention(qkv(2, frames, patches), frames, axis)
    assert len(chosen_backends()) == 3
    divided_attention(qkv(2, 2, 3).to(torch.bfloat16), 2, "time")
    assert [row["dtype"] for row in chosen_backends()] == ["float32"] * 3 + ["bfloat16"]


class ForeignError(Exception):
    """As Triton's own exceptions, neither a RuntimeError nor a ValueError."""


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nmore"), ForeignError("needs 300000"), ForeignError()])
def test_a_failing_candidate_is_left_out(fresh_choices, caplog, error):
    def compute(name, x, frames, axis):
        if name == "cpu_c":
            raise error
        return divided_attention(x, frames, axis, backend=name)

    x = qkv()
    assert selection.choose_backend(x, read_layout(x, 2, "time"), "time", compute) == "sdpa"
    (row,) = chosen_backends()
    cause = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
    assert row["failed"] == {"cpu_c": cause} and set(row["milliseconds"]) == {"sdpa"}
    assert f"cpu_c fails on {row['device']}" in caplog.text.replace("device=", "") and cause in caplog.text
    (stored,) = json.loads((fresh_choices / selection.CACHE_FILE).read_text()).values()
    assert stored["backend"] == "sdpa"


def test_where_every_candidate_fails_nothing_is_stored(fresh_choices, caplog):
    def compute(name, x, frames, axis):
        raise ForeignError(f"{name} does not compile")

    x = qkv()
    assert selection.choose_backend(x, read_layout(x, 2, "time"), "time", compute) == "cpu_c"
    (row,) = chosen_backends()
    assert row["how"] == "default" and row["milliseconds"] == {} and set(row["failed"]) == {"cpu_c", "sdpa"}
    assert "every backend fails" in caplog.text and not (fresh_choices / selection.CACHE_FILE).exists()


def test_a_case_that_does_not_fit_is_not_stored(fresh_choices, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    x = torch.zeros(2, 7, 3, 2, 4)
    compute = lambda name, x, frames, axis: divided_attention(x, frames, axis, backend=name)  # noqa: E731
    assert selection.choose_backend(x, read_layout(x, 2, "time"), "time", compute) == "cpu_c"
    assert chosen_backends()[0]["failed"]["sdpa"] == "OutOfMemoryError: no room"
    assert not (fresh_choices / selection.CACHE_FILE).exists()


def test_cuda_is_timed_by_events_around_a_queue_of_runs(monkeypatch):
    """With a fake device: nothing waits for it between the runs, and the time is the events', divided by the runs."""
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("record")

        def synchronize(self):
            told.append("wait for the event")

        def elapsed_time(self, end):
            assert end is not self
            return 50.0 * selection.QUEUED_RUNS  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("wait for the device"))
    seconds = selection._time(lambda: told.append("run"), torch.device("cuda"))
    assert seconds == pytest.approx(0.05) and selection.QUEUED_RUNS >= 20
    runs = ["run"] * selection.QUEUED_RUNS
    assert told == ["wait for the device", "record", *runs, "record", "wait for the event"]


def test_a_cpu_is_timed_by_the_clock_one_run_at_a_time(monkeypatch):
    clock = iter([1.0, 1.25])
    monkeypatch.setattr(selection.time, "perf_counter", lambda: next(clock))
    runs = []
    assert selection._time(lambda: runs.append(1), torch.device("cpu")) == 0.25 and len(runs) == 1


@pytest.mark.parametrize(
    ("device", "whole_batch", "batch"),
    [("cuda", True, 300), ("cuda", False, 166), ("cpu", True, 10), ("cpu", False, 10)],
)
def test_a_stage_is_measured_at_its_own_batch_on_cuda(device, whole_batch, batch, monkeypatch):
    """300 clips of one frame are 59,100 tokens: more than other calls measure."""
    monkeypatch.setattr(selection, "_device_name", lambda device: device.type)
    monkeypatch.setattr(selection, "available_candidates", lambda *_: ["triton", "sdpa"])
    measured = []
    monkeypatch.setattr(
        selection, "_measure", lambda *arguments: measured.append(arguments) or ({"triton": 1.0, "sdpa": 2.0}, {})
    )
    x = torch.empty((), device="meta", dtype=torch.bfloat16).expand(300, 197, 3, 12, 64)
    layout = read_layout(x, 1, "space")
    x = types.SimpleNamespace(device=torch.device(device), dtype=x.dtype)
    assert selection.choose_backend(x, layout, "space", None, whole_batch=whole_batch) == "triton"
    ((_, _, dtype, case, _),) = measured
    assert (case.batch, case.dtype, dtype) == (batch, "bfloat16", torch.bfloat16)


def test_measuring_leaves_the_caller_alone(monkeypatch):
    """The random state, autocast, gradient mode and checkpointing's count of saved tensors."""
    x = qkv().requires_grad_()
    state = torch.random.get_rng_state()
    out = checkpoint(lambda y: divided_attention(y, 2, "time"), x, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state) and x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        divided_attention(qkv(), 2, "space")
    with torch.inference_mode():
        divided_attention(qkv(1, 3, 2), 3, "space")
    assert [row["how"] for row in chosen_backends()] == ["measured"] * 3


def test_compile_takes_the_default(monkeypatch):
    monkeypatch.setattr(selection, "_measure", lambda *_: pytest.fail("measured"))
    x = qkv()
    out = torch.compile(lambda y: divided_attention(y, 2, "time"), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(out, divided_attention(x, 2, "time", backend="reference"))


def test_cls_only_needs_no_choice():
    divided_attention(qkv(), 2, "time", cls_only=True)
    assert chosen_backends() == []


def test_unavailable_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = unavailable_backends("cpu", torch.float32)
    assert set(reasons) == {"xformers", "triton"}
    assert "needs a CUDA GPU" in reasons["xformers"] and "TRITON_INTERPRET=1" in reasons["triton"]
    with pytest.raises(ValueError, match="got 'xformers', which cannot run here: .* CUDA GPU; allowed: auto, ref"):
        divided_attention(qkv(), 2, "time", backend="xformers")
    everything = "auto, reference, sdpa, cpu_c, xformers, triton"
    with pytest.raises(ValueError, match=f"got 'tritn'; allowed: {everything}"):
        divided_attention(qkv(), 2, "time", backend="tritn")
    assert set(unavailable_backends("cpu", torch.float64)) == set(BACKEND_NAMES)
    assert "C for CPUs" in unavailable_backends("cuda", torch.float32)["cpu_c"]


def test_a_missing_or_broken_package_is_a_reason(monkeypatch):
    assert availability._why_not_import("no_such_package.part") == "no_such_package.part is not installed"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(availability, "_import_error", availability._import_error.__wrapped__)
    monkeypatch.setattr(availability.importlib, "import_module", lambda name: 1 / 0)
    assert "importing triton fails: ZeroDivisionError" in unavailable_backends("cpu", torch.float32)["triton"]


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "does not support bfloat16"), ((9, 0), "")])
def test_bf16_needs_compute_capability_8(capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(availability, "_why_not_import", lambda module: "")
    availability.compute_capability.cache_clear()
    try:
        gpu = torch.device("cuda", 0)
        assert availability.compute_capability(gpu) == capability
        for name in ("xformers", "triton"):
            assert reason in availability.why_not(name, gpu, torch.bfloat16)
            assert bool(availability.why_not(name, gpu, torch.bfloat16)) == bool(reason)
            assert availability.why_not(name, gpu, torch.float32) == ""
    finally:
        availability.compute_capability.cache_clear()


def test_deterministic_on_cuda():
    from frozen_kernels.attention.api import _deterministic_backend

    assert _deterministic_backend("auto") == "triton" and _deterministic_backend("reference") == "reference"
    with pytest.raises(ValueError, match="got 'xformers' with deterministic on CUDA"):
        _deterministic_backend("xformers")
    x = qkv()
    out = divided_attention(x, 2, "time", backend="sdpa", deterministic=True)
    torch.testing.assert_close(out, divided_attention(x, 2, "time", backend="reference"))


def test_loaded_backends_are_what_the_table_says():
    for name in ("reference", "sdpa", "cpu_c"):
        assert load_backend(name, torch.device("cpu"), torch.float32).full.__name__ == f"attention_{name}"


def test_the_cpu_path_needs_neither_triton_nor_xformers():
    """An installation without them imports and computes."""
    code = (
        "import sys; sys.modules.update({'triton': None, 'xformers': None})\n"
        "import torch, frozen_kernels as k\n"
        "x = torch.randn(1, 5, 3, 2, 4, requires_grad=True)\n"
        "k.divided_attention(x, 2, 'time', backend='cpu_c').sum().backward()\n"
        "assert 'xformers' in k.unavailable_backends('cpu', torch.float32)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "kernels", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
