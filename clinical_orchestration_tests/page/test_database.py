"""The page over a real PostgreSQL: heartbeats as Dagster writes them, and a database that restarts."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import psycopg2
import pytest

from clinical_orchestration.page.dagster_ui import check_pooled_connections
from clinical_orchestration.page.health import postgres_heartbeats
from clinical_orchestration.stack.testing import embedded

pytestmark = pytest.mark.integration


def test_heartbeats_are_read_and_a_lost_connection_costs_no_request(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster import DagsterInstance, RunsFilter
    from dagster._daemon.types import DaemonHeartbeat

    folder: Path = tmp_path_factory.mktemp("pg")
    home = folder / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text(
        "storage:\n  postgres:\n    postgres_url: {env: POSTGRES_URL}\ntelemetry: {enabled: false}\n"
    )
    with ExitStack() as stack:
        environment = stack.enter_context(embedded(folder / "stack", "postgres"))
        url = environment["POSTGRES_URL"]
        monkeypatch.setenv("POSTGRES_URL", url)
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        assert postgres_heartbeats(url) == {}  # before Dagster made its tables
        instance = stack.enter_context(DagsterInstance.get())
        instance.optimize_for_webserver(5000, pool_recycle=3600, max_overflow=5)
        check_pooled_connections(instance)
        now = time.time()
        instance.add_daemon_heartbeat(DaemonHeartbeat(now, "SCHEDULER", "daemon-1", errors=[]))
        assert postgres_heartbeats(url) == {"SCHEDULER": pytest.approx(now, abs=1e-3)}

        assert instance.get_runs_count(RunsFilter()) == 0
        with psycopg2.connect(url) as killer, killer.cursor() as cursor:
            # what a restart of the server does to every pooled connection
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                           "AND backend_type = 'client backend'")  # fmt: skip
        killer.close()
        assert instance.get_runs_count(RunsFilter()) == 0
        assert instance.get_run_records() == []
        assert list(instance.all_instigator_state()) == []
