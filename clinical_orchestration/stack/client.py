"""What the command line and the page use of the stack.

* :func:`start` brings a stack up to a level and returns when all of it answers.
* :func:`stop` stops levels, or everything; data stays. :func:`clean` removes the data of a stopped stack.
* :func:`status` reads what the supervisor last saw (milliseconds); :func:`health` asks every service itself, now.
* :func:`install_jars` downloads what Kafka and Spark's connectors need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clinical_orchestration.stack.model import (
    LEVELS,
    MAX_LEVEL,
    Event,
    OnEvent,
    ServiceStatus,
    StackError,
    StackStatus,
    State,
)

if TYPE_CHECKING:
    from clinical_orchestration.stack.settings import StackSettings

__all__ = [
    "LEVELS",
    "MAX_LEVEL",
    "Event",
    "OnEvent",
    "ServiceStatus",
    "StackError",
    "StackStatus",
    "State",
    "clean",
    "health",
    "install_jars",
    "start",
    "status",
    "stop",
]


def start(settings: StackSettings, level: int = MAX_LEVEL, on_event: OnEvent | None = None) -> StackStatus:
    """Bring levels 0 to ``level`` up and return when every service answers.

    Levels that already run are left alone. Raises :class:`StackError` with cause and cure: a taken port, an
    unwritable or full folder, a missing program, a service that does not get ready in time (the others stay up).
    """
    from clinical_orchestration.stack import control

    return control.start(settings, level, on_event)


def stop(settings: StackSettings, level: int | None = None, on_event: OnEvent | None = None) -> StackStatus:
    """Stop ``level`` and all above it (``None``: everything, the supervisor too); data stays.

    Stopping a stopped stack does nothing. Raises :class:`StackError` when a process could not be ended.
    """
    from clinical_orchestration.stack import control

    return control.stop(settings, level, on_event)


def status(settings: StackSettings) -> StackStatus:
    """Return what the supervisor last saw; all services ``stopped`` when none runs."""
    from clinical_orchestration.stack import control

    return control.status(settings)


def health(settings: StackSettings, level: int = MAX_LEVEL) -> StackStatus:
    """Ask every service of levels 0 to ``level`` itself, now and in parallel; the supervisor's word is not taken."""
    from clinical_orchestration.stack import control

    return control.health(settings, level)


def clean(settings: StackSettings) -> None:
    """Stop the stack and remove all its data, logs and secrets. The settings (ports) and downloaded jars stay."""
    from clinical_orchestration.stack import control

    control.clean(settings)


def install_jars(settings: StackSettings, on_event: OnEvent | None = None) -> bool:
    """Download what is missing of the locked jars; return whether all are there.

    Raises :class:`StackError` where the Maven repository cannot be reached or a file does not match its checksum.
    """
    from clinical_orchestration.stack import control

    return control.install_jars(settings, on_event)
