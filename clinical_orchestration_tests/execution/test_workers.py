"""What killed processes leave on disk, and how a run is said to have ended whose process is gone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus
from dagster._core.events import DagsterEvent
from dagster._core.events.log import EventLogEntry
from dagster._core.test_utils import create_run_for_test

from clinical_orchestration.execution.protocol import Meeting
from clinical_orchestration.execution.warm_up import store_end
from clinical_orchestration.execution.workers import Process, Worker

KILLED = "The process of the run was ended by SIGKILL."


@pytest.fixture
def meeting(tmp_path: Path) -> Meeting:
    found = Meeting(tmp_path)
    found.make()
    return found


def _ended() -> int:
    """Return the pid of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


def test_drafts_of_killed_processes_are_removed(meeting: Meeting) -> None:
    runs = meeting.folder / "runs"
    mine, others = runs / f".run.{os.getpid()}", runs / f".run.{_ended()}"
    for draft in (mine, others):
        draft.write_text("half a")
    own = Process.own()
    assert meeting.workers.add(Worker("another", own, own))
    meeting.workers.remove_drafts()
    assert not others.exists()
    assert [worker.run_id for worker in meeting.workers] == ["another"]


def test_sockets_of_killed_processes_are_removed(meeting: Meeting) -> None:
    for name in ("runs.sock", f"{_ended()}.sock"):
        meeting.listen(name).close()
    meeting.clear()
    assert os.listdir(meeting.folder) == ["runs"]


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (DagsterEventType.RUN_SUCCESS, DagsterRunStatus.SUCCESS),
        (DagsterEventType.RUN_CANCELED, DagsterRunStatus.CANCELED),
        (DagsterEventType.RUN_START, DagsterRunStatus.FAILURE),
    ],
)
def test_a_run_killed_before_its_state_was_stored_ended_as_its_last_event_says(
    said: DagsterEventType, status: DagsterRunStatus
) -> None:
    with DagsterInstance.ephemeral() as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
        event = DagsterEvent(said.value, run.job_name)
        instance.event_log_storage.store_event(
            EventLogEntry(None, "debug", "", run.run_id, timestamp=1.0, job_name=run.job_name, dagster_event=event)
        )
        store_end(instance, run.run_id, KILLED)
        ended = instance.get_run_record_by_id(run.run_id)
        assert ended is not None
        assert ended.dagster_run.status is status
        ends = [entry.dagster_event_type for entry in instance.all_logs(run.run_id) if entry.dagster_event]
        assert ends.count(DagsterEventType.RUN_FAILURE) == (status is DagsterRunStatus.FAILURE)
        if status is not DagsterRunStatus.FAILURE:
            assert ended.end_time == 1.0, "it ended when its event says"
