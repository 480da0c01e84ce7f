"""A process's Spark session ends with the process, and an absent server keeps no process waiting."""

from __future__ import annotations

import atexit
import socket
from collections.abc import Callable, Iterator

import pytest

from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores import spark


class Session:
    """Answers, and counts how often it was ended."""

    def __init__(self) -> None:
        self.stops = 0
        self.conf = {"spark.sql.session.timeZone": "UTC"}

    def stop(self) -> None:
        self.stops += 1


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def at_exit(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    registered: list[Callable[[], None]] = []

    def unregister(one: Callable[[], None]) -> None:
        registered[:] = [other for other in registered if other != one]

    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(atexit, "unregister", unregister)
    return registered


def sessions_at(server: socket.socket) -> spark.SparkSessions:
    return spark.SparkSessions(ClientSettings(SPARK_REMOTE=f"sc://127.0.0.1:{server.getsockname()[1]}"))


def test_the_session_ends_with_its_process(
    server: socket.socket, at_exit: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Session()
    monkeypatch.setattr(spark, "_create", lambda remote: made)
    sessions = sessions_at(server)
    assert sessions.get() is made
    assert sessions.get() is made
    sessions.close()
    sessions.get()
    (end,) = at_exit
    end()
    assert made.stops == 2
    end()
    assert made.stops == 2, "there is nothing more to end"


def test_a_server_that_is_gone_is_not_asked(
    server: socket.socket, at_exit: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Session()
    monkeypatch.setattr(spark, "_create", lambda remote: made)
    sessions_at(server).get()
    server.close()
    at_exit[0]()
    assert made.stops == 0
