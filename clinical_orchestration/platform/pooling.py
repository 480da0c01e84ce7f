"""Pools of database connections that outlive what the server does meanwhile."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.pool import ConnectionPoolEntry

PROVEN_SECONDS = 1.0
"""A connection that was idle for longer is asked whether it still lives before it is used."""


def prove_idle_connections(engine: Engine) -> None:
    """Let the engine's pool replace a connection that died while it was idle, without an error.

    SQLAlchemy's own `pool_pre_ping` asks before every use, which doubles the round trips of a busy process.
    """
    from sqlalchemy import event

    event.listen(engine, "connect", _used)
    event.listen(engine, "checkin", _used)
    event.listen(engine, "checkout", _prove)


def _used(_: Any, record: ConnectionPoolEntry) -> None:
    record.info["used"] = time.monotonic()


def _was_sent_something(connection: Any) -> bool:
    """Return whether the server said something unasked, most likely farewell. It is the kernel that is asked."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _prove(connection: Any, record: ConnectionPoolEntry, _: Any) -> None:
    from sqlalchemy.exc import InvalidatePoolError

    try:
        if time.monotonic() - record.info.get("used", 0.0) < PROVEN_SECONDS and not _was_sent_something(connection):
            return
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        if not connection.autocommit:
            connection.rollback()
    except Exception as error:  # whatever the driver raises: the pool opens another one
        raise InvalidatePoolError from error
