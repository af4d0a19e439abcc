"""What `accelerate launch`, `torchrun` and plain python start: the same as `frozen-fast train`."""

import sys
from importlib.util import find_spec
from pathlib import Path

from frozen_fast.cli.main import main

if __name__ == "__main__":
    if find_spec("frozen_kernels") is None:  # a checkout that is not installed
        sys.path.append(str(Path(__file__).resolve().parent / "kernels"))
    sys.exit(main(["train", *sys.argv[1:]], program="train.py"))
