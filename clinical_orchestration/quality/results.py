"""What checks find: counts by rule, never a patient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SAMPLE = 10
"""How many source positions of failing records a result names."""


@dataclass(frozen=True)
class RuleResult:
    """What one rule found in one table.

    Attributes:
        name: the statement that the rule asserts, in snake_case.
        description: the same for people.
        blocking: whether what is downstream must stop when it fails; else it is a warning.
        checked: rows (or groups) looked at.
        failed: of these, how many break the rule.
        tolerance: largest share of failures that still passes.
        rule: id of the rule in the rule table of the documentation; empty for the basic rules of a silver table.
        table: the silver table, or SDTM domain, that was looked at.
        positions: up to :data:`SAMPLE` source positions of failing records, for those who look them up.
        groups: name of the group (site, test) -> failures, most first; empty where the rule does not group.
    """

    name: str
    description: str
    blocking: bool
    checked: int
    failed: int
    tolerance: float = 0.0
    rule: str = ""
    table: str = ""
    positions: tuple[str, ...] = ()
    groups: dict[str, int] = field(default_factory=dict)

    @property
    def failed_share(self) -> float:
        """Share of what was checked that fails; 0.0 where nothing was checked."""
        return self.failed / self.checked if self.checked else 0.0

    @property
    def passed(self) -> bool:
        """Whether the share of failures is within the tolerance."""
        return self.failed_share <= self.tolerance

    def metadata(self) -> dict[str, int | float | str]:
        """Return counts and the description, for a check's metadata."""
        return {
            "description": self.description,
            "checked": self.checked,
            "failed": self.failed,
            "failed_share": self.failed_share,
            "tolerance": self.tolerance,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return what a later step and the report need, as plain JSON types."""
        return {
            "rule": self.rule,
            "name": self.name,
            "table": self.table,
            "description": self.description,
            "severity": "error" if self.blocking else "warning",
            "checked": self.checked,
            "failed": self.failed,
            "failed_share": round(self.failed_share, 6),
            "tolerance": self.tolerance,
            "passed": self.passed,
            "positions": list(self.positions),
            "groups": dict(list(self.groups.items())[:SAMPLE]),
        }
