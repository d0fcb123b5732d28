"""Bind the port, start the worker, serve until SIGINT or SIGTERM; answers that are being written may end first."""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from dsgpt.checkpoint.inference import Loaded
from dsgpt.errors import ConfigError
from dsgpt.generate.chat import Chat
from dsgpt.serve.app import Server
from dsgpt.serve.worker import Worker

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
_SECONDS_TO_END = 30
_MORE_CONNECTIONS = 128  # than answers that run or wait: those being read, or asking for models and health


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises ConfigError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()  # from here on another server is told that the port is taken
    except (OSError, OverflowError) as error:
        bound.close()
        code = getattr(error, "errno", None)
        if code == errno.EADDRINUSE:
            do = "--port with another one; 0 takes a free one"
            raise ConfigError("the port is in use", seen=f"{host}:{port}", do=do) from error
        do = "an address of this machine, and a port above 1023"
        raise ConfigError("this address cannot be served", seen=f"{host}:{port}: {error}", do=do) from error
    return bound


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    loaded: Loaded,
    name: str,
    chat: Chat | None,
    bound: socket.socket,
    batch_size: int,
    max_waiting: int,
    api_key: str | None,
    allowed_hosts: tuple[str, ...],
    ready: Callable[[str], None],
) -> None:
    """Serve until a signal; `ready` is called with the address once requests are answered."""
    worker = Worker(loaded, batch_size, max_waiting)
    hosts = (*LOOPBACK_NAMES, *allowed_hosts) if is_loopback(bound.getsockname()[0]) else allowed_hosts or ("*",)
    app = Server(loaded, name, chat, worker, api_key).app(hosts)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_SECONDS_TO_END,
        limit_concurrency=batch_size + max_waiting + _MORE_CONNECTIONS,
    )
    host, port = bound.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host

    class Told(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """As uvicorn's, which raises the signal again at the end: here a server that was stopped has done its work."""
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready(f"http://{address}:{port}/v1")

    try:
        Told(config).run(sockets=[bound])
    finally:
        worker.close()
