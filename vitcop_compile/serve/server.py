"""A door in a process of its own: uvicorn, which ends only when all who were let in are answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..errors import ConfigError
from .door import Door
from .openai import create_app

_log = logging.getLogger("vitcop_compile")
# Seconds for connections to close once nobody is inside.
_LAST = 5
# Seconds for schedulers to end after that: a step takes less, and one that hangs would hold the process for ever.
_ENDING = 15


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds an address, and does not listen yet. Raises ConfigError where it is taken or none of this host's."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port} is none: give one from 0 to 65535, 0 for any that is free")
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, number)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
    except OSError as error:
        said = error.strerror or error
        raise ConfigError(f"{host}:{port} cannot be served at ({said}): choose another --port or --host") from None
    return found


def url_of(held: socket.socket) -> str:
    """Where it is reached."""
    host, port = held.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves a door until SIGTERM or SIGINT: then new requests get 503, and it ends when the door is drained, or `drain`
    seconds later, when what is inside is cancelled. A second signal does not wait. A scheduler that does not end then is left:
    the process exits with 1. ready: called once it listens."""

    def __init__(self, door: Door, drain: float = 60.0, access_log: bool = False, ready: Callable[[], None] | None = None):
        level = "info" if access_log else "warning"
        super().__init__(
            uvicorn.Config(create_app(door), access_log=access_log, log_level=level, timeout_graceful_shutdown=_LAST)
        )
        self._door, self._drain, self._ready = door, drain, ready
        self._signals = 0
        self._until = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, and `ready`."""
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, which closes the door last, within bounds."""
        watching = asyncio.ensure_future(self._watch())
        try:
            await super().shutdown(sockets)
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def _watch(self) -> None:
        """Ends the process if the schedulers do not: threads that hang cannot be ended, and Python waits for them."""
        door = self._door
        end = door.clock() + _LAST + _ENDING
        while door.clock() <= end or (self._signals == 1 and door.clock() <= self._until):
            await asyncio.sleep(0.1)
        _log.error("a scheduler did not end within %d s of the shutdown: the process is left with it", _LAST + _ENDING)
        os._exit(1)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal. What follows from it takes locks that the code which was interrupted may hold."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's, ten times a second, and what signals ask for."""
        door = self._door
        if self._signals and not door.closing:
            door.shut()
            self._until = door.clock() + self._drain
        if self._signals > 1 or (door.closing and door.clock() > self._until):
            if not door.cancelled:
                door.cancel()
                self._until = door.clock() + _LAST
            elif door.clock() > self._until:
                self.should_exit = True
        if door.drained:
            self.should_exit = True
        return await super().on_tick(counter)
