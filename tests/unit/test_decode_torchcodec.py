"""torchcodec on a machine without FFmpeg: a plain message, and a way to give it the PyAV wheel's libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from frozen_fast.data.decode import build_decoder, torchcodec, unavailable_backends
from frozen_fast.data.decode.ffmpeg_libraries import link_ffmpeg_libraries
from frozen_fast.errors import UserError

needs_absence = pytest.mark.skipif(torchcodec.missing() is None, reason="torchcodec works here as it is")
SETTINGS = {"device": "cpu", "resolution": 64, "threads": 1, "max_pixels": 10**6}


def test_links_are_complete_and_shadow_no_library_of_the_system(tmp_path: Path) -> None:
    for _ in range(2):
        folder = link_ffmpeg_libraries(tmp_path / "links")
    names = sorted(link.name for link in folder.iterdir())
    assert all(link.resolve().is_file() for link in folder.iterdir())
    short = [name for name in names if "-" not in name]
    assert {name.split(".so.")[0] for name in short} == {
        "libavcodec",
        "libavdevice",
        "libavfilter",
        "libavformat",
        "libavutil",
        "libswresample",
        "libswscale",
    }


@needs_absence
def test_a_missing_ffmpeg_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="got torchcodec, but torchcodec finds no FFmpeg shared libraries") as caught:
        build_decoder("torchcodec", **SETTINGS)
    assert "\n" not in str(caught.value) and "ffmpeg_libraries" in str(caught.value)
    assert "torchcodec" in unavailable_backends()


@pytest.mark.slow
@needs_absence
def test_torchcodec_with_the_wheels_libraries(tmp_path: Path) -> None:
    """The backends' tests, torchcodec's and auto's share, in a process that finds FFmpeg."""
    root = Path(__file__).parents[2]
    script = [sys.executable, "-m", "frozen_fast.data.decode.ffmpeg_libraries", str(tmp_path / "links")]
    paths = os.pathsep.join([str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    folder = subprocess.run(script, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")]))
    which = ["tests/unit/test_decode_backends.py", "-k", "torchcodec and (same_frame or bad_clip or noise or level)"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
