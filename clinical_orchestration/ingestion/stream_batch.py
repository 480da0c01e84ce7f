"""What the Spark server runs for each micro-batch of the streaming job: its Kafka rows into bronze.

The function travels to the server and runs there in a Python process beside the driver, so the server needs this
package (the same version), its dependencies ``deltalake`` and ``confluent-kafka``, and the variables of S3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clinical_orchestration.stores.kafka import Message

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

COLUMNS = ("topic", "partition", "offset", "timestamp_ms", "key", "value", "headers")
"""What :class:`BronzeWriter` expects of a micro-batch; `timestamp_ms` is Kafka's record time."""


@dataclass(frozen=True)
class BronzeWriter:
    """Appends a micro-batch to the bronze tables; for ``foreachBatch``.

    It may be called again with a batch that it has written, or with one that other ingesters were faster with: the
    offsets in Delta decide what is appended.
    """

    bootstrap_servers: str
    lake_root: str
    topics: Mapping[str, str]
    """Bronze domain -> topic."""
    default_trial: str
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Further options of the Kafka client, such as ``security.protocol``."""

    def __call__(self, frame: DataFrame, batch_id: int) -> None:
        """Append the rows of one micro-batch, one commit a topic."""
        from clinical_orchestration.ingestion.kafka import append_messages
        from clinical_orchestration.settings import ClientSettings
        from clinical_orchestration.stores.kafka import ConfluentTopicReader
        from clinical_orchestration.stores.tables import DeltaTableStore, storage_options

        rows = frame.toArrow()
        if rows.num_rows == 0:
            return
        root = self.lake_root
        tables = DeltaTableStore(root, storage_options(ClientSettings()) if root.startswith("s3://") else None)
        reader = ConfluentTopicReader(self.bootstrap_servers, options=self.options)
        domains = {topic: domain for domain, topic in self.topics.items()}
        by_topic: dict[str, list[Message]] = {}
        for message in messages(rows):
            by_topic.setdefault(message.topic, []).append(message)
        try:
            for topic, own in by_topic.items():
                append_messages(tables, reader, domains[topic], topic, own, default_trial=self.default_trial)
        finally:
            reader.close()


def messages(rows: pa.Table) -> Iterator[Message]:
    """Yield the messages of a table with :data:`COLUMNS`."""
    columns = [rows.column(name).to_pylist() for name in COLUMNS]
    for topic, partition, offset, stamp, key, value, headers in zip(*columns, strict=True):
        named = tuple((item["key"], item["value"]) for item in headers or ())
        yield Message(topic, partition, offset, stamp, key, value, named)
