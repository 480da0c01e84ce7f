"""The way of an event from a step to the storage, without processes; and the end of a session."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterEvent, DagsterEventType
from dagster._core.events.log import EventLogEntry
from dagster._core.execution.plan.objects import StepFailureData
from dagster._core.storage.event_log import InMemoryEventLogStorage

from clinical_orchestration.execution.relay import Frame, GroupedEvents, Inbox, RelayClosedError, RelayedEvents
from clinical_orchestration.execution.sessions import kill_session

RUN = "run"


class Storage(InMemoryEventLogStorage):
    """Notes how events come in."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[str]] = []
        self.broken = False

    def store_event(self, event: EventLogEntry) -> None:
        """Note one."""
        self.store_event_batch([event])

    def store_event_batch(self, events: Sequence[EventLogEntry]) -> None:
        """Note several."""
        if self.broken:
            raise ConnectionError("the database is away")
        self.groups.append([event.user_message for event in events])

    def get_logs_for_run(self, run_id: str, *_: Any, **__: Any) -> Any:
        """Return all that is stored."""
        return [message for group in self.groups for message in group]


def _entry(message: str, kind: DagsterEventType | None = None, run_id: str = RUN) -> EventLogEntry:
    data = StepFailureData(None, None) if kind is DagsterEventType.STEP_FAILURE else None  # type: ignore[no-untyped-call]
    event = DagsterEvent(kind.value, "job", step_key="step", event_specific_data=data) if kind else None
    return EventLogEntry(
        error_info=None,
        level=10,
        user_message=message,
        run_id=run_id,
        timestamp=1.0,
        step_key="step",
        job_name="job",
        dagster_event=event,
    )


def test_events_are_stored_together_and_before_a_read() -> None:
    storage = Storage()
    events = GroupedEvents(storage)

    events.store_event(_entry("a"))
    events.store_event(_entry("b"))
    assert storage.groups == []
    assert events.handles_run_events_in_store_event is False  # no read
    assert storage.groups == []

    assert events.get_logs_for_run(RUN) == ["a", "b"]
    assert storage.groups == [["a", "b"]]


@pytest.mark.parametrize("kind", [DagsterEventType.STEP_FAILURE, DagsterEventType.RUN_SUCCESS])
def test_failures_and_events_of_the_run_do_not_wait(kind: DagsterEventType) -> None:
    storage = Storage()
    events = GroupedEvents(storage)

    events.store_event_batch([_entry("before"), _entry("now", kind), _entry("after")])

    assert storage.groups == [["before", "now"]]


def test_what_could_not_be_stored_is_said_at_once_and_is_stored_later() -> None:
    storage = Storage()
    events = GroupedEvents(storage)
    storage.broken = True
    events.store_event(_entry("a"))

    with pytest.raises(ConnectionError):
        events.flush()
    storage.broken = False
    events.flush()

    assert storage.groups == [["a"]]


def _frames(inbox: Inbox, number: int) -> list[Frame]:
    deadline, found = time.monotonic() + 5, list[Frame]()
    while len(found) < number and time.monotonic() < deadline:
        found += inbox.frames()
        time.sleep(0.001)
    return found


def test_a_step_goes_on_when_its_start_and_what_it_wants_to_read_are_stored() -> None:
    ours, theirs = socket.socketpair()
    inbox, storage = Inbox(ours), Storage()
    relay = RelayedEvents(storage, theirs, RUN)
    reached = []

    def step() -> None:
        relay.store_event(_entry("log line"))
        relay.store_event(_entry("start", DagsterEventType.STEP_START))
        reached.append("started")
        relay.store_event(_entry("elsewhere", run_id="other"))
        relay.get_logs_for_run(RUN)
        reached.append("read")

    thread = threading.Thread(target=step)
    thread.start()
    first = _frames(inbox, 2)
    assert [(frame.event.user_message if frame.event else None, frame.waits) for frame in first] == [
        ("log line", False),
        ("start", True),
    ]
    assert reached == []
    inbox.answer()
    [reading] = _frames(inbox, 1)
    assert (reading.event, reading.waits, reached) == (None, True, ["started"])
    inbox.answer()
    thread.join(5)

    assert reached == ["started", "read"]
    assert storage.groups == [["elsewhere"]]  # of a run that this worker knows nothing of


def test_large_events_arrive_whole_and_halves_never() -> None:
    ours, theirs = socket.socketpair()
    inbox, relay = Inbox(ours), RelayedEvents(Storage(), theirs, RUN)
    text = "x" * 3_000_000
    thread = threading.Thread(target=lambda: relay.store_event(_entry(text)))
    thread.start()
    [frame] = _frames(inbox, 1)
    thread.join(5)
    assert frame.event is not None
    assert frame.event.user_message == text

    theirs.sendall((100).to_bytes(8, "big") + b"only a part")
    theirs.close()
    assert inbox.frames(all_of_them=True) == []


def test_a_step_whose_worker_is_gone_says_so() -> None:
    ours, theirs = socket.socketpair()
    relay = RelayedEvents(Storage(), theirs, RUN)
    ours.close()

    with pytest.raises(RelayClosedError):
        relay.everything_is_stored()


def test_a_session_ends_with_all_its_groups() -> None:
    script = (
        "import os, subprocess, sys, time\n"
        "os.setsid()\n"
        "one = subprocess.Popen(['sleep', '600'], process_group=0)\n"
        "other = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "print(one.pid, other.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        member, stranger = (int(word) for word in leader.stdout.readline().split())
        leader.kill()
        os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)

        assert kill_session(leader.pid) == 1

        deadline = time.monotonic() + 5
        while _state(member) not in ("", "Z") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _state(member) in ("", "Z")
        assert _state(stranger) == "S"
        os.kill(stranger, signal.SIGKILL)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
