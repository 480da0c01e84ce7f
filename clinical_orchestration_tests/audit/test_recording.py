"""The order of things: the intent first, then the change, then its end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from clinical_orchestration.api.app import OPERATIONS, Operation
from clinical_orchestration.api.call import Call
from clinical_orchestration.api.recording import ChangeLog, changes
from clinical_orchestration.audit.recording import change, connection_value, refused, variable_value
from clinical_orchestration.audit.trail import AuditEntry, AuditError

ENTRY = AuditEntry("patch_dag", "ada", "api", dag_id="d", old={"is_paused": False}, new={"is_paused": True})


class Records:
    """Keeps entries; `fails` says from which on it does not."""

    def __init__(self, fails: Callable[[int], bool] = lambda number: False) -> None:
        self.entries: list[AuditEntry] = []
        self._fails = fails

    def record(self, entry: AuditEntry) -> int:
        if self._fails(len(self.entries) + 1):
            raise AuditError("the disk is full")
        self.entries.append(entry)
        return len(self.entries)


def test_a_change_has_a_beginning_and_an_end() -> None:
    records = Records()
    with change(records, ENTRY) as ending:
        assert [one.event for one in records.entries] == ["patch_dag"]
        ending.new, ending.run_id = {"is_paused": True}, "made"
    first, last = records.entries
    assert first is ENTRY
    assert (last.event, last.extra, last.run_id, last.new) == ("patch_dag.done", {"begun": 1}, "made", ending.new)
    assert (last.who, last.dag_id, last.origin) == ("ada", "d", "api")


def test_a_failed_change_says_so_without_the_text_of_the_error() -> None:
    records = Records()
    with pytest.raises(LookupError), change(records, ENTRY):
        raise LookupError("a secret")
    assert records.entries[-1].event == "patch_dag.failed"
    assert records.entries[-1].extra == {"begun": 1, "error": "LookupError"}


def test_what_cannot_be_recorded_is_not_begun() -> None:
    begun = False
    with pytest.raises(AuditError), change(Records(lambda number: True), ENTRY):
        begun = True
    assert not begun


def test_an_end_that_cannot_be_recorded_does_not_undo_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    records = Records(lambda number: number == 2)
    with change(records, ENTRY):
        pass
    assert [one.event for one in records.entries] == ["patch_dag"]
    assert "the end of change 1" in caplog.text


def test_a_refusal_is_one_row_and_stands_without_it(caplog: pytest.LogCaptureFixture) -> None:
    records = Records()
    refused(records, ENTRY)
    assert [one.event for one in records.entries] == ["patch_dag.refused"]
    refused(Records(lambda number: True), ENTRY)
    assert "was not recorded" in caplog.text


def test_values_of_connections_and_variables_are_masked() -> None:
    shown = connection_value({"host": "h", "password": "tiger", "extra": '{"any": "tiger"}', "login": None})
    assert shown == {"host": "h", "password": "***", "extra": "***", "login": None}
    assert variable_value({"key": "slack_webhook_url", "value": "tiger"})["value"] == "***"
    assert variable_value({"key": "model_name", "value": "x"})["value"] == "x"


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if changes(one)], ids=lambda one: one.name)
def test_every_changing_operation_is_recorded_without_secrets(operation: Operation) -> None:
    records = Records()
    body = {"key": "my_secret", "password": "tiger-2", "conf": {"token": "tiger-3"}, "note": "n"}
    path = dict.fromkeys(re.findall(r"{(\w+)", operation.path), "²")  # a digit, but no number
    call = Call(path, content=json.dumps(body).encode(), user="ada", client="::1")

    def handler(name: str) -> Callable[[Call], Any]:
        return lambda asked: {"dag_run_id": "made"} if name == operation.name else {}

    ChangeLog(records, handler).run(operation, call)
    begun, done = records.entries
    assert (begun.who, begun.origin, begun.address) == ("ada", "api", "::1")
    assert (done.event, done.run_id) == (f"{begun.event}.done", "made")
    assert "tiger" not in str([one.values() for one in records.entries])
    assert '"note":"n"' in str(begun.values()["new"])
