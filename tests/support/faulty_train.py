"""train.py with a fault: faulty_train.py FAULT_AS_JSON, then train.py's arguments (see support.faults)."""

from __future__ import annotations

import json
import sys

import pytest

from frozen_fast.cli.main import main
from support.faults import inject

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        inject(patch, json.loads(sys.argv[1]))
        sys.exit(main(["train", *sys.argv[2:]], program="train.py"))
