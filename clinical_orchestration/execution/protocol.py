"""How the warm parent is asked: one JSON object each way over a Unix socket.

The socket has mode 600 and lies in a folder of mode 700; it is there only while somebody answers. It is reached by way
of the open folder, so that the length of the folder's path, which the kernel limits for sockets, does not matter.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clinical_orchestration.execution.workers import WorkerFiles

SOCKET = "runs.sock"
"""The socket that launchers ask."""

MOST_BYTES = 1 << 20
"""A longer message is none of ours."""


class ParentGoneError(Exception):
    """Nobody answers: there is no warm parent, or it ended before it had answered.

    `asked` says whether it may have read the question.
    """

    def __init__(self, message: str, *, asked: bool) -> None:
        super().__init__(message)
        self.asked = asked


class Meeting:
    """The folder where launchers and the warm parent meet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers = WorkerFiles(folder / "runs")

    def make(self) -> None:
        """Make the folder, or see to it that only this user may enter it.

        Raises:
            PermissionError: it belongs to somebody else.
        """
        (self.folder / "runs").mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{self.folder} belongs to another user; give the run launcher a folder of its own")
        self.folder.chmod(0o700)

    def clear(self) -> None:
        """Remove the sockets of processes that were killed; nobody else may be about to listen here."""
        for path in self.folder.glob("*.sock"):
            path.unlink(missing_ok=True)

    @contextmanager
    def _near(self, name: str) -> Iterator[str]:
        """Give a short path to a file of the folder."""
        handle = os.open(self.folder, os.O_PATH | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{handle}/{name}"
        finally:
            os.close(handle)

    def listen(self, name: str) -> socket.socket:
        """Listen on a new socket of the folder."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with self._near(name) as path:
                listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(128)
        return listener

    def publish(self, name: str) -> None:
        """Let launchers ask the socket `name` from now on."""
        os.replace(self.folder / name, self.folder / SOCKET)

    def ask(self, question: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Ask the warm parent.

        Args:
            question: JSON-able; `ask` says what for.
            timeout: seconds to wait for the answer.

        Returns:
            The answer: `error` with the reason when it could not be done.

        Raises:
            ParentGoneError: nobody is there.
            TimeoutError: no answer in time.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            try:
                if self.folder.stat().st_uid != os.geteuid():
                    raise ParentGoneError(f"{self.folder} belongs to another user", asked=False)
                with self._near(SOCKET) as path:
                    connection.connect(path)
            except OSError as error:
                raise ParentGoneError(f"no answer at {self.folder / SOCKET} ({error.strerror})", asked=False) from None
            try:
                send(connection, question)
                answer = receive(connection)
            except ConnectionError as error:
                raise ParentGoneError(f"the warm parent went away ({error})", asked=True) from None
        if answer is None:
            raise ParentGoneError("the warm parent went away before it answered", asked=True)
        return answer


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send one message."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Wait for one message; None when the other side has closed instead.

    Raises:
        ValueError: what came is no message.
    """
    data = bytearray()
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            return None
        data += part
        if len(data) > MOST_BYTES:
            raise ValueError(f"a message of more than {MOST_BYTES} bytes")
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("a message is a JSON object")
    return message
