"""Commands that change something are recorded, and ``clinical audit`` shows, verifies and exports the trail."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from clinical_orchestration.audit.chain import STORED, Row, link
from clinical_orchestration.audit.trail import AuditTrail
from clinical_orchestration.cli import airflow, clinical
from clinical_orchestration.cli.main import main
from clinical_orchestration.cli.recording import EVENTS
from clinical_orchestration.cli.words import STACK, as_flags
from clinical_orchestration.platform.crypto import new_key
from clinical_orchestration.stack.cli import build_parser

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return command


@pytest.fixture
def trail(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AuditTrail:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    monkeypatch.delenv("CLINICAL_USER", raising=False)
    return AuditTrail(database)


def test_events_belong_to_commands_that_there_are() -> None:
    known = {
        (entry.name, command.name if command else None)
        for entry in airflow.ENTRIES
        for command in getattr(entry, "commands", (None,))
    }
    ours = {words for words in EVENTS if words[0] in clinical.GROUPS}
    assert set(EVENTS) - known <= ours
    for group, command in ours - known:
        with pytest.raises(SystemExit) as ended:
            clinical.build_parser().parse_args([group, str(command), "--help"])
        assert ended.value.code == 0


def test_words_stand_for_flags() -> None:
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    assert set(STACK.values()) <= flags
    assert as_flags(["stack", "start", "--level", "2"]) == ["--start", "--level", "2"]
    assert as_flags(["run", "model_monitoring", "--conf", "{}"]) == ["--run", "model_monitoring", "--conf", "{}"]
    assert as_flags(["quality", "--json"]) == ["data", "quality", "--json"]
    assert as_flags(["--start"]) == ["--start"]
    assert as_flags(["stack"]) == as_flags(["run"]) == as_flags(["stack", "--help"]) == ["--help"]


def test_a_stack_word_that_is_none_is_refused(run: Run) -> None:
    status, _, error = run("stack", "strat")
    assert (status, "did you mean" in error) == (2, True)


@pytest.mark.integration
class TestOnPostgres:
    """With a database."""

    def test_changes_are_recorded_with_old_and_new(self, trail: AuditTrail, tmp_path: Path) -> None:
        assert airflow.main(["variables", "set", "model_name", "a"]) == 0
        assert airflow.main(["variables", "set", "model_name", "b"]) == 0
        begun, done = list(trail.rows())[-2:]
        assert (begun.event, done.event, begun.origin) == ("cli_variables_set", "cli_variables_set.done", "cli")
        assert begun.who.startswith("os:")
        assert begun.address
        assert json.loads(begun.new or "") == {"key": "model_name", "value": "b"}
        assert (json.loads(done.old or ""), json.loads(done.new or "")) == ({"model_name": "a"}, {"model_name": "b"})
        file = tmp_path / "variables.json"
        file.write_text(json.dumps({"model_name": "c", "my_token": "tiger-1"}))
        assert airflow.main(["variables", "import", str(file)]) == 0
        done = list(trail.rows())[-1]
        assert json.loads(done.new or "") == {"model_name": "c", "my_token": "***"}
        assert airflow.main(["variables", "list"]) == 0
        assert list(trail.rows())[-1] == done, "reading is not recorded"

    def test_no_secret_of_a_connection_is_recorded(self, trail: AuditTrail) -> None:
        one = ["--conn-type", "http", "--conn-password", "tiger-1", "--conn-extra", '{"any": "tiger-2"}']
        assert airflow.main(["connections", "add", "c1", *one]) == 0
        assert airflow.main(["connections", "add", "c2", "--conn-uri", "http://u:tiger-3@h/?key=tiger-4"]) == 0
        assert airflow.main(["connections", "add", "c2", "--conn-uri", "http://u:tiger-5@h/"]) == 1
        assert airflow.main(["connections", "delete", "c1"]) == 0
        assert airflow.main(["variables", "set", "slack_webhook_url", "tiger-6"]) == 0
        rows = list(trail.rows())
        assert "tiger" not in "".join(str(vars(row)) for row in rows)
        assert [row.event for row in rows if row.event.endswith(".failed")] == ["cli_connections_add.failed"]
        deleted = next(row for row in rows if row.event == "cli_connections_delete.done")
        assert json.loads(deleted.old or "")["c1"]["password"] == "***"
        assert deleted.new is None

    def test_rotation_keeps_old_rows_valid(self, trail: AuditTrail, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
        import os

        assert airflow.main(["variables", "set", "model_name", "a"]) == 0
        new = new_key()
        monkeypatch.setenv("CLINICAL_FERNET_KEY", f"{new},{os.environ['CLINICAL_FERNET_KEY']}")
        assert airflow.main(["rotate-fernet-key"]) == 0
        monkeypatch.setenv("CLINICAL_FERNET_KEY", new)
        status, out, error = run("audit", "verify")
        assert (status, "4 rows, 4 with a checked signature" in out) == (0, True), error

    def test_what_cannot_be_recorded_is_not_done(
        self, trail: AuditTrail, database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("CLINICAL_FERNET_KEY", "broken")
        assert airflow.main(["variables", "set", "model_name", "a"]) == 1
        assert "CLINICAL_FERNET_KEY" in capsys.readouterr().err
        with psycopg2.connect(database) as connection, connection.cursor() as cursor:
            cursor.execute("select to_regclass('clinical_variable')")
            assert cursor.fetchone() == (None,)
        connection.close()

    def test_verify_names_the_first_bad_row(self, trail: AuditTrail, database: str, run: Run) -> None:
        for value in "abc":
            assert airflow.main(["variables", "set", "model_name", value]) == 0
        run("audit", "list")
        status, out, _ = run("audit", "verify")
        assert (status, out) == (0, "6 rows, 6 with a checked signature: nothing was changed\n")
        with psycopg2.connect(database) as connection, connection.cursor() as cursor:
            cursor.execute("alter table clinical_audit disable trigger all; delete from clinical_audit where seq = 3")
        connection.close()
        status, out, _ = run("audit", "verify")
        assert status == 1
        assert out.startswith("row 3: removed")
        status, out, _ = run("audit", "verify", "--json")
        answer = json.loads(out)
        assert (status, answer["ok"], answer["finding"]["row"], answer["rows"]) == (1, False, 3, 2)

    def test_verify_says_what_it_could_not_look_at(
        self, trail: AuditTrail, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert airflow.main(["variables", "set", "model_name", "a"]) == 0
        monkeypatch.setenv("CLINICAL_FERNET_KEY", "")
        monkeypatch.delenv("CLINICAL_HOME")
        status, out, _ = run("audit", "verify")
        assert (status, out.count("note: ")) == (0, 2)

    def test_list_and_export(self, trail: AuditTrail, run: Run, tmp_path: Path) -> None:
        for value in ("a", 'b,"\n'):
            assert airflow.main(["variables", "set", "model_name", value]) == 0
        run("audit", "verify")
        status, out, _ = run("audit", "list", "-n", "1", "--event", "cli_variables_set")
        assert (status, "1 of 2 rows" in out) == (0, True)
        assert [row["seq"] for row in json.loads(run("audit", "list", "--json")[1])["rows"]] == [4, 3, 2, 1]

        def rows_of(found: list[dict[str, Any]]) -> list[str]:
            from datetime import datetime

            return [link({**one, "at": datetime.fromisoformat(one["at"])}) for one in found]

        hashes = [row.hash for row in trail.rows()]
        status, out, _ = run("audit", "export", "--format", "json")
        assert (status, rows_of(json.loads(out))) == (0, hashes), "an export verifies as the table does"
        file = tmp_path / "out.csv"
        status, out, _ = run("audit", "export", "--output", str(file))
        assert (status, out) == (0, f"4 rows in {file}\n")
        assert file.stat().st_mode & 0o777 == 0o600
        with file.open(newline="") as stream:
            table = list(csv.DictReader(stream))
        assert (list(table[0]), [one["hash"] for one in table]) == (list(STORED), hashes)
        assert tuple(field.name for field in fields(Row)) == STORED
        assert json.loads(run("audit", "export", "--format", "json", "--after", "2999-01-01")[1]) == []
        status, _, error = run("audit", "export", "--output", str(tmp_path / "none" / "x"))
        assert (status, "cannot be written" in error) == (1, True)
        assert run("audit", "export", "--json")[0] == 2
        assert run("audit", "list", "--after", "never")[0] == 2
