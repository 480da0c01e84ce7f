"""Whether a run belongs to the instance and the code that a warm parent holds: short marks that both sides compute."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from dagster._serdes import serialize_value

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from dagster._core.code_pointer import CodePointer


def instance_mark(instance: DagsterInstance) -> str:
    """Return a mark that two instances share when they were read from one `dagster.yaml`."""
    return hashlib.sha256(serialize_value(instance.get_ref()).encode()).hexdigest()


def code_mark(pointer: CodePointer, executable: str | None) -> str:
    """Return a mark of what is loaded, from where, by which Python."""
    packed: Any = pointer
    return hashlib.sha256(f"{executable} {serialize_value(packed)}".encode()).hexdigest()
