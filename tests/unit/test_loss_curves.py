"""Whichever attention backend and form of the fused ops trains, the loss curve is the same."""

from __future__ import annotations

import pytest

from support.loss_curves import INTERPRETED, loss_curve
from support.triton_process import run_interpreted

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def plain():
    curve = loss_curve("reference", "plain")
    assert len(curve) == 50 and curve[24] < 0.5 * curve[0] and curve[-1] < 0.5 * curve[25]
    return curve


def largest_gap(curve, other):
    return max(abs(mine - theirs) for mine, theirs in zip(curve, other, strict=True))


@pytest.mark.parametrize(
    ("attention", "fused_ops"),
    [("sdpa", "plain"), ("cpu_c", "plain"), ("reference", "cpu_c"), ("cpu_c", "cpu_c")],
)
def test_on_a_cpu(attention, fused_ops, plain):
    assert largest_gap(loss_curve(attention, fused_ops), plain) < TOLERANCE


@pytest.mark.slow
def test_triton_interpreted():
    pytest.importorskip("triton")
    plain = loss_curve("reference", "plain", INTERPRETED)
    assert len(plain) == 50 and plain[-1] < plain[0]
    assert largest_gap(run_interpreted("loss_curve")["losses"], plain) < TOLERANCE
