"""`train.py` whose decoding never ends at one step: what a stuck disk or a defect in a decoder looks like.

    STUCK_AT_STEP=3 [STUCK_IN=read|decode] python stuck_train.py --config FILE

Loader processes import this file too, so the patches hold in them.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from frozen_fast.data.decode import threaded
from frozen_fast.data.load import training_loader

_original_read = training_loader.ClipReader.read
_step = [0]


def _read(self: training_loader.ClipReader, spec: Any) -> Any:
    _step[0] = spec.step
    if os.environ.get("STUCK_IN", "read") == "read":
        _sleep_at_the_step()
    return _original_read(self, spec)


_original_decode_one = threaded.ThreadedDecoder.decode_one


def _decode_one(self: threaded.ThreadedDecoder, request: Any) -> Any:
    if os.environ.get("STUCK_IN", "read") == "decode":
        _sleep_at_the_step()
    return _original_decode_one(self, request)


def _sleep_at_the_step() -> None:
    if _step[0] >= int(os.environ["STUCK_AT_STEP"]):
        time.sleep(3600)


training_loader.ClipReader.read = _read  # type: ignore[method-assign]
threaded.ThreadedDecoder.decode_one = _decode_one  # type: ignore[method-assign]

if __name__ == "__main__":
    from frozen_fast.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]], program="train.py"))
