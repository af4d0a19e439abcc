"""Decoding of clips: one protocol, four backends, and errors that name the clip and the cause."""

from frozen_fast.data.decode.backends import BACKENDS, build_decoder, unavailable_backends
from frozen_fast.data.decode.probe import probe
from frozen_fast.data.decode.types import (
    Cause,
    ClipError,
    Decoded,
    Decoder,
    DecodeRequest,
    Kind,
    TestView,
    TrainView,
    VideoInfo,
)

__all__ = [
    "BACKENDS",
    "Cause",
    "ClipError",
    "DecodeRequest",
    "Decoded",
    "Decoder",
    "Kind",
    "TestView",
    "TrainView",
    "VideoInfo",
    "build_decoder",
    "probe",
    "unavailable_backends",
]
