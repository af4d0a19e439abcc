"""Restarts of ranks by torch's launcher after the loss of one (max_restarts of torchrun and accelerate launch).

With the static rendezvous, the default of `accelerate launch`, the launcher uses one key-value store for all starts.
After a restart, ranks read the addresses of the former ranks from it and cannot connect (PyTorch 2.10,
github.com/pytorch/pytorch/issues/135712).
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from datetime import timedelta

from torch.distributed import TCPStore

_WAIT_SECONDS = 300.0


def use_a_new_store(environ: MutableMapping[str, str]) -> None:
    """Give the ranks of a restart a new store; call this before initialising the process group.

    Rank 0 publishes its port in the launcher's store. On several machines nothing changes: their launchers count starts
    separately, and launch/multi_node.sh uses the c10d rendezvous, which creates a store for each start.

    Args:
        environ: the launcher's variables; MASTER_PORT and TORCHELASTIC_USE_AGENT_STORE are changed.
    """
    start = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if start == "0" or not shared or environ.get("GROUP_WORLD_SIZE") != "1":
        return
    store = TCPStore(
        environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=_WAIT_SECONDS)
    )
    key = f"frozen_fast/start_{start}"
    if environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            store.set(key, str(free.getsockname()[1]))
    environ["MASTER_PORT"] = store.get(key).decode()
    environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
