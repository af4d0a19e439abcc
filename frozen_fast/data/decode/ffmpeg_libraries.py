"""Provides the FFmpeg libraries of the PyAV wheel to torchcodec, on machines without the ffmpeg package.

`python -m frozen_fast.data.decode.ffmpeg_libraries [FOLDER]` creates a folder of links to the libraries in the
installed `av` wheel, with the names that torchcodec looks for, and prints it. Start Python with
LD_LIBRARY_PATH set to it: the loader reads that variable at the start of a process.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from pathlib import Path

from frozen_fast.errors import UserError

_FFMPEG = ("avcodec", "avdevice", "avfilter", "avformat", "avutil", "swresample", "swscale")
_WHEEL_NAME = re.compile(r"lib([A-Za-z0-9]+)-[0-9a-f]{8}\.so\.(\d+)")


def link_ffmpeg_libraries(folder: Path) -> Path:
    """Fill a folder with links to the `av` wheel's libraries and return it.

    The FFmpeg libraries get the names that programs ask for (libavutil.so.60); what they need keeps the wheel's
    own names, so that no library of the system is shadowed.

    Raises:
        UserError: there is no `av` wheel with FFmpeg libraries.
    """
    spec = importlib.util.find_spec("av")
    libraries = Path(spec.origin).parent.parent / "av.libs" if spec is not None and spec.origin else None
    if libraries is None or not libraries.is_dir():
        raise UserError("av: got no wheel with FFmpeg libraries; allowed: pip install av, from a wheel, on Linux")
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries.iterdir():
        match = _WHEEL_NAME.match(library.name)
        names = [library.name]
        if match and match[1] in _FFMPEG:
            names.append(f"lib{match[1]}.so.{match[2]}")
        for name in names:
            link = folder / name
            if not link.is_symlink() or link.readlink() != library:
                link.unlink(missing_ok=True)
                link.symlink_to(library)
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="ffmpeg-libraries-"))
    sys.stdout.write(f"{link_ffmpeg_libraries(target.absolute())}\n")
