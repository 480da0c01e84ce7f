"""Who asks: a name, its roles and what those permit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

How = Literal["session", "basic", "token", "system"]
"""How somebody showed who they are; `system` is the platform itself or who holds the database's credentials."""


SERVICE_NAME = "pipeline-manager"
"""The stack itself, which shows the token of ``CLINICAL_SERVICE_TOKEN``; no user may have this name."""


@dataclass(frozen=True)
class Identity:
    """A user as one request or one command sees it.

    Attributes:
        name: user name.
        roles: names of its roles.
        permissions: (action, resource) pairs by Airflow's names, such as ``("can_edit", "DAGs")``.
        how: how the user showed who it is.
    """

    name: str
    roles: tuple[str, ...]
    permissions: frozenset[tuple[str, str]]
    how: How

    def may(self, action: str, resource: str) -> bool:
        """Return whether the user may do `action` (`can_edit`) with `resource` (`DAGs`)."""
        return (action, resource) in self.permissions
