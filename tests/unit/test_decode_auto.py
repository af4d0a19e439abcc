"""How `auto` chooses, and what it does when its choice fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from frozen_fast.data.decode import ClipError, Decoded, DecodeRequest, TestView, auto
from frozen_fast.data.decode.auto import AutoDecoder
from support import videos


class Fake:
    """A decoder that notes what it was given, and fails on the paths it is told to."""

    def __init__(self, name: str, fails: Sequence[str] = ()) -> None:
        self.name, self.fails, self.given, self.closed = name, fails, [], False

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        self.given += [Path(request.path).name for request in requests]
        return [
            ClipError("decode_failed", f"{self.name} cannot", request.path)
            if Path(request.path).name in self.fails
            else Decoded(torch.zeros(1), self.name)
            for request in requests
        ]

    def close(self) -> None:
        self.closed = True


def run(folder: Path, device: str, missing: dict[str, str], fails: Sequence[str] = ()) -> tuple[list, dict[str, Fake]]:
    fakes: dict[str, Fake] = {}

    def make(name: str) -> Fake:
        assert name not in fakes
        return fakes.setdefault(name, Fake(name, fails if name == "dali" else ()))

    decoder = AutoDecoder(make, missing.get, device=torch.device(device), max_pixels=10**7)
    clips = [videos.vp9(folder), videos.h264_with_b_frames(folder), videos.mpeg4_avi(folder)]
    requests = [DecodeRequest(path, "video", (0,), TestView(8)) for path in clips]
    requests.append(DecodeRequest(videos.picture(folder), "image", (0,), TestView(8)))
    outcomes = decoder.decode(requests)
    decoder.close()
    assert all(fake.closed for fake in fakes.values())
    return outcomes, fakes


def backends(outcomes: list) -> list[str]:
    return [outcome.backend for outcome in outcomes]


def test_a_gpu_gets_dali_and_files_without_times_get_pyav(tmp_path: Path) -> None:
    assert backends(run(tmp_path, "cuda", {})[0]) == ["dali", "dali", "pyav", "dali"]


def test_a_cpu_gets_the_first_of_its_order(tmp_path: Path) -> None:
    first, second = auto._CPU_ORDER[:2]
    assert backends(run(tmp_path, "cpu", {})[0]) == [first, first, "pyav", "pyav"]
    assert backends(run(tmp_path, "cpu", {first: "gone"})[0]) == [second, second, "pyav", "pyav"]
    assert backends(run(tmp_path, "cuda", {"dali": "gone"})[0]) == [first, first, "pyav", "pyav"]


def test_what_dali_cannot_decode_gets_a_second_chance_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "_said", set())
    with caplog.at_level(logging.WARNING):
        outcomes, fakes = run(tmp_path, "cuda", {"pyav": "it is not installed"}, fails=("vp9.webm",))
        run(tmp_path, "cuda", {"pyav": "it is not installed"}, fails=("vp9.webm",))
    assert backends(outcomes) == ["pyav", "dali", "pyav", "dali"]
    assert fakes["dali"].given == ["vp9.webm", "h264_b.mp4", "picture.png"]
    messages = [record.getMessage() for record in caplog.records]
    assert sum("does not use pyav: it is not installed" in message for message in messages) == 1
    assert sum("dali cannot" in message for message in messages) == 1


def test_on_a_cpu_dali_is_not_even_imported(tmp_path: Path) -> None:
    asked: list[str] = []
    AutoDecoder(Fake, lambda name: asked.append(name), device=torch.device("cpu"), max_pixels=10**7)
    assert asked == [auto._CPU_ORDER[0]]


def test_broken_files_go_to_a_decoder_that_names_the_cause(tmp_path: Path) -> None:
    decoder = AutoDecoder(Fake, {}.get, device=torch.device("cuda"), max_pixels=10**7)
    (outcome,) = decoder.decode([DecodeRequest(tmp_path / "nowhere.mp4", "video", (0,), TestView(8))])
    assert isinstance(outcome, Decoded) and outcome.backend == "pyav"
