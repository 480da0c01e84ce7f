"""Free TCP ports of loopback, and the reservations that keep two stacks from picking the same one.

Between picking a port and the service listening on it lie seconds. A reservation is an abstract Unix socket named after
the port: its scope is the network namespace, as the port's is, so it works across users and folders, and it is gone
when its process ends, however it ends. Where the system has no abstract sockets (not Linux), ports are picked
without one.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import sys
import time
from collections.abc import Iterable

from clinical_orchestration.stack.model import StackError

LOOPBACK = "127.0.0.1"
FIRST, LAST = 20000, 31999  # below the range that the system hands out itself
LINGER_SECONDS = 2.0
"""A killed process keeps its ports until its memory is given back; it is no longer seen as its user's then."""


class Reservations:
    """Ports that this process has reserved; they are free for others again when it is closed or collected."""

    def __init__(self) -> None:
        self._held: dict[int, socket.socket] = {}

    def reserve(self, port: int) -> bool:
        """Reserve a port; return whether it is ours now (also: was ours before)."""
        if port in self._held:
            return True
        if sys.platform != "linux":
            return True
        marker = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            marker.bind(f"\0clinical-orchestration-port-{port}")
        except OSError:
            marker.close()
            return False
        self._held[port] = marker
        return True

    def pick(self, avoid: Iterable[int] = ()) -> int:
        """Return a port that nobody listens on and nobody else reserved; it is reserved from then on.

        Raises :class:`StackError` when none is found.
        """
        taken = set(avoid)
        for _ in range(500):
            port = FIRST + secrets.randbelow(LAST - FIRST + 1)
            if port in taken or port in self._held or not self.reserve(port):
                continue
            if port_is_free(port):
                return port
            self._release(port)
        raise StackError(f"no free port found between {FIRST} and {LAST}", "Set the CLINICAL_PORT_* variables.")

    def close(self) -> None:
        """Give all ports back."""
        for port in list(self._held):
            self._release(port)

    def _release(self, port: int) -> None:
        held = self._held.pop(port, None)
        if held is not None:
            held.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of loopback now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # connections of an earlier server in TIME_WAIT do not hinder the next one
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_before(port: int, deadline: float) -> bool:
    """Whether a port is free, or becomes so before a moment of the monotonic clock."""
    while not port_is_free(port):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True
