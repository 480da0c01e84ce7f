"""One backfill of a range in a process of its own, killed at a chosen place: ``FIRST LAST [PLACE]``."""

from __future__ import annotations

import os
import signal
import sys
from datetime import date
from typing import Any

from clinical_orchestration.stores.feature_backfill import Days, FeatureBackfill
from clinical_orchestration.stores.feature_store import OfflineStore
from clinical_orchestration.stores.online import RedisOnlineStore
from clinical_orchestration.stores.spark import SparkSessions, spark_tables
from clinical_orchestration.stores.tables import DeltaTableStore

PLACES = {
    "computed": "_staged_keys",  # nothing is staged yet
    "staged": "check",
    "compared": "_replace",
    "written": "_record",
}


def main() -> None:
    from clinical_orchestration_tests.integration.test_features_in_spark import VISITS

    days = Days(date.fromisoformat(sys.argv[1]), date.fromisoformat(sys.argv[2]))
    place = sys.argv[3] if len(sys.argv) > 3 else None
    if place:

        def killed(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(FeatureBackfill, PLACES[place], killed)
    tables = DeltaTableStore.from_settings()
    sessions = SparkSessions()
    store = FeatureBackfill(spark_tables(tables, sessions=sessions), tables)
    staged = store.stage(VISITS, days)
    assert store.check(VISITS, days, staged).complete
    loaded = store.load(VISITS, days, staged)
    RedisOnlineStore(os.environ["REDIS_URL"], prefix="backfill-test:").put(
        OfflineStore(spark_tables(tables, sessions=sessions), tables).newest(VISITS)
    )
    store.discard(VISITS)
    sys.stdout.write(f"{staged.computed} {loaded.written} {loaded.resumed} {loaded.differences.added}\n")
    sessions.close()


if __name__ == "__main__":
    main()
