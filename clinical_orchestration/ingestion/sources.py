"""All sources of a trial, brought into the raw tables: files, the simulator, Kafka topics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from clinical_orchestration.ingestion.files import FileIngestReport, ingest_files
from clinical_orchestration.ingestion.kafka import TopicIngestReport, ingest_topics
from clinical_orchestration.ingestion.simulate import ensure_simulated, ensure_simulated_files
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import bronze

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
    """What one :func:`ingest_sources` brought.

    `topics` is None without a broker; `simulated` counts rows by raw table that came from a simulation's files then.
    """

    files: FileIngestReport
    topics: TopicIngestReport | None
    simulated: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def appended(self) -> int:
        """Raw rows written."""
        return self.files.appended + sum(self.simulated.values()) + (self.topics.rows if self.topics else 0)

    def counts(self, domain: str) -> dict[str, int]:
        """Return rows appended to one raw table, in all and by kind of source."""
        from_files = self.files.by_table().get(domain, 0) + self.simulated.get(domain, 0)
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
    scratch: Path,
    say: Callable[[str], None],
    *,
    accept_loss: bool = False,
) -> SourcesReport:
    """Bring what is new in a trial's files, simulation and topics into ``bronze/*``.

    Args:
        tables: the lakehouse.
        kafka: the broker, which may be missing.
        profile: the trial; messages without a label of their own are its records.
        source: folder of SDTM files instead of the profile's.
        topics: raw table -> topic.
        now: time of ingestion, UTC.
        scratch: folder for the files of a simulation where there is no broker.
        say: takes one line of progress at a time.
        accept_loss: go on behind messages that retention removed before they were ingested.

    Raises:
        clinical_orchestration.stores.sdtm_files.SdtmFileError: the files cannot be used.
        clinical_orchestration.ingestion.kafka.OffsetsLostError: messages were lost before they were ingested.
    """
    files = ingest_files(tables, profile, source, now=now)
    for file in files.files:
        say(f"{file.name}: {file.rows} rows, {file.appended} new")
    simulate = profile.sources.simulation is not None and source is None
    if not kafka.available():
        simulated: dict[str, int] = {}
        if simulate:
            before = {domain: tables.row_count(bronze(domain)) for domain in topics}
            made = ensure_simulated_files(tables, scratch, profile, topics, now=now)
            simulated = {domain: tables.row_count(bronze(domain)) - rows for domain, rows in before.items()}
            say(f"simulation in files: {made.produced} new messages, {made.present} were there")
        return SourcesReport(files, None, simulated, ["Kafka is not installed here: records come from files only"])
    reader, admin = kafka.reader(), kafka.admin()
    try:
        if simulate:
            producer = kafka.producer()
            try:
                done = ensure_simulated(reader, producer, admin, profile, topics)
            finally:
                producer.close()
            say(f"simulation in Kafka: {done.produced} messages produced, {done.present} were there")
        report = ingest_topics(
            tables, reader, topics, default_trial=profile.name, now=now, admin=admin, accept_loss=accept_loss
        )
    finally:
        reader.close()
        admin.close()
    for topic in report.topics.values():
        if topic.rows:
            say(f"topic {topic.topic}: {topic.rows} new messages")
    return SourcesReport(files, report, notes=list(report.warnings))
