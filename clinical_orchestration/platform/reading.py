"""What acts now: the rows of PostgreSQL, read at most once a second, and connections in the environment.

A database that does not answer is no error here: the last rows this process has seen go on acting, or none, with one
warning until it answers again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clinical_orchestration.platform.connection import Connection, ConnectionFormatError

if TYPE_CHECKING:
    from clinical_orchestration.platform.store import StoredConnection, StoredVariable

_logger = logging.getLogger(__name__)

KEEP_SECONDS = 1.0
"""So long rows are used again; a step asks for variables many times in a moment."""

RETRY_SECONDS = 10.0
"""A database that did not answer is not asked again before this time has passed."""

CONNECTION_PREFIX = "AIRFLOW_CONN_"
"""``AIRFLOW_CONN_<ID>``: a connection as URI or JSON, before the one that is stored."""


@dataclass
class _Rows:
    variables: Mapping[str, StoredVariable]
    connections: Mapping[str, StoredConnection]
    read_at: float
    failed: bool


_cache: dict[str, _Rows] = {}
_warned: set[str] = set()
_lock = threading.Lock()


def forget() -> None:
    """Drop what was read: the next reader asks the database."""
    _cache.clear()


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it at the fork
    forget()


os.register_at_fork(after_in_child=_in_child)


def warn_once(key: str, message: str) -> None:
    """Log a warning, once until :func:`cleared`."""
    if key not in _warned:
        _warned.add(key)
        _logger.warning(message)


def cleared(key: str) -> None:
    """The reason of a warning is gone; it will be said again when it comes back."""
    _warned.discard(key)


def stored_variables(url: str | None = None) -> Mapping[str, StoredVariable]:
    """Return the variables of PostgreSQL by key; empty without a database."""
    return _rows(url).variables


def stored_connections(url: str | None = None) -> Mapping[str, StoredConnection]:
    """Return the connections of PostgreSQL by id; empty without a database."""
    return _rows(url).connections


def environment_connection(conn_id: str) -> Connection | None:
    """Return the connection that ``AIRFLOW_CONN_<ID>`` gives, as URI or JSON; None where it is not set.

    Raises:
        ConnectionFormatError: it cannot be read; the message names the variable, not its value.
    """
    name = f"{CONNECTION_PREFIX}{conn_id.upper()}"
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        return Connection.from_json(conn_id, text) if text.startswith("{") else Connection.from_uri(conn_id, text)
    except ConnectionFormatError as error:
        raise ConnectionFormatError(f"{name}: {error}") from None


def _rows(url: str | None) -> _Rows:
    from clinical_orchestration.platform.store import PlatformStore, StoreUnavailableError, address

    url = os.environ.get("POSTGRES_URL", "") if url is None else url
    if not url:
        return _Rows({}, {}, 0.0, False)
    known = _cache.get(url)
    if known is not None and time.monotonic() - known.read_at < (RETRY_SECONDS if known.failed else KEEP_SECONDS):
        return known
    with _lock:
        known = _cache.get(url)
        if known is not None and time.monotonic() - known.read_at < (RETRY_SECONDS if known.failed else KEEP_SECONDS):
            return known
        key = f"database {address(url)}"
        try:
            variables, connections = PlatformStore(url).everything()
        except StoreUnavailableError as error:
            instead = "the values read before go on acting" if known else "environment and defaults act alone"
            warn_once(key, f"variables and connections cannot be read: {error}; {instead}")
            rows = _Rows(
                known.variables if known else {}, known.connections if known else {}, time.monotonic(), failed=True
            )
        else:
            cleared(key)
            rows = _Rows(variables, connections, time.monotonic(), failed=False)
        _cache[url] = rows
        return rows
