"""All sources of a trial, brought into the raw tables: files, the simulator, Kafka topics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from clinical_orchestration.ingestion.files import FileIngestReport, ingest_files
from clinical_orchestration.ingestion.kafka import TopicIngestReport, ingest_topics
from clinical_orchestration.stores.tables import TableStore

if TYPE_CHECKING:
    from clinical_orchestration.stores.kafka import Producer, TopicAdmin, TopicReader
    from clinical_orchestration.trials import TrialProfile


class Kafka(Protocol):
    """Access to the topics, as far as ingestion needs it."""

    def available(self) -> bool:
        """Return whether there is a broker at all."""
        ...

    def reader(self) -> TopicReader:
        """Return a reader; the caller closes it."""
        ...

    def admin(self) -> TopicAdmin:
        """Return an administration client; the caller closes it."""
        ...

    def producer(self) -> Producer:
        """Return a producer; the caller closes it."""
        ...


@dataclass(frozen=True)
class SourcesReport:
    """What one :func:`ingest_sources` brought. `topics` is None without a broker."""

    files: FileIngestReport
    topics: TopicIngestReport | None
    notes: list[str] = field(default_factory=list)

    @property
    def appended(self) -> int:
        """Raw rows written."""
        return self.files.appended + (self.topics.rows if self.topics else 0)

    def counts(self, domain: str) -> dict[str, int]:
        """Return rows appended to one raw table, in all and by kind of source."""
        from_files = self.files.by_table().get(domain, 0)
        topic = self.topics.topics.get(domain) if self.topics else None
        from_topics = topic.rows if topic else 0
        return {
            "appended": from_files + from_topics,
            "appended_from_files": from_files,
            "appended_from_kafka": from_topics,
        }

    def sources(self, domain: str) -> list[tuple[str, int, int, int]]:
        """Return ``(source, rows, new rows, rows known already)`` of each source of one raw table."""
        rows = [
            (file.name, file.rows, file.appended, file.already_ingested)
            for file in self.files.files
            if file.table == domain
        ]
        topic = self.topics.topics.get(domain) if self.topics else None
        if topic is not None:
            known = sum(topic.before.values())
            rows.append((f"kafka:{topic.topic}", known + topic.rows, topic.rows, known))
        return rows


def ingest_sources(
    tables: TableStore,
    kafka: Kafka,
    profile: TrialProfile,
    source: Path | None,
    topics: Mapping[str, str],
    now: datetime,
    say: Callable[[str], None],
) -> SourcesReport:
    """Bring what is new in a trial's files, simulation and topics into ``bronze/*``.

    Args:
        tables: the lakehouse.
        kafka: the broker, which may be missing.
        profile: the trial; messages without a label of their own are its records.
        source: folder of SDTM files instead of the profile's.
        topics: raw table -> topic.
        now: time of ingestion, UTC.
        say: takes one line of progress at a time.

    Raises:
        clinical_orchestration.stores.sdtm_files.SdtmFileError: the files cannot be used.
        clinical_orchestration.ingestion.kafka.OffsetsLostError: messages were lost before they were ingested.
    """
    files = ingest_files(tables, profile, source, now=now)
    for file in files.files:
        say(f"{file.name}: {file.rows} rows, {file.appended} new")
    if not kafka.available():
        return SourcesReport(files, None, ["Kafka is not installed here: records come from files only"])
    reader, admin = kafka.reader(), kafka.admin()
    try:
        report = ingest_topics(tables, reader, topics, default_trial=profile.name, now=now, admin=admin)
    finally:
        reader.close()
        admin.close()
    for topic in report.topics.values():
        if topic.rows:
            say(f"topic {topic.topic}: {topic.rows} new messages")
    return SourcesReport(files, report, list(report.warnings))
