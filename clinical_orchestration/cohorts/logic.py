"""Kleene's three-valued logic: what a criterion says when some of the data is missing.

Kleene, *Introduction to Metamathematics* (1952), section 64: a conjunction with a false part is false and a disjunction
with a true part is true whatever the unknown parts are; in every other case an unknown part makes the whole unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Truth(StrEnum):
    """Whether a criterion is met; ``&``, ``|`` and ``~`` combine truths."""

    MET = "met"
    NOT_MET = "not met"
    UNKNOWN = "unknown"

    @classmethod
    def of(cls, value: bool | None) -> Truth:
        """Return the truth of a Python value, None being unknown."""
        return cls.UNKNOWN if value is None else cls.MET if value else cls.NOT_MET

    def __and__(self, other: Truth) -> Truth:
        return every((self, other))

    def __or__(self, other: Truth) -> Truth:
        return some((self, other))

    def __invert__(self) -> Truth:
        return _NEGATED[self]


_NEGATED = {Truth.MET: Truth.NOT_MET, Truth.NOT_MET: Truth.MET, Truth.UNKNOWN: Truth.UNKNOWN}


def every(truths: Iterable[Truth]) -> Truth:
    """Return the conjunction; met where there is nothing to meet."""
    found = set(truths)
    if Truth.NOT_MET in found:
        return Truth.NOT_MET
    return Truth.UNKNOWN if Truth.UNKNOWN in found else Truth.MET


def some(truths: Iterable[Truth]) -> Truth:
    """Return the disjunction; not met where there is nothing that could be met."""
    found = set(truths)
    if Truth.MET in found:
        return Truth.MET
    return Truth.UNKNOWN if Truth.UNKNOWN in found else Truth.NOT_MET


def at_least(truths: Iterable[Truth], count: int) -> Truth:
    """Return whether at least `count` (1 or more) of the truths are met; with 1 it is :func:`some`."""
    found = list(truths)
    met = found.count(Truth.MET)
    if met >= count:
        return Truth.MET
    return Truth.NOT_MET if met + found.count(Truth.UNKNOWN) < count else Truth.UNKNOWN
