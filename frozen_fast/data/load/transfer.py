"""Copies of batches to a GPU on a stream of their own, ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class OnDevice(Protocol):
    """What holds tensors on a device."""

    def tensors(self) -> list[Tensor]:
        """All of them."""
        ...


B = TypeVar("B", bound=OnDevice)


class Transfer(Protocol[B]):
    """Brings batches to a device ahead of the step that needs them."""

    def sent(self, batches: Iterator[B], move: Callable[[B], B]) -> Iterator[tuple[B, Any]]:
        """Start with each batch as soon as it is there; iterated in the loading thread.

        Args:
            batches: in page-locked memory, or on the device already.
            move: queues a batch's copies and what follows them on the device.

        Returns:
            The batches and what tells that each is complete.
        """
        ...

    def received(self, batches: Iterator[tuple[B, Any]]) -> Iterator[B]:
        """The batches, complete for the consumer; iterated in the thread that computes."""
        ...


class CudaTransfer:
    """A Transfer: copies on a side stream; the compute stream waits for the copies of the batch that it is given.

    Page-locked buffers come from PyTorch's caching host allocator, which hands a buffer out again when the copies that
    read it are done.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def sent(self, batches: Iterator[B], move: Callable[[B], B]) -> Iterator[tuple[B, torch.cuda.Event]]:
        """Batches on the device, and the events after which they are complete."""
        torch.cuda.set_device(self._device)  # of this thread
        with torch.cuda.stream(self._stream):
            for batch in batches:
                moved = move(batch)
                yield moved, self._stream.record_event()

    def received(self, batches: Iterator[tuple[B, torch.cuda.Event]]) -> Iterator[B]:
        """The batches, for the consumer's stream."""
        for batch, ready in batches:
            compute = torch.cuda.current_stream(self._device)
            compute.wait_event(ready)
            for tensor in batch.tensors():
                tensor.record_stream(compute)  # its memory is not reused before the step has read it
            yield batch
