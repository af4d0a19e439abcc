"""What `accelerate launch`, `torchrun` and plain python start: the same as `frozen-fast train`."""

import sys

from frozen_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], program="train.py"))
