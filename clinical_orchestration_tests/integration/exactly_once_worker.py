"""One ingest process for ``test_exactly_once``: topics to bronze, bronze to silver, telling of each commit.

It is killed from outside, at any moment, and knows nothing of it.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

from clinical_orchestration.ingestion.kafka import ingest_topics
from clinical_orchestration.settings import ClientSettings, Variables
from clinical_orchestration.stores import kafka
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.trials import load_trial


class Telling(DeltaTableStore):
    """Says on standard output which table it appended to."""

    def append(self, name: str, *args: Any, **more: Any) -> int | None:
        version = super().append(name, *args, **more)
        sys.stdout.write(f"commit {name}\n")
        sys.stdout.flush()
        return version


def main(batch_rows: int) -> None:
    settings, variables = ClientSettings(), Variables()
    tables = Telling.from_settings(settings)
    reader, admin = kafka.topic_reader(settings), kafka.topic_admin(settings)
    ingest_topics(tables, reader, variables.topics(), default_trial="simulated", admin=admin, max_batch_rows=batch_rows)
    sys.stdout.write("ingested\n")
    sys.stdout.flush()
    from clinical_orchestration.ingestion.silver import refine
    from clinical_orchestration.stores.spark import spark_tables

    store = DeltaTableStore.from_settings(settings)
    report = refine(spark_tables(store, settings), store, {"simulated": load_trial("simulated")}, now=datetime.now(UTC))
    sys.stdout.write(f"refined {report.total('received')}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
