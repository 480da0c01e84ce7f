"""Ports that stacks pick: free, and never the same for two stacks that start at the same moment."""

import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clinical_orchestration.stack import ports
from clinical_orchestration.stack.model import StackError
from clinical_orchestration.stack.ports import Reservations, port_is_free
from clinical_orchestration.stack.settings import INTERNAL_PORTS, PUBLIC_PORTS, StackSettings

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reservations are abstract Unix sockets")
PICK = "from clinical_orchestration.stack.ports import Reservations as R; r = R(); print(r.{call}, flush=True); input()"


@pytest.fixture
def three_ports(monkeypatch: pytest.MonkeyPatch) -> int:
    """Leave three ports to pick from; return the first."""
    looking = Reservations()
    while True:
        first = looking.pick()
        if all(looking.reserve(port) and port_is_free(port) for port in (first + 1, first + 2)):
            break
    looking.close()
    monkeypatch.setattr(ports, "FIRST", first)
    monkeypatch.setattr(ports, "LAST", first + 2)
    return first


def other_process(call: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PICK.format(call=call)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(three_ports: int) -> Iterator["subprocess.Popen[str]"]:
    """Give another process that has reserved the first port and listens on nothing."""
    process = other_process(f"reserve({three_ports})")
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_listening_port_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)


@linux_only
def test_a_port_that_another_process_reserved_is_not_picked(three_ports: int, holder: "subprocess.Popen[str]") -> None:
    mine = Reservations()

    assert {mine.pick(), mine.pick()} == {three_ports + 1, three_ports + 2}
    with pytest.raises(StackError, match="no free port"):
        mine.pick()


@linux_only
def test_a_killed_process_keeps_no_reservation(three_ports: int, holder: "subprocess.Popen[str]") -> None:
    mine = Reservations()
    assert not mine.reserve(three_ports)

    holder.kill()
    holder.wait()

    assert mine.reserve(three_ports)


def test_a_port_is_not_picked_twice_and_not_where_somebody_listens(three_ports: int) -> None:
    with socket.create_server(("127.0.0.1", three_ports)):
        mine = Reservations()
        assert {mine.pick(), mine.pick()} == {three_ports + 1, three_ports + 2}


@linux_only
def test_two_stacks_loaded_at_once_share_no_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = dict.fromkeys((*PUBLIC_PORTS, *INTERNAL_PORTS), 0)
    monkeypatch.setattr(ports, "LAST", ports.FIRST + 99)
    drawn = iter([*range(20), *range(100)])
    monkeypatch.setattr(secrets, "randbelow", lambda _: next(drawn))

    one = StackSettings.load(tmp_path / "one", ports=zero)
    two = StackSettings.load(tmp_path / "two", ports=zero)

    assert not set(one.ports.values()) & set(two.ports.values())


@linux_only
def test_released_ports_can_be_taken_over(tmp_path: Path) -> None:
    zero = dict.fromkeys((*PUBLIC_PORTS, *INTERNAL_PORTS), 0)
    settings = StackSettings.load(tmp_path, ports=zero)
    successor = Reservations()
    port = settings.ports["s3"]
    assert not successor.reserve(port)

    settings.release_ports()

    assert successor.reserve(port)
    settings.hold_ports()  # what is held elsewhere is left there
    assert not Reservations().reserve(port)
