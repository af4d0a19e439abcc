"""One rank of the two-process loss test: gradients of a small DDP model, written to a file by rank 0.

Run as `python loss_worker.py RENDEZVOUS_FILE RANK WORLD_SIZE OUTPUT`.
"""

from __future__ import annotations

import itertools
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from frozen_fast.errors import UserError
from frozen_fast.losses import gathered_contrastive_loss

GLOBAL_BATCH = 10
TEMPERATURE = 0.07
CASES = list(itertools.product((torch.float64, torch.float32), (True, False), (0, 3)))
GATHERS = (None, torch.bfloat16)


class TwoTowers(nn.Module):
    """Two small towers with shared first weights, so that gradients of both sides meet in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(7, 12)
        self.video = nn.Linear(12, 5)
        self.text = nn.Linear(12, 5)

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.video(torch.tanh(self.shared(video))), self.text(torch.tanh(self.shared(text)))


def build(dtype: torch.dtype) -> tuple[TwoTowers, Tensor, Tensor]:
    """The model and the whole batch, equal on every rank."""
    torch.manual_seed(0)
    model = TwoTowers().to(dtype)
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(GLOBAL_BATCH, 7, generator=generator, dtype=torch.float64).to(dtype)
    text = torch.randn(GLOBAL_BATCH, 7, generator=generator, dtype=torch.float64).to(dtype)
    return model, video, text


def main() -> None:
    rendezvous, rank, world_size, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    results: dict = {}
    for dtype, local, chunk_rows in CASES:
        model, video, text = build(dtype)
        parallel = DistributedDataParallel(model)
        share = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
        loss, value = gathered_contrastive_loss(
            *parallel(video[share], text[share]), TEMPERATURE, local=local, chunk_rows=chunk_rows
        )
        loss.backward()
        results[str(dtype), local, chunk_rows] = {
            "value": value,
            "requires_grad": value.requires_grad,
            "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        }
    for gather in GATHERS:
        model, video, text = build(torch.float32)
        parallel = DistributedDataParallel(model)
        loss, value = gathered_contrastive_loss(*parallel(video[share], text[share]), TEMPERATURE, gather_dtype=gather)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results[str(gather)] = {"value": value, "gradients": gradients}
    uneven = torch.randn(3 + rank, 5)
    try:
        gathered_contrastive_loss(uneven, uneven)
        message = "no error"
    except UserError as error:
        message = str(error)
    messages: list = [None] * world_size
    dist.all_gather_object(messages, message)
    if rank == 0:
        torch.save({"results": results, "uneven": messages}, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
