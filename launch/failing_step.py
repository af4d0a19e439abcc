"""Run a command and simulate a GPU failure after some seconds, for `launch/gpu_bench.sh --rehearse`.

    python launch/failing_step.py FAULT@SECONDS PARENT command ...

FAULT: crash (an illegal memory access ends the command), oom (the device's memory runs out), hang (the command is
stopped where it is and never returns), kill (the process PARENT is killed too, as when a lease ends).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

MESSAGES = {
    "crash": "RuntimeError: CUDA error: an illegal memory access was encountered",
    "oom": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB",
}


def main(arguments: list[str]) -> int:
    """Start the command, wait, fail; the command's own exit code where it ends before that."""
    kind, _, seconds = arguments[0].partition("@")
    with subprocess.Popen(arguments[2:]) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):  # still running: the time to fail has come
            return process.wait(timeout=float(seconds))
        if kind == "hang":
            process.send_signal(signal.SIGSTOP)
            while True:
                time.sleep(3600)
        if kind == "kill":
            os.kill(int(arguments[1]), signal.SIGKILL)
        process.kill()
    print(MESSAGES.get(kind, "killed"), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
