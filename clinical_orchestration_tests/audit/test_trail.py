"""The trail in a real PostgreSQL: what the superuser does to it is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from clinical_orchestration.audit import anchor
from clinical_orchestration.audit.chain import GENESIS, STORED, Row, link
from clinical_orchestration.audit.trail import ANCHOR, AuditEntry, AuditError, AuditTrail, Filter
from clinical_orchestration.platform.crypto import new_key
from clinical_orchestration.platform.database import StoreUnavailableError
from clinical_orchestration_tests.audit.rows import START, entries

pytestmark = pytest.mark.integration

DOCS = Path(__file__).resolve().parents[2] / "docs" / "audit.md"


def as_superuser(database: str, *statements: str, guarded: bool = False) -> None:
    """Carry out statements with the trigger switched off, and on again."""
    switch = "alter table clinical_audit {} trigger clinical_audit_append_only"
    around = ("", "") if guarded else (switch.format("disable"), switch.format("enable always"))
    with psycopg2.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("select rolsuper from pg_roles where rolname = current_user")
        assert cursor.fetchone() == (True,)
        for statement in (around[0], *statements, around[1]):
            if statement:
                cursor.execute(statement)
    connection.close()


def filled(trail: AuditTrail, count: int = 8) -> list[Row]:
    for entry in entries(count):
        trail.record(entry)
    return list(trail.rows())


def finding(trail: AuditTrail) -> tuple[int, str]:
    found = trail.verify().verdict.finding
    assert found is not None
    return found.seq, found.what


def test_what_is_recorded_is_read_back_and_verifies(trail: AuditTrail) -> None:
    assert trail.verify().ok, "before the table is there"
    assert list(trail.rows()) == []
    assert trail.record(AuditEntry("é€", "ada", "api", address="::1", dag_id="d", map_index=3, new={"x": "ü"})) == 1
    rows = filled(trail)
    assert [row.seq for row in rows] == list(range(1, 10))
    assert (rows[0].event, rows[0].map_index, rows[0].previous) == ("é€", 3, GENESIS)
    report = trail.verify()
    assert (report.ok, report.notes) == (True, ())
    assert (report.verdict.rows, report.verdict.signed, report.verdict.anchored) == (9, 9, 9)


@pytest.mark.parametrize(
    "statement",
    [
        "update clinical_audit set who = 'x'",
        "delete from clinical_audit where seq = 3",
        "truncate clinical_audit",
        "set session_replication_role = replica; delete from clinical_audit",
        "insert into clinical_audit select * from clinical_audit on conflict (seq) do update set who = 'x'",
    ],
)
def test_the_table_takes_new_rows_only(trail: AuditTrail, database: str, statement: str) -> None:
    filled(trail)
    with pytest.raises(psycopg2.Error, match="takes new rows only"):
        as_superuser(database, statement, guarded=True)
    assert trail.verify().ok


RENUMBER = "update clinical_audit set seq = -seq where seq > 4; update clinical_audit set seq = -seq - 1 where seq < 0"
SWAP = (
    "update clinical_audit set seq = 100 where seq = 3; update clinical_audit set seq = 3 where seq = 5;"
    "update clinical_audit set seq = 5 where seq = 100"
)
FORGED = (
    "insert into clinical_audit select 9, at, event, who, origin, address, dag_id, task_id, run_id, map_index,"
    " try_number, old, new, extra, key_id, hash, hash, mac from clinical_audit where seq = 8"
)


@pytest.mark.parametrize(
    ("statements", "row", "what"),
    [
        (["update clinical_audit set who = 'x' where seq = 4"], 4, "changed"),
        (["update clinical_audit set at = at + interval '1 microsecond' where seq = 4"], 4, "changed"),
        (["update clinical_audit set old = old || ' ' where seq = 8"], 8, "changed"),
        (["update clinical_audit set new = null where seq = 1"], 1, "changed"),
        (["update clinical_audit set mac = null where seq = 4"], 4, "not signed"),
        (["delete from clinical_audit where seq = 4"], 4, "removed"),
        (["delete from clinical_audit where seq = 4", RENUMBER], 4, "does not follow"),
        (["delete from clinical_audit where seq = 1"], 1, "removed"),
        (["delete from clinical_audit where seq > 6"], 7, "removed"),
        (["delete from clinical_audit"], 1, "removed"),
        (["drop table clinical_audit cascade"], 1, "removed"),
        ([SWAP], 3, "does not follow"),
        ([FORGED], 9, "changed"),
    ],
)
def test_tampering_as_superuser_is_found(
    trail: AuditTrail, database: str, statements: list[str], row: int, what: str
) -> None:
    filled(trail)
    if statements[0].startswith("drop"):
        as_superuser(database, *statements, guarded=True)
    else:
        as_superuser(database, *statements)
    seq, text = finding(trail)
    assert seq == row
    assert what in text


def rewritten(row: Row, previous: str, **more: Any) -> Row:
    made = replace(row, previous=previous, who="somebody else", **more)
    return replace(made, hash=link(vars(made)))


@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
def test_a_whole_chain_rewritten_with_right_hashes_is_found(
    trail: AuditTrail, database: str, stripped: bool, anchored: bool
) -> None:
    rows = filled(trail)
    forged: list[Row] = []
    for row in rows:
        more = {"key_id": None, "mac": None} if stripped else {}
        forged.append(rewritten(row, forged[-1].hash if forged else GENESIS, **more))
    with psycopg2.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("alter table clinical_audit disable trigger all; delete from clinical_audit")
        for made in forged:
            values = [getattr(made, name) for name in STORED]
            cursor.execute(f"insert into clinical_audit values ({', '.join(['%s'] * len(STORED))})", values)  # noqa: S608
        cursor.execute("alter table clinical_audit enable always trigger clinical_audit_append_only")
    connection.close()
    key = os.environ["CLINICAL_FERNET_KEY"]
    if anchored:  # without the key: the anchor alone
        assert finding(AuditTrail(database, keys=""))[0] == 1
        return
    assert trail.anchor is not None
    for path in trail.anchor.path.parent.iterdir():
        path.unlink()
    trail.record(entries(1)[0])  # the anchor begins anew, as if nothing had been
    assert AuditTrail(database, keys="").verify().ok, "the chain alone is right"
    assert finding(AuditTrail(database, keys=key))[0] == 1


def test_a_trigger_that_is_off_or_gone_is_told(trail: AuditTrail, database: str) -> None:
    filled(trail)
    as_superuser(database, "alter table clinical_audit disable trigger clinical_audit_append_only", guarded=True)
    assert "trigger" in finding(trail)[1]
    as_superuser(database, "alter table clinical_audit enable trigger clinical_audit_append_only", guarded=True)
    assert "trigger" in finding(trail)[1], "it does not act in every session"
    as_superuser(database, "alter table clinical_audit enable always trigger clinical_audit_append_only", guarded=True)
    assert trail.verify().ok
    nothing = (
        "create or replace function clinical_audit_refuse() returns trigger language plpgsql as 'begin return new; end'"
    )
    as_superuser(database, nothing, guarded=True)
    assert "trigger" in finding(trail)[1]


def test_an_anchor_that_is_gone_is_told(trail: AuditTrail) -> None:
    filled(trail)
    assert trail.anchor is not None
    trail.anchor.path.unlink()
    assert "anchor" in finding(trail)[1]


def test_rows_taken_off_stay_missed_when_the_trail_grows_again(
    trail: AuditTrail, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(trail)
    as_superuser(database, "delete from clinical_audit where seq > 6")
    monkeypatch.setattr(anchor, "FULL_BYTES", 500)
    filled(trail, 20)
    seq, text = finding(trail)
    assert (seq, "rewritten" in text) == (7, True)


def test_a_crash_between_row_and_anchor_is_no_tampering(
    trail: AuditTrail, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(trail, 3)
    monkeypatch.delenv("CLINICAL_HOME")
    AuditTrail(database).record(entries(1)[0])
    assert trail.verify().ok
    trail.record(entries(1)[0])
    assert trail.verify().verdict.anchored == 5


def test_what_cannot_be_looked_at_is_said(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLINICAL_HOME")
    monkeypatch.setenv("CLINICAL_FERNET_KEY", "")
    bare = AuditTrail(database)
    bare.record(entries(1)[0])
    report = bare.verify()
    assert report.ok
    assert [note.partition(":")[0] for note in report.notes] == [
        "signatures were not checked", "rows taken off the end cannot be told",
    ]  # fmt: skip
    keyed = AuditTrail(database, keys=new_key())
    keyed.record(entries(1)[0])
    assert finding(keyed) == (1, "not signed: it was recorded by somebody without the key, or before there was one")
    assert keyed.verify(unsigned_up_to=1).ok


def test_old_rows_stay_valid_when_the_old_key_is_gone(database: str) -> None:
    old, new = new_key(), new_key()
    AuditTrail(database, keys=old).record(entries(1)[0])
    both = AuditTrail(database, keys=f"{new},{old}")
    both.record(entries(1)[0])
    assert both.verify().ok
    assert finding(AuditTrail(database, keys=new))[0] == 1
    assert both.keep_keys() == 2
    assert AuditTrail(database, keys=new).verify().verdict.signed == 2
    newer = new_key()
    assert AuditTrail(database, keys=f"{newer},{new}").keep_keys() == 3
    assert AuditTrail(database, keys=newer).verify().ok
    with psycopg2.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("update clinical_audit_key set wrapped = 'x'")
    connection.close()
    assert finding(AuditTrail(database, keys=newer))[0] == 1


def test_writers_at_once_make_one_chain(trail: AuditTrail, database: str) -> None:
    shared = [trail, *(AuditTrail(database) for _ in range(3))]
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for entry in entries(25):
                shared[number % 4].record(replace(entry, who=f"thread{number}"))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    report = trail.verify()
    assert (report.ok, report.verdict.rows, report.verdict.anchored) == (True, 200, 200)
    assert {row.who for row in trail.rows()} == {f"thread{number}" for number in range(8)}


def test_recording_takes_milliseconds(trail: AuditTrail) -> None:
    trail.record(entries(1)[0])
    times = []
    for entry in entries(200):
        began = time.perf_counter()
        trail.record(entry)
        times.append((time.perf_counter() - began) * 1000)
    times.sort()
    sys.stdout.write(
        f"\nrecord: median {times[100]:.2f} ms, p99 {times[197]:.2f} ms, {1000 / (sum(times) / 200):.0f} rows/s\n"
    )
    assert times[100] < 25


def test_a_connection_that_the_server_ended_costs_no_record(trail: AuditTrail, database: str) -> None:
    trail.record(entries(1)[0])
    with psycopg2.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
                       " and pid <> pg_backend_pid()")  # fmt: skip
    connection.close()
    time.sleep(0.2)
    assert trail.record(entries(1)[0]) == 2
    child = os.fork()
    if child == 0:
        os._exit(0 if trail.record(entries(1)[0]) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert trail.record(entries(1)[0]) == 4
    assert trail.verify().ok


def test_without_a_database_or_a_place_for_the_anchor_nothing_may_be_changed(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AuditError, match="nothing may be changed") as refused:
        AuditTrail("postgresql://u:tiger@127.0.0.1:9/x").record(entries(1)[0])
    assert "tiger" not in str(refused.value)
    with pytest.raises(AuditError, match="POSTGRES_URL"):
        AuditTrail("").record(entries(1)[0])
    with pytest.raises(AuditError, match="CLINICAL_FERNET_KEY"):
        AuditTrail(database, keys="broken").record(entries(1)[0])
    with pytest.raises(StoreUnavailableError):
        AuditTrail("postgresql://127.0.0.1:9/x").verify()
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path / "taken"))
    with pytest.raises(AuditError, match="anchor"):
        AuditTrail(database).record(entries(1)[0])


def test_rows_are_filtered_ordered_and_paged(trail: AuditTrail) -> None:
    filled(trail)
    trail.record(AuditEntry("login", "ada", "page", when=START + timedelta(hours=1)))

    def seqs(only: Filter, *more: Any) -> list[int]:
        return [row.seq for row in trail.page(only, *more)[0]]

    everything = Filter()
    assert seqs(everything) == list(range(1, 10))
    assert seqs(everything, "-event_log_id", 2, 1) == [8, 7]
    assert trail.page(everything, "when", 2, 1)[1] == 9
    assert seqs(everything, "owner", 1) == [9]
    assert seqs(Filter(who="user3")) == [4]
    assert seqs(Filter(event="login")) == seqs(Filter(included=["login", "x"])) == [9]
    assert seqs(Filter(excluded=["patch_dag"])) == [9]
    assert seqs(Filter(dag_id="d", after=START + timedelta(seconds=5))) == [7, 8]
    assert seqs(Filter(before=START + timedelta(seconds=2))) == [1, 2]
    assert seqs(Filter(who="nul\x00")) == []
    assert [row.seq for row in trail.rows(Filter(after=START + timedelta(minutes=1)))] == [9]
    found = trail.row(9)
    assert found is not None
    assert found.event == "login"
    assert trail.row(10) is None
    assert trail.row(2**70) is None


@pytest.fixture
def published(database: str, tmp_path: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    """The verification of the docs, as somebody without this software runs it."""
    text = DOCS.read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(source.splitlines()) <= 20
    script = tmp_path / "verify.py"
    script.write_text(source)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-I", str(script), database], check=False, capture_output=True, text=True
        )

    return run


def test_the_published_script_verifies_the_chain(
    trail: AuditTrail, database: str, published: Callable[[], subprocess.CompletedProcess[str]]
) -> None:
    rows = filled(trail)
    trail.record(AuditEntry("é\u20ac\U0001f600", "ünï", "api", try_number=2, extra={"a": [1.5, None, True]}))
    done = published()
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"9 rows; the last hash is {list(trail.rows())[-1].hash}\n"
    assert rows[0].hash in {row.previous for row in rows}
    as_superuser(database, "update clinical_audit set new = '{}' where seq = 5")
    found = published()
    assert (found.returncode, found.stderr) == (1, "row 5 was changed, removed or put elsewhere\n")


def test_the_anchor_lies_in_the_home(trail: AuditTrail, tmp_path: Path) -> None:
    filled(trail, 1)
    assert (tmp_path / ANCHOR).exists()
