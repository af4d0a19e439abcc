"""Collectives of the loss per pass for worlds of 2 to 512 ranks, and the dtype in which DDP reduces gradients.

The process group is PyTorch's fake one: it counts as a world of N ranks and exchanges nothing.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from frozen_fast.config.schema import OptimizerConfig
from frozen_fast.errors import UserError
from frozen_fast.losses import gathered_contrastive_loss
from frozen_fast.optimizers import optimizer_kind
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.start import check_gradient_exchange

CLIPS, WIDTH = 4, 8


class Collectives(TorchDispatchMode):
    """Counts the collectives that run, by name, and the floating-point bytes that they fill."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.received_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().split("::")[-1].split(".")[0]
            self.counts[name] += 1
            gathers = name.startswith("_allgather_base") and args[0].is_floating_point()
            self.received_bytes += args[0].nbytes if gathers else 0
        return func(*args, **(kwargs or {}))


@pytest.fixture
def world() -> Iterator[Callable[[int], None]]:
    def start(size: int) -> None:
        alone = {"backend": "gloo", "store": dist.HashStore()}  # the fake group runs no hooks
        fake = {"backend": "fake", "store": FakeStore()}
        dist.init_process_group(**(alone if size == 1 else fake), rank=0, world_size=size)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4, 512])
def test_the_loss_takes_the_same_few_collectives_in_a_world_of_any_size(
    size: int, dtype: torch.dtype | None, world: Callable[[int], None]
) -> None:
    world(size)
    text, video = (torch.randn(CLIPS, WIDTH, requires_grad=True) for _ in range(2))
    with Collectives() as forward:
        loss, _ = gathered_contrastive_loss(text, video, gather_dtype=dtype)
    assert forward.received_bytes == size * CLIPS * 2 * WIDTH * (4 if dtype is None else 2)
    # the numbers of clips, the features of both sides in one, the loss's value
    assert sum(forward.counts.values()) == 3, forward.counts
    with Collectives() as backward:
        loss.backward()
    assert sum(backward.counts.values()) == 1, backward.counts
    assert text.grad is not None and text.grad.shape == (CLIPS, WIDTH)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ddp_reduces_gradients_in_the_dtype_that_is_asked_for(dtype: str, world: Callable[[int], None]) -> None:
    world(1)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    plain = copy.deepcopy(model)
    parallel = object.__new__(Parallel)  # without a launch
    parallel.accelerator = SimpleNamespace(prepare=lambda model, optimizer: (DistributedDataParallel(model), optimizer))
    parallel._gradient_exchange, parallel._optimizer_kind = dtype, optimizer_kind(OptimizerConfig())
    parallel.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    batch = torch.randn(5, 4)
    parallel.forward(batch).square().sum().backward()
    plain(batch).square().sum().backward()
    for parameter, alone in zip(model.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None and alone.grad is not None
        expected = alone.grad.bfloat16().float() if dtype == "bf16" else alone.grad
        assert torch.equal(parameter.grad, expected)


def test_strategies_that_reduce_by_themselves_take_fp32_only() -> None:
    check_gradient_exchange("bf16", "ddp")
    check_gradient_exchange("fp32", "zero2")
    with pytest.raises(UserError, match=r"training.gradient_exchange: got 'bf16' with fsdp2; allowed: fp32, or DDP"):
        check_gradient_exchange("bf16", "fsdp2")


def test_one_process_exchanges_nothing() -> None:
    text, video = (torch.randn(CLIPS, WIDTH, requires_grad=True) for _ in range(2))
    with Collectives() as counted:
        gathered_contrastive_loss(text, video)[0].backward()
    assert not counted.counts
