"""Looking after Kafka by hand or from a sensor: consumer lag by group, and validation of messages.

The state of the topics themselves is :func:`clinical_orchestration.ingestion.kafka.monitor_topics`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from clinical_orchestration.transforms.messages import RULES, validate_message

SHOWN_FAULTS = 20
"""So many broken messages are described one by one; all are counted."""


class GroupAdmin(Protocol):
    """What consumer lag needs to know from Kafka."""

    def groups(self) -> dict[str, str]:
        """Return state by group."""
        ...

    def group_offsets(self, group: str) -> dict[tuple[str, int], int]:
        """Return the next offset of a group by (topic, partition)."""
        ...

    def lag(self, group: str, topics: Iterable[str]) -> dict[tuple[str, int], int]:
        """Return by (topic, partition) how far the group is behind."""
        ...


@dataclass(frozen=True)
class GroupLag:
    """How far one consumer group is behind the end of one topic.

    Attributes:
        state: as the broker says: ``stable``, ``empty`` (offsets without members), ``dead`` ...
        partitions: offsets behind, by partition.
    """

    group: str
    state: str
    topic: str
    partitions: Mapping[int, int]

    @property
    def lag(self) -> int:
        """Offsets behind, over all partitions."""
        return sum(self.partitions.values())


def consumer_lag(
    admin: GroupAdmin, *, groups: Iterable[str] | None = None, topics: Iterable[str] | None = None
) -> list[GroupLag]:
    """Return the lag of consumer groups on the topics that they have offsets of, the largest first.

    Args:
        admin: Kafka.
        groups: only these; default: all that the broker knows.
        topics: only these; default: all of the group's.

    Raises:
        LookupError: one of `groups` is not known to the broker.
        KafkaUnavailableError: no broker answers.
    """
    states = admin.groups()
    names = sorted(states) if groups is None else list(groups)
    unknown = sorted(set(names) - set(states))
    if unknown:
        known = ", ".join(sorted(states)) or "none"
        raise LookupError(f"there is no consumer group {', '.join(unknown)}; the broker knows: {known}")
    wanted = None if topics is None else set(topics)
    found: list[GroupLag] = []
    for name in names:
        mine = sorted({topic for topic, _ in admin.group_offsets(name) if wanted is None or topic in wanted})
        behind = admin.lag(name, mine)
        found += [
            GroupLag(name, states[name], topic, {number: lag for (of, number), lag in behind.items() if of == topic})
            for topic in mine
        ]
    return sorted(found, key=lambda item: (-item.lag, item.group, item.topic))


@dataclass(slots=True)
class ValidationReport:
    """What the contract says about a number of messages.

    Attributes:
        reasons: rule -> number of messages that break it.
        faults: (line, or 1-based place in the file; reasons) of the first broken messages. Reasons repeat no text of
            the message, so they hold no patient identifier.
    """

    domain: str
    checked: int = 0
    invalid: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    faults: list[tuple[int, list[str]]] = field(default_factory=list)

    @property
    def valid(self) -> int:
        """Messages that the contract accepts."""
        return self.checked - self.invalid

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {
            "domain": self.domain,
            "checked": self.checked,
            "valid": self.valid,
            "invalid": self.invalid,
            "reasons": self.reasons,
            "faults": [{"line": line, "reasons": reasons} for line, reasons in self.faults],
        }


def validate_messages(
    domain: str, messages: Iterable[bytes | str | Mapping[str, object]], *, now: datetime | None = None
) -> ValidationReport:
    """Check messages against the contract of a domain.

    Args:
        domain: bronze table that the messages are for.
        messages: as received, or already read.
        now: when they were received (UTC); default: now.

    Raises:
        LookupError: there is no such domain.
    """
    return _validate(domain, enumerate(messages, 1), now)


def validate_file(path: Path, domain: str | None = None, *, now: datetime | None = None) -> ValidationReport:
    """Check the messages of a file: one JSON object a line, or one JSON array of objects.

    Args:
        path: the file.
        domain: bronze table, or topic of the default names; default: told from the file's name, such as
            ``patient-vitals.jsonl``.
        now: when the messages were received (UTC); default: now.

    Raises:
        LookupError: the domain is not known, or the file's name does not tell it.
        OSError: the file cannot be read.
    """
    name = domain_of(domain or path.name)
    content = path.read_bytes()
    if content.lstrip()[:1] == b"[":
        try:
            items = json.loads(content)
        except ValueError as error:
            return ValidationReport(name, 1, 1, {"json": 1}, [(1, [f"json: the array cannot be read ({error})"])])
        # given back to text, so that each is judged exactly as it would be from the topic
        return _validate(name, ((place, json.dumps(item)) for place, item in enumerate(items, 1)), now)
    lines = ((number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip())
    return _validate(name, lines, now)


def domain_of(name: str) -> str:
    """Return the bronze domain of a domain's, a topic's or a file's name.

    Raises:
        LookupError: the name begins with none of them.
    """
    text = name.lower().replace("-", "_")
    for domain in sorted(RULES, key=len, reverse=True):
        if text.startswith(domain):
            return domain
    raise LookupError(f"{name!r} tells no domain; give one of {', '.join(sorted(RULES))}")


def _validate(
    domain: str, messages: Iterable[tuple[int, bytes | str | Mapping[str, object]]], now: datetime | None
) -> ValidationReport:
    if domain not in RULES:
        raise LookupError(f"there is no domain {domain!r}; there are {', '.join(sorted(RULES))}")
    report = ValidationReport(domain)
    counts: Counter[str] = Counter()
    for place, message in messages:
        reasons = validate_message(domain, message, now=now)
        report.checked += 1
        if reasons:
            report.invalid += 1
            counts.update({reason.partition(":")[0] for reason in reasons})
            if len(report.faults) < SHOWN_FAULTS:
                report.faults.append((place, reasons))
    report.reasons = dict(counts.most_common())
    return report
