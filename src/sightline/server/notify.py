"""What systemd hears of a unit of `Type=notify`: sd_notify(3), datagrams to the socket that `$NOTIFY_SOCKET` names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

# Loading may take minutes: each step of it asks for this much more time before systemd gives the start up.
_EXTENSION = 120


class ServiceManager:
    """Silent where nobody asks. A datagram that cannot be sent is dropped: nothing depends on being heard."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        # a name that begins with @ is in the abstract namespace
        self._address = env.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        watched = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog = int(env.get("WATCHDOG_USEC", 0)) / 1e6 if watched else 0.0
        self._said = ""

    def loading(self, status: str) -> None:
        """Progress, shown by `systemctl status`."""
        if status != self._said:
            self._said = status
            self._send(f"STATUS={status}\nEXTEND_TIMEOUT_USEC={_EXTENSION}000000")

    def ready(self, status: str) -> None:
        """A request would run."""
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self, status: str) -> None:
        """The unit ends in order."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    async def watchdog(self) -> None:
        """For ever, twice in each `WatchdogSec=`: the event loop turns. Returns at once without one."""
        while self._address and self._watchdog:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / 2)

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as out,
        ):
            out.sendto(message.encode(), self._address)
