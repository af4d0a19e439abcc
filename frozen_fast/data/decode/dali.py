"""DALI: decode, crop, resize and flip in one pipeline on the training device.

Each clip has its own list of frame numbers. DALI decodes a file from its start to the last requested frame (see
excerpt.py), and may return black frames if decoding fails, so black frames are checked with PyAV.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from frozen_fast.data.decode.dali_pipeline import CopyStream, GraphKind, build_pipeline, run_pipeline
from frozen_fast.data.decode.excerpt import Excerpt, cheapest, whole_file
from frozen_fast.data.decode.geometry import Box, stored_box, view_steps
from frozen_fast.data.decode.pictures import is_plain_jpeg
from frozen_fast.data.decode.probe import clip_index, probe
from frozen_fast.data.decode.pyav import read_frames
from frozen_fast.data.decode.threaded import ThreadedDecoder, check_frame_indices, untimed
from frozen_fast.data.decode.threads import DaemonPool
from frozen_fast.data.decode.types import ClipError, Decoded, DecodeRequest, TestView
from frozen_fast.errors import UserError

CPU_CODECS = frozenset(("vp8", "vp9", "mjpeg"))
GPU_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg"))
# An excerpt costs some 1 ms (96 x 96) to 5 ms (456 x 256), which is what decoding a few frames costs.
_EXCERPT_SAVING_FRAMES = 16
_BATCH_CLIPS = 64
_BATCH_BYTES = {"cpu": 256 * 1024 * 1024, "cuda": 1024 * 1024 * 1024}  # decoded frames of one pipeline run
_BLACK = 2  # of 255: no pixel of a frame is brighter


def _reason(error: RuntimeError) -> str:
    """The line of DALI's long error report with the cause."""
    text = " ".join(str(error).split())
    return text.rpartition("encountered: ")[2].partition(" C++ context")[0][:300]


@dataclass(frozen=True)
class Job:
    """A request prepared for the pipeline; sizes and boxes in stored pixels."""

    request: DecodeRequest
    graph: GraphKind
    source: Excerpt
    size: tuple[int, int]
    box: Box
    flip: bool
    rotation_degrees: int
    decoded_bytes: int


class DaliDecoder:
    """The `dali` backend. Pictures that are not plain JPEG go through Pillow and torchvision ("pil")."""

    name = "dali"

    def __init__(
        self,
        *,
        device: torch.device,
        resolution: int,
        threads: int,
        max_pixels: int,
        pictures: ThreadedDecoder,
        others: Sequence[str] = (),
    ) -> None:
        """Store the settings; `others` are alternative backends, for messages."""
        self._others = others
        self._device = device
        self._resolution = resolution
        self._threads = threads
        self._max_pixels = max_pixels
        self._pictures = pictures
        self._codecs = GPU_CODECS if device.type == "cuda" else CPU_CODECS
        self._process = 0
        self._pipelines: dict[tuple[GraphKind, int], tuple[object, CopyStream | None]] = {}
        self._pool = DaemonPool(threads, "dali-read")

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        """Decode a batch, in order; a bad clip gives a ClipError in its place.

        Raises:
            UserError: DALI does not support a clip's codec on this device.
        """
        if self._process != os.getpid():  # pipelines do not survive a fork
            self._pipelines, self._process = {}, os.getpid()
        outcomes: list[Job | Decoded | ClipError] = self._pool.map(self._prepare, requests)
        for places in self._batches(outcomes):
            jobs = [outcomes[place] for place in places]
            for place, outcome in zip(places, self._run([job for job in jobs if isinstance(job, Job)]), strict=True):
                outcomes[place] = outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, Job)]

    def _prepare(self, request: DecodeRequest) -> Job | Decoded | ClipError:
        path = os.fspath(request.path)
        try:
            if request.kind == "image":
                return self._prepare_picture(path, request)
            index = clip_index(path, max_pixels=self._max_pixels)
            info = index.info
            check_frame_indices(request, info.num_frames)
            self._check_codec(path, info.codec)
            if not index.seekable:
                raise untimed("DALI", path)
            source = cheapest(path, index, request.frame_indices, self._max_pixels, _EXCERPT_SAVING_FRAMES)
            size = (index.stored_height, index.stored_width)
            return self._job(request, "video", source, size, info.rotation_degrees)
        except ClipError as error:
            error.__traceback__ = None
            return error
        except OSError as error:
            return ClipError("decode_failed", f"cannot be read: {error.strerror or error}", path)

    def _prepare_picture(self, path: str, request: DecodeRequest) -> Job | Decoded | ClipError:
        info = probe(path, "image", max_pixels=self._max_pixels)
        check_frame_indices(request, info.num_frames)
        if len(request.frame_indices) > 1 or not is_plain_jpeg(path, max_pixels=self._max_pixels):
            return self._pictures.decode_one(request)
        source = whole_file(path, 1, (0,))
        return self._job(request, "image", source, (info.height, info.width), 0)

    def _check_codec(self, path: str, codec: str) -> None:
        if codec not in self._codecs:
            where = "a GPU" if self._device.type == "cuda" else "the CPU"
            raise UserError(
                f"data.decode.backend: got dali, which on {where} reads {', '.join(sorted(self._codecs))} "
                f"and not {codec} ({path}); allowed: {', '.join(['auto', *self._others])}"
            )

    def _job(self, request: DecodeRequest, kind: str, source: Excerpt, stored: tuple[int, int], rotation: int) -> Job:
        height, width = stored
        sideways = rotation in (90, 270)
        steps = view_steps(request.view, *((width, height) if sideways else (height, width)))
        upright_size = steps.size or ((width, height) if sideways else (height, width))
        size = (upright_size[1], upright_size[0]) if sideways else upright_size
        return Job(
            request=request,
            graph=GraphKind(kind, isinstance(request.view, TestView)),
            source=source,
            size=size,
            box=stored_box(steps.box, *size, rotation),
            flip=steps.flip,
            rotation_degrees=rotation,
            decoded_bytes=3 * height * width * len(request.frame_indices),
        )

    def _batches(self, outcomes: Sequence[Job | Decoded | ClipError]) -> Iterator[list[int]]:
        """Indices of jobs for each pipeline run: one graph, bounded memory."""
        limit = _BATCH_BYTES[self._device.type]
        groups: dict[GraphKind, list[int]] = {}
        filled: dict[GraphKind, int] = {}
        for place, job in enumerate(outcomes):
            if not isinstance(job, Job):
                continue
            group = groups.setdefault(job.graph, [])
            if group and (len(group) == _BATCH_CLIPS or filled[job.graph] + job.decoded_bytes > limit):
                yield group
                group = groups[job.graph] = []
            filled[job.graph] = (filled[job.graph] if group else 0) + job.decoded_bytes
            group.append(place)
        yield from (group for group in groups.values() if group)

    def _run(self, jobs: list[Job]) -> list[Decoded | ClipError]:
        """Run the pipeline; if it fails, run it for each clip, so that only the bad clip fails."""
        try:
            frames, peaks = self._run_pipeline(jobs, 1 if len(jobs) == 1 else _BATCH_CLIPS)
        except RuntimeError as error:
            if len(jobs) > 1:
                return [self._run([job])[0] for job in jobs]
            message = f"DALI cannot decode it: {_reason(error)}"
            return [ClipError("decode_failed", message, os.fspath(jobs[0].request.path))]
        return [self._finish(*clip) for clip in zip(jobs, frames, peaks, strict=True)]

    def _run_pipeline(self, jobs: list[Job], capacity: int) -> tuple[list[Tensor], list[np.ndarray]]:
        slot = (jobs[0].graph, capacity)
        if slot not in self._pipelines:
            pipeline = build_pipeline(
                jobs[0].graph,
                capacity=capacity,
                threads=self._threads,
                device=self._device,
                resolution=self._resolution,
            )
            copies = CopyStream(self._device) if self._device.type == "cuda" else None
            self._pipelines[slot] = (pipeline, copies)
        pipeline, copies = self._pipelines[slot]
        try:
            return run_pipeline(
                pipeline,
                jobs[0].graph,
                self._device,
                copies,
                encoded=[job.source.encoded for job in jobs],
                frames=[job.source.frame_indices for job in jobs],
                size=[np.array(job.size, np.float32) for job in jobs],
                start=[np.array(job.box[:2], np.int32) for job in jobs],
                shape=[np.array(job.box[2:], np.int32) for job in jobs],
                mirror=[np.array(job.flip and not job.rotation_degrees, np.int32) for job in jobs],
            )
        except RuntimeError:
            del self._pipelines[slot]  # a pipeline cannot run again after a failure
            raise

    def _finish(self, job: Job, frames_TCHW: Tensor, peak_T: np.ndarray) -> Decoded | ClipError:
        """Rotate a clip upright, and accept black frames only if PyAV decodes them too."""
        if (peak_T <= 0).any():
            problem = self._doubt(job, np.flatnonzero(peak_T <= 0))
            if problem is not None:
                return problem
        if job.rotation_degrees:
            frames_TCHW = torch.rot90(frames_TCHW, -(job.rotation_degrees // 90), dims=(-2, -1))
            frames_TCHW = (frames_TCHW.flip(-1) if job.flip else frames_TCHW).contiguous()
        return Decoded(frames_TCHW, self.name)

    def _doubt(self, job: Job, positions: np.ndarray) -> ClipError | None:
        """Decode black frames again with PyAV; return an error if they are not black or cannot be decoded."""
        path = os.fspath(job.request.path)
        if job.request.kind == "image":
            return None  # a black picture; a broken one raises
        try:
            index = clip_index(path, max_pixels=self._max_pixels)
            numbers = sorted({job.request.frame_indices[position] for position in positions})
            seen = read_frames(path, index, numbers, self._max_pixels)
        except ClipError as error:
            return error
        if seen.reshape(len(numbers), -1).max(axis=1).max() > _BLACK:
            return ClipError("decode_failed", "DALI returns black frames for frames that are not black", path)
        return None

    def close(self) -> None:
        """Free the pipelines and stop the reading threads."""
        self._pool.close()
        for _, copies in self._pipelines.values():
            if copies is not None:
                copies.wait()
        self._pipelines, self._process = {}, 0
        self._pictures.close()
