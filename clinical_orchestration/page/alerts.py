"""What the page shows of alerts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clinical_orchestration.stores.alerts import AlertsView

SHOWN = 50


def read_alerts(postgres_url: str, limit: int = SHOWN) -> AlertsView:
    """Return open alerts, those resolved in the last seven days, at most `limit` of each, and the channels.

    Raises:
        ConnectionError: there is no database to ask; each process then keeps its alerts to itself and to the log.
        Exception: the database does not answer.
    """
    from clinical_orchestration.alerts.policy import Rules
    from clinical_orchestration.stores.alerts import PostgresAlertStore

    if not postgres_url:
        raise ConnectionError("no database is configured")
    return PostgresAlertStore(postgres_url, timeout_seconds=2.0).view(datetime.now(UTC), Rules(), limit=limit)


def browser_link(where: str) -> str | None:
    """Return `where` if a browser can open it from the page: a path of the page, or an http address."""
    if where.startswith("/") and not where.startswith("//"):
        return where
    return where if where.startswith(("http://", "https://")) else None
