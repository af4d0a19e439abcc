"""`frozen-fast serve`: a local web page that searches an index."""

from __future__ import annotations

import argparse
import socket
import sys

from frozen_fast.errors import UserError

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.add_argument("--index", required=True, metavar="INDEX", help="folder that `frozen-fast embed` wrote")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000; 0: any free port)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="additional host name that requests may use"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="path of the model, if it was moved")
    parser.add_argument("--device", default="cpu", help="device of the model (default cpu)")


def serve(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted."""
    listener = _listen(arguments.host, arguments.port)
    try:
        import uvicorn

        from frozen_fast.search import Index
        from frozen_fast.search.serve import LOCAL_HOSTS, create_app

        index = Index(arguments.index, checkpoint=arguments.checkpoint, device=arguments.device)
        app = create_app(index, [*LOCAL_HOSTS, arguments.host, *arguments.allow_host])
        if arguments.host not in LOCAL:
            print(f"warning: everyone who can connect to {arguments.host} can see the index's clips", file=sys.stderr)
        print(f"http://{arguments.host}:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    finally:
        listener.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # print the address after the socket is bound, so that clients can connect
        return listener
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host, --port: got {host}, {port} ({error}); allowed: an address of this machine and a free port"
        ) from None
