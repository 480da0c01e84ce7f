"""Who looks at the page, and what the page offers to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from clinical_orchestration.api.app import OPERATIONS

if TYPE_CHECKING:
    from starlette.requests import Request

    from clinical_orchestration.users.identity import Identity


@dataclass(frozen=True)
class Visitor:
    """A visitor with the token that its changes carry; without an identity there is no login, and all is allowed.

    What is offered follows from what the API would allow: the API decides again on each change.
    """

    identity: Identity | None
    csrf_token: str

    @property
    def name(self) -> str:
        """User name; empty without a login."""
        return self.identity.name if self.identity else ""

    @property
    def roles(self) -> str:
        """Names of the roles, with commas."""
        return ", ".join(self.identity.roles) if self.identity else ""

    def may(self, action: str, resource: str) -> bool:
        """Return whether the visitor may do `action` with `resource`, by Airflow's names."""
        return self.identity is None or self.identity.may(action, resource)

    def can(self, operation: str) -> bool:
        """Return whether the API would let the visitor call one of its operations.

        Raises:
            KeyError: there is no such operation.
        """
        return all(self.may(action, resource) for action, resource in _permissions()[operation])


@cache
def _permissions() -> dict[str, tuple[tuple[str, str], ...]]:
    return {operation.name: operation.permissions for operation in OPERATIONS}


def visitor_of(request: Request) -> Visitor:
    """Return who makes a request, as the door in front of the page found out."""
    return Visitor(
        getattr(request.state, "identity", None), str(getattr(request.state, "csrf_token", None) or "")
    )  # fmt: skip
