"""Tables of our own in the platform's PostgreSQL: transactions on short connections, and what their failures mean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

CONNECT_TIMEOUT_SECONDS = 3
STATEMENT_TIMEOUT_MS = 5000

_LOCK = 7_260_411_905  # any fixed number
_UNDEFINED_TABLE = "42P01"  # SQLSTATE

_T = TypeVar("_T")


class StoreUnavailableError(ConnectionError):
    """PostgreSQL does not answer, or there is none; the message says where it was expected, without the password."""


class NoTableError(Exception):
    """The tables have not been made yet; each method says what that means to it."""


class Database:
    """Tables in one database, made by the first write; a read before that finds nothing.

    Each transaction opens a connection of its own and closes it, so that this may be used before and after a fork, and
    by several threads. Every method raises :class:`StoreUnavailableError` where the database does not answer.

    Args:
        url: ``postgresql://...``, as in ``POSTGRES_URL``.
    """

    tables: ClassVar[str] = ""
    """Statements that make the tables where they are absent."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({address(self._url)!r})"

    def create_tables(self) -> None:
        """Make the tables where they are absent; safe beside other processes that do the same."""
        with self._transaction() as cursor:
            # two processes that make the tables at once would else fail on PostgreSQL's own catalogue
            cursor.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
            cursor.execute(self.tables)

    def check(self) -> None:
        """Return when the database answers."""
        with self._transaction() as cursor:
            cursor.execute("select 1")

    def _read(self, ask: Callable[[Any], _T], absent: _T) -> _T:
        try:
            with self._transaction() as cursor:
                return ask(cursor)
        except NoTableError:
            return absent

    def _write(self, ask: Callable[[Any], _T]) -> _T:
        try:
            with self._transaction() as cursor:
                return ask(cursor)
        except NoTableError:
            self.create_tables()
            with self._transaction() as cursor:
                return ask(cursor)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        connection = self._connect()
        try:
            with self._within(connection) as cursor:
                yield cursor
        finally:
            connection.close()

    def _connect(self) -> Any:
        import psycopg2

        if not self._url:
            raise StoreUnavailableError("there is no PostgreSQL: POSTGRES_URL is not set")
        scheme, separator, rest = self._url.partition("://")
        try:
            return psycopg2.connect(
                f"{scheme.partition('+')[0]}{separator}{rest}", connect_timeout=CONNECT_TIMEOUT_SECONDS
            )
        except psycopg2.Error as error:
            raise StoreUnavailableError(
                f"PostgreSQL at {address(self._url)} does not answer ({_reason(error, self._url)}); start level 0 of "
                "the stack, or correct POSTGRES_URL"
            ) from None

    @contextlib.contextmanager
    def _within(self, connection: Any) -> Iterator[Any]:
        import psycopg2

        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(f"set local statement_timeout = {STATEMENT_TIMEOUT_MS}")
                yield cursor
        except psycopg2.Error as error:
            # by its code: psycopg2.errors is filled late, and a thread beside the first import finds it empty
            if error.pgcode == _UNDEFINED_TABLE:
                raise NoTableError from None
            raise StoreUnavailableError(
                f"PostgreSQL at {address(self._url)} refused or broke off ({_reason(error, self._url)})"
            ) from None


def address(url: str) -> str:
    """Return host, port and database of a URL, without login and password."""
    try:
        parts = urlsplit(url)
        return f"{parts.hostname or 'localhost'}:{parts.port or 5432}{parts.path}"
    except ValueError:
        return "an address that cannot be read"


def _reason(error: Exception, url: str) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    try:
        password = urlsplit(url).password
    except ValueError:
        return type(error).__name__  # the text may quote what could not be read
    return text.replace(password, "***") if password else text
