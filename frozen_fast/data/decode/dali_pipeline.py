"""The DALI graphs, from encoded clips to uint8 frames of the model's resolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class GraphKind(NamedTuple):
    """Which graph: of a "video" or an "image", and whether it resizes before the crop (TestView)."""

    kind: str
    resizes_first: bool


_INPUTS = {
    "encoded": (1, "UINT8"),
    "frames": (1, "INT32"),
    "size": (1, "FLOAT"),
    "start": (1, "INT32"),
    "shape": (1, "INT32"),
    "mirror": (0, "INT32"),
}


def missing() -> str | None:
    """Why DALI cannot be used, or None."""
    try:
        import nvidia.dali.fn  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"nvidia.dali cannot be imported ({error})"
    return None


def _inputs_of(graph: GraphKind) -> list[str]:
    unused = set() if graph.resizes_first else {"size"}
    if graph.kind == "image":
        unused.add("frames")
    return [name for name in _INPUTS if name not in unused]


def build_pipeline(
    graph: GraphKind,
    *,
    capacity: int,
    threads: int,
    device: torch.device,
    resolution: int,
) -> Any:
    """Build the graph: decode, resize (where the view does so first), crop, resize, flip.

    Args:
        graph: which one.
        capacity: most clips in a run.
        threads: CPU threads.
        device: "cuda": decoding and all else on that GPU ("mixed"); otherwise the CPU.
        resolution: side of the output, pixels.
    """
    import nvidia.dali.fn
    import nvidia.dali.types

    dali: Any = nvidia.dali  # its stubs do not know its own constants
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    device_id = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
    linear = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    pipeline = dali.Pipeline(batch_size=capacity, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        given = {
            name: fn.external_source(name=name, ndim=_INPUTS[name][0], dtype=getattr(types, _INPUTS[name][1]))
            for name in _inputs_of(graph)
        }
        decode_device = "mixed" if on_gpu else "cpu"
        if graph.kind == "video":
            decoded = fn.decoders.video(given["encoded"], frames=given["frames"], device=decode_device)
        else:
            picture = fn.decoders.image(given["encoded"], device=decode_device, output_type=types.RGB)
            decoded = fn.expand_dims(picture, axes=0, new_axis_names="F")
        peaks = fn.reductions.max(decoded, axes=(1, 2, 3))
        viewed = fn.resize(decoded, size=given["size"], **linear) if graph.resizes_first else decoded
        viewed = fn.slice(viewed, start=given["start"], shape=given["shape"], axes=(1, 2))
        viewed = fn.resize(viewed, size=[resolution, resolution], **linear)
        frames = fn.crop_mirror_normalize(
            viewed,
            output_layout="FCHW",
            mirror=given["mirror"],
            dtype=types.UINT8,
        )
        pipeline.set_outputs(frames, peaks)
    pipeline.build()
    return pipeline


def run_pipeline(
    pipeline: Any, graph: GraphKind, device: torch.device, copies: CopyStream | None, **inputs: list[np.ndarray]
) -> tuple[list[Tensor], list[np.ndarray]]:
    """Run a graph once.

    Args:
        pipeline: from build_pipeline.
        graph: of the same pipeline.
        device: likewise.
        copies: on a GPU, a CopyStream for each pipeline; None on a CPU.
        inputs: per clip: `encoded` [bytes] uint8, `frames` [T] int32, `size` [2] float32 (height, width of the first
            resize), `start` and `shape` [2] int32 (the crop), `mirror` scalar int32.

    Returns:
        Per clip: uint8 frames [T, 3, R, R] on the device, and each decoded frame's largest value [T].

    Raises:
        RuntimeError: DALI could not decode one of the clips; the pipeline cannot be used again.
    """
    if copies is not None:
        copies.wait()  # the run below writes into the buffers that they read
    for name in _inputs_of(graph):
        pipeline.feed_input(name, inputs[name])
    frames, peaks = pipeline.run()
    outputs = [frames[number] for number in range(len(inputs["encoded"]))]
    if copies is not None:
        peaks = peaks.as_cpu()
        clips = copies.copy(outputs)
    else:
        clips = [torch.from_numpy(np.array(output)) for output in outputs]
    return clips, [np.array(peaks.at(number)) for number in range(len(clips))]


class CopyStream:
    """Copies DALI's output to tensors on a separate CUDA stream, in parallel with computation.

    DALI's next run overwrites its buffers, so call `wait` first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait for the last copies."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None

    def copy(self, outputs: list[Any]) -> list[Tensor]:
        """Start copying DALI's tensors; work queued later on the caller's stream waits for the copies."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        compute = torch.cuda.current_stream(self._device)
        clips = [torch.empty(output.shape(), dtype=torch.uint8, device=self._device) for output in outputs]
        self._stream.wait_stream(compute)  # memory that was freed before may still be read there
        for output, clip in zip(outputs, clips, strict=True):
            feed_ndarray(output, clip, cuda_stream=self._stream)
        self._done = self._stream.record_event()
        compute.wait_event(self._done)
        return clips
