"""The trail in PostgreSQL: recording, reading, verifying.

The table ``clinical_audit`` takes new rows only: a trigger that acts in every session refuses UPDATE, DELETE and
TRUNCATE. Who may switch the trigger off is found out by :meth:`AuditTrail.verify`: rows are chained (``chain.py``),
signed with a key that is not in the database (``keys.py``), and the newest hash is kept in a file (``anchor.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clinical_orchestration.audit.anchor import Anchor
from clinical_orchestration.audit.chain import GENESIS, STORED, Finding, Row, Verdict, seal, verify
from clinical_orchestration.audit.keys import Signer, fingerprint
from clinical_orchestration.platform.crypto import FERNET_KEY, Cipher, SecretKeyError
from clinical_orchestration.platform.database import Database, NoTableError, StoreUnavailableError
from clinical_orchestration.platform.masking import redact

ANCHOR = Path("audit", "head.jsonl")
"""Where the anchor lies below ``CLINICAL_HOME``."""
LONGEST_JSON = 16_384
LONGEST_NAME = 250
BATCH = 1000

_LOCK = 7_260_411_906  # any fixed number: held while a row is added, so that the chain has one end
_TABLES = """
create table if not exists clinical_audit (
    seq bigint primary key,
    at timestamptz not null,
    event text not null,
    who text not null,
    origin text not null,
    address text not null,
    dag_id text,
    task_id text,
    run_id text,
    map_index integer,
    try_number integer,
    old text,
    new text,
    extra text,
    key_id text,
    previous text not null,
    hash text not null,
    mac text
);
create index if not exists clinical_audit_at on clinical_audit (at);
create index if not exists clinical_audit_dag on clinical_audit (dag_id, run_id);
create table if not exists clinical_audit_key (
    key_id text primary key,
    wrapped text not null
);
create or replace function clinical_audit_refuse() returns trigger language plpgsql as $$
begin
    raise exception 'clinical_audit takes new rows only: % is refused', tg_op;
end $$;
do $$
begin
    if not exists (
        select 1 from pg_trigger where tgrelid = 'clinical_audit'::regclass and tgname = 'clinical_audit_append_only'
    ) then
        create trigger clinical_audit_append_only before update or delete or truncate on clinical_audit
            for each statement execute function clinical_audit_refuse();
        alter table clinical_audit enable always trigger clinical_audit_append_only;
    end if;
end $$;
"""
_SELECT = f"select {', '.join(STORED)} from clinical_audit"  # noqa: S608 - names of our own
_COUNT = "select count(*) from clinical_audit"
_INSERT = f"insert into clinical_audit ({', '.join(STORED)}) values ({', '.join(['%s'] * len(STORED))})"  # noqa: S608
_KEPT = "a key of the audit trail"
ORDERS = {"event_log_id": "seq", "when": "at", "owner": "who", "execution_date": "seq"} | {
    name: name for name in ("dag_id", "task_id", "run_id", "event", "extra")
}
"""Column by the name that Airflow orders its event logs by."""


class AuditError(StoreUnavailableError):
    """Something cannot be recorded or read; what was to be recorded must not be done then."""


@dataclass(frozen=True)
class AuditEntry:
    """What to record.

    Attributes:
        event: what happens, by Airflow's event names where it has one: ``patch_dag``, ``connection.create``.
        who: name of the user.
        origin: by which way: ``api``, ``cli``, ``page``, ``graphql``.
        dag_id: what it is about, like the four below; None where there is none.
        task_id: see `dag_id`.
        run_id: see `dag_id`.
        map_index: see `dag_id`.
        try_number: see `dag_id`.
        old: the value before, anything that JSON can say. Secrets are masked by their names, as in the two below.
        new: the value asked for or set.
        extra: everything else.
        address: network address of who asks, or the host of a command.
        when: the moment, with its zone; default: now.
    """

    event: str
    who: str
    origin: str
    dag_id: str | None = None
    task_id: str | None = None
    run_id: str | None = None
    map_index: int | None = None
    try_number: int | None = None
    old: Any = None
    new: Any = None
    extra: Any = None
    address: str = ""
    when: datetime = field(default_factory=lambda: datetime.now(UTC))

    def values(self) -> dict[str, Any]:
        """Return the columns that the entry fills, as they are stored."""
        names = ("event", "who", "origin", "address", "dag_id", "task_id", "run_id")
        texts = {name: _name(getattr(self, name)) for name in names}
        documents = {name: _document(getattr(self, name)) for name in ("old", "new", "extra")}
        numbers = {"map_index": self.map_index, "try_number": self.try_number}
        return {"at": self.when.astimezone(UTC), **texts, **documents, **numbers}


@dataclass(frozen=True)
class Filter:
    """Which rows; None and empty let all pass. Times are exclusive bounds, as in Airflow."""

    dag_id: str | None = None
    task_id: str | None = None
    run_id: str | None = None
    map_index: int | None = None
    try_number: int | None = None
    who: str | None = None
    event: str | None = None
    included: Sequence[str] = ()
    excluded: Sequence[str] = ()
    before: datetime | None = None
    after: datetime | None = None

    def where(self) -> tuple[str, list[Any]]:
        """Return the condition in SQL and its parameters."""
        names = ("dag_id", "task_id", "run_id", "map_index", "try_number", "who", "event")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        terms: list[tuple[str, Any]] = [
            (f"{name} = %s", _name(value) if isinstance(value, str) else value) for name, value in given.items()
        ]
        if self.included:
            terms.append(("event = any(%s)", [_name(one) for one in self.included]))
        if self.excluded:
            terms.append(("event <> all(%s)", [_name(one) for one in self.excluded]))
        if self.before is not None:
            terms.append(("at < %s", self.before))
        if self.after is not None:
            terms.append(("at > %s", self.after))
        return " and ".join(term for term, _ in terms) or "true", [value for _, value in terms]


@dataclass(frozen=True)
class Report:
    """What verification found, and what it could not look at.

    Attributes:
        verdict: see :class:`clinical_orchestration.audit.chain.Verdict`.
        notes: what was not checked and why, and what that leaves open.
    """

    verdict: Verdict
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.verdict.finding is None


class AuditTrail(Database):
    """The trail in one database.

    Args:
        url: ``postgresql://...``, as in ``POSTGRES_URL``.
        keys: keys as in ``CLINICAL_FERNET_KEY``, which they default to; empty leaves rows unsigned.
        anchor: default: :data:`ANCHOR` below ``CLINICAL_HOME``; without that there is none.

    Every method raises :class:`AuditError` or :class:`StoreUnavailableError` where the database does not answer.
    """

    tables = _TABLES

    def __init__(self, url: str, keys: str | None = None, anchor: Anchor | None = None) -> None:
        super().__init__(url)
        self._keys = os.environ.get(FERNET_KEY, "") if keys is None else keys
        home = os.environ.get("CLINICAL_HOME", "")
        self.anchor = anchor or (Anchor(Path(home) / ANCHOR) if home else None)
        self._writer = _Writer(url)

    def record(self, entry: AuditEntry) -> int:
        """Add a row; it is stored when this returns. Return its number.

        Raises:
            AuditError: it is not stored, or not anchored. What was to be recorded must not be done then.
        """
        values = entry.values()
        try:
            signer = Signer.from_fernet(self._keys)
            row = self._writer.append(values, signer)
        except SecretKeyError as error:
            raise AuditError(str(error)) from None
        except StoreUnavailableError as error:
            raise AuditError(f"the audit trail cannot be written, so nothing may be changed: {error}") from None
        if self.anchor is not None:
            try:
                self.anchor.append(row, signer)
            except OSError as error:
                raise AuditError(
                    f"the audit trail's anchor {self.anchor.path} cannot be written ({error.strerror}), so nothing may "
                    "be changed; free space there, or give this user the right to write it"
                ) from None
        return row.seq

    def rows(self, only: Filter | None = None) -> Iterator[Row]:
        """Give all rows, or those that pass a filter, by their number; a thousand are in memory at a time."""
        condition, values = (only or Filter()).where()
        try:
            with self._transaction() as cursor, cursor.connection.cursor("clinical_audit_rows") as stream:
                cursor.execute("set local statement_timeout = 0")
                stream.itersize = BATCH
                stream.execute(f"{_SELECT} where {condition} order by seq", values)
                for values_of_row in stream:
                    yield Row(*values_of_row)
        except NoTableError:
            return

    def page(
        self, only: Filter, order_by: str = "event_log_id", limit: int = 100, offset: int = 0
    ) -> tuple[list[Row], int]:
        """Return some rows, and how many pass the filter.

        Args:
            only: the filter.
            order_by: a name of :data:`ORDERS`, ``-`` in front for descending.
            limit: most rows.
            offset: rows to leave out before.
        """
        condition, values = only.where()
        column = ORDERS[order_by.lstrip("-")]
        direction = "desc" if order_by.startswith("-") else "asc"

        def ask(cursor: Any) -> tuple[list[Row], int]:
            cursor.execute(f"{_COUNT} where {condition}", values)
            total = cursor.fetchone()[0]
            cursor.execute(
                f"{_SELECT} where {condition} order by {column} {direction}, seq {direction} limit %s offset %s",
                [*values, limit, offset],
            )
            return [Row(*found) for found in cursor.fetchall()], total

        nothing: tuple[list[Row], int] = ([], 0)
        return self._read(ask, nothing)

    def row(self, seq: int) -> Row | None:
        """Return one row by its number."""

        def ask(cursor: Any) -> Row | None:
            cursor.execute(f"{_SELECT} where seq = %s", (seq,))
            found = cursor.fetchone()
            return Row(*found) if found else None

        return self._read(ask, None) if 0 < seq < 2**63 else None

    def verify(self, *, unsigned_up_to: int = 0) -> Report:
        """Check the whole trail: the chain, the signatures, the anchor and the trigger.

        Args:
            unsigned_up_to: rows up to this one were recorded before there was a key.

        Raises:
            clinical_orchestration.platform.crypto.SecretKeyError: the environment has a key that is none.
        """
        signer = self._all_keys()
        notes: list[str] = []
        if signer is None:
            notes.append(
                "signatures were not checked: CLINICAL_FERNET_KEY is not set; who may write to the database could have "
                "rewritten the whole trail"
            )
        # the anchor before the rows: rows that are added meanwhile are newer than it, never missing
        anchors: dict[int, str] = {}
        forged = 0
        if self.anchor is None:
            notes.append(
                "rows taken off the end cannot be told: CLINICAL_HOME is not set, so that there is no anchor outside "
                "of the database"
            )
        else:
            try:
                read = self.anchor.read(signer)
            except OSError as error:
                raise AuditError(f"the anchor {self.anchor.path} cannot be read ({error.strerror})") from None
            anchors, forged = read.hashes, read.forged
        verdict = verify(self.rows(), signer, anchors, unsigned_up_to=unsigned_up_to)
        if verdict.finding is None:
            verdict = self._beside_the_rows(verdict, forged)
        return Report(verdict, tuple(notes))

    def _beside_the_rows(self, verdict: Verdict, forged: int) -> Verdict:
        what = ""
        if forged:
            what = "its line in the anchor is not signed with the key: somebody wrote to the file"
        elif verdict.rows and self.anchor is not None and not self.anchor.exists:
            what = f"the anchor {self.anchor.path} is gone, so that rows taken off the end cannot be told"
        elif verdict.rows and not self._guarded():
            what = "the trigger that refuses changes of the table is gone or switched off"
        if not what:
            return verdict
        return Verdict(verdict.rows, verdict.signed, verdict.anchored, Finding(forged or verdict.rows, what))

    def _guarded(self) -> bool:
        def ask(cursor: Any) -> bool:
            cursor.execute(
                "select 1 from pg_trigger t join pg_proc p on p.oid = t.tgfoid"
                " where t.tgrelid = 'clinical_audit'::regclass and t.tgname = 'clinical_audit_append_only'"
                " and t.tgenabled = 'A' and t.tgqual is null and t.tgtype = 58"  # before update, delete, truncate
                " and p.prosrc like '%raise exception%'"
            )
            return cursor.fetchone() is not None

        return self._read(ask, False)

    # --------------------------------------------------------------------------------------------------------- keys

    def keep_keys(self) -> int:
        """Keep the keys that rows may be signed with, encrypted with the newest; return how many there are.

        To be called while the old and the new key are both given; after it the old one may go.

        Raises:
            clinical_orchestration.platform.crypto.SecretKeyError: the environment has a key that is none.
        """
        signer = self._all_keys()
        if signer is None:
            return 0
        cipher = Cipher(self._keys)
        wrapped = {key_id: cipher.encrypt(key.hex(), _KEPT) for key_id, key in signer.keys.items()}

        def ask(cursor: Any) -> int:
            for pair in wrapped.items():
                cursor.execute(
                    "insert into clinical_audit_key (key_id, wrapped) values (%s, %s)"
                    " on conflict (key_id) do update set wrapped = excluded.wrapped",
                    pair,
                )
            return len(wrapped)

        return self._write(ask)

    def _all_keys(self) -> Signer | None:
        signer = Signer.from_fernet(self._keys)
        if signer is None:
            return None

        def ask(cursor: Any) -> list[tuple[str, str]]:
            cursor.execute("select key_id, wrapped from clinical_audit_key")
            return cursor.fetchall()  # type: ignore[no-any-return]

        cipher, keys = Cipher(self._keys), dict(signer.keys)
        none: list[tuple[str, str]] = []
        for key_id, wrapped in self._read(ask, none):
            # what cannot be opened was not kept by us; rows of such a key are then reported
            with contextlib.suppress(SecretKeyError, ValueError):
                key = bytes.fromhex(cipher.decrypt(wrapped, _KEPT))
                if fingerprint(key) == key_id:
                    keys[key_id] = key
        return Signer(keys, signer.current)


class _Writer(Database):
    """Adds rows over one kept connection: a connection each would cost more than the row."""

    tables = _TABLES

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._mutex = threading.Lock()
        self._kept: Any = None
        self._pid = 0

    def append(self, values: Mapping[str, Any], signer: Signer | None) -> Row:
        """Add a row at the end of the chain."""

        def ask(cursor: Any) -> Row:
            # two statements: the second must see what was added while the first waited
            cursor.execute(
                "select pg_advisory_xact_lock(%s); select seq, hash from clinical_audit order by seq desc limit 1",
                (_LOCK,),
            )
            seq, previous = cursor.fetchone() or (0, GENESIS)
            row = seal(values, seq + 1, previous, signer)
            cursor.execute(_INSERT, [getattr(row, name) for name in STORED])
            return row

        return self._write(ask)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        with self._mutex:
            connection = self._live()
            try:
                with self._within(connection) as cursor:
                    yield cursor
            except StoreUnavailableError:
                connection.close()
                raise

    def _live(self) -> Any:
        if self._pid != os.getpid():  # a child must not use, nor end, its parent's connection
            self._kept, self._pid = None, os.getpid()
        if self._kept is not None and not self._kept.closed:
            # between transactions the server says something only to take its leave
            if not select.select([self._kept], [], [], 0)[0]:
                return self._kept
            self._kept.close()
        self._kept = self._connect()
        return self._kept


def _name(text: str | None) -> str | None:
    """Return a name as PostgreSQL takes it."""
    if text is None:
        return None
    return text.replace("\x00", "\ufffd").encode(errors="replace").decode()[:LONGEST_NAME]


def _document(value: Any) -> str | None:
    """Return a value as JSON text without secrets; of one that is too long its beginning and its hash."""
    if value is None:
        return None
    text = _dump(redact(_opened(value)))
    if len(text) <= LONGEST_JSON:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()
    return _dump({"truncated": text[:2000], "length": len(text), "sha256": digest})


def _opened(value: Any) -> Any:
    """Return a value with JSON texts in it parsed, so that secrets in them have names."""
    if isinstance(value, Mapping):
        return {str(key): _opened(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_opened(inner) for inner in value]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
