"""Speed of Airflow's API on port 8085, as a Markdown table.

    python -m benchmarks.api [--runs 10000] [--rounds 5] [--seconds 2] [--write docs/benchmarks/api.md]

Starts the page with its door over an embedded PostgreSQL that holds `--runs` finished runs with all their task
instances, and asks it from a second process with name and password. What is measured takes turns in every round, so
that a busy machine slows all of it alike. Airflow's figures are those recorded of 2.11 with the same login on a like
machine (LocalExecutor, PostgreSQL, 2 cores); they are not measured again here.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

CONNECTIONS = 8
READY = "ready: "
TRIGGERS = 100
DAG = "clinical_data_pipeline"
AIRFLOW_RATE, AIRFLOW_P50_MS, AIRFLOW_ALONE_MS = "13-16", 500, 129


@dataclass
class Kind:
    """One request that is measured: method, path, body; latencies in seconds of every round, and requests a second."""

    title: str
    method: str
    path: str
    body: dict[str, object] | None = None
    rates: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


KINDS = (
    Kind("GET /dags", "GET", "/dags"),
    Kind("GET /dags/{dag}/dagRuns, newest 25", "GET", f"/dags/{DAG}/dagRuns?limit=25&order_by=-execution_date"),
    Kind("GET /dags/~/dagRuns, page of 100 in the middle", "GET", "/dags/~/dagRuns?limit=100&offset=5000"),
    Kind(
        "POST /dags/~/dagRuns/list, failed, by end", "POST", "/dags/~/dagRuns/list",
        {"states": ["failed"], "order_by": "-end_date", "page_limit": 25},
    ),
    Kind(
        "POST /dags/~/dagRuns/~/taskInstances/list of one run", "POST", "/dags/~/dagRuns/~/taskInstances/list",
        {"dag_ids": [DAG], "dag_run_ids": ["seeded-42"]},
    ),
    Kind("GET taskInstances of one run", "GET", f"/dags/{DAG}/dagRuns/seeded-42/taskInstances"),
)  # fmt: skip


class Caller:
    """One connection that is kept open."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
        login = base64.b64encode(b"admin:admin").decode()
        self._headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}

    def __call__(self, method: str, path: str, body: dict[str, object] | None = None) -> tuple[float, bytes]:
        content = json.dumps(body) if body is not None else None
        began = time.perf_counter()
        self._connection.request(method, f"/api/v1{path}", content, self._headers)
        answer = self._connection.getresponse()
        read = answer.read()
        took = time.perf_counter() - began
        assert answer.status == 200, (answer.status, read[:500])
        return took, read


def alone(url: str, kind: Kind, seconds: float) -> None:
    call = Caller(url)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        kind.alone.append(call(kind.method, kind.path, kind.body)[0])


def together(url: str, kind: Kind, seconds: float) -> None:
    taken: list[list[float]] = [[] for _ in range(CONNECTIONS)]
    ready = threading.Barrier(CONNECTIONS + 1, timeout=60)

    def work(mine: list[float]) -> None:
        call = Caller(url)
        call(kind.method, kind.path, kind.body)
        ready.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            mine.append(call(kind.method, kind.path, kind.body)[0])

    threads = [threading.Thread(target=work, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    lasted = time.perf_counter() - began
    kind.rates.append(sum(len(mine) for mine in taken) / lasted)
    kind.busy += [one for mine in taken for one in mine]


def triggers(url: str, number: int) -> tuple[float, int]:
    """Trigger runs one after the other; return the seconds, and how many of them are there afterwards."""
    call = Caller(url)
    began = time.perf_counter()
    for index in range(TRIGGERS):
        call("POST", f"/dags/{DAG}/dagRuns", {"dag_run_id": f"burst-{number}-{index}", "conf": {"a": index}})
    took = time.perf_counter() - began
    found = json.loads(call("GET", f"/dags/{DAG}/dagRuns?limit=100&order_by=-id")[1])["dag_runs"]
    return took, sum(run["dag_run_id"].startswith(f"burst-{number}-") for run in found)


SEED = """
INSERT INTO runs (run_id, pipeline_name, status, run_body, create_timestamp, update_timestamp, start_time, end_time)
SELECT 'seeded-' || n, pipeline_name, CASE WHEN n %% 10 = 0 THEN 'FAILURE' ELSE 'SUCCESS' END, run_body,
       now() AT TIME ZONE 'UTC' - n * interval '6 minutes', now() AT TIME ZONE 'UTC' - n * interval '6 minutes',
       extract(epoch FROM now() - n * interval '6 minutes'), extract(epoch FROM now() - n * interval '6 minutes') + 30
FROM runs, generate_series(1, %(runs)s) AS n WHERE run_id = %(template)s;
INSERT INTO run_tags (run_id, key, value)
SELECT 'seeded-' || n, key, value FROM run_tags, generate_series(1, %(runs)s) AS n WHERE run_id = %(template)s;
INSERT INTO airflow_dag_runs (dag_id, run_id, dagster_run_id, logical_date, data_interval_start, data_interval_end,
                              run_type, external_trigger, conf, created_at, projected_final)
SELECT dag_id, 'seeded-' || n, 'seeded-' || n, now() - n * interval '6 minutes', now() - n * interval '6 minutes',
       now() - n * interval '6 minutes', run_type, external_trigger, conf, now() - n * interval '6 minutes', true
FROM airflow_dag_runs, generate_series(1, %(runs)s) AS n WHERE dagster_run_id = %(template)s ORDER BY n DESC;
INSERT INTO airflow_run_attempts (dagster_run_id, dag_run, number)
SELECT dagster_run_id, id, 1 FROM airflow_dag_runs WHERE dagster_run_id LIKE 'seeded-%%';
INSERT INTO airflow_task_instances (dag_run, task_id, position, state, start_date, end_date, duration, try_number,
                                    max_tries, pool, queued_when, updated_at)
SELECT r.id, t.task_id, t.position, t.state, r.created_at, r.created_at, 2.5, t.try_number, t.max_tries, t.pool,
       r.created_at, r.created_at
FROM airflow_task_instances t JOIN airflow_dag_runs o ON o.id = t.dag_run AND o.dagster_run_id = %(template)s,
     airflow_dag_runs r WHERE r.dagster_run_id LIKE 'seeded-%%';
INSERT INTO airflow_task_tries (dag_run, task_id, try_number, state, start_date, end_date, dagster_run_id)
SELECT r.id, t.task_id, t.try_number, t.state, r.created_at, r.created_at + interval '2 s', r.dagster_run_id
FROM airflow_task_tries t JOIN airflow_dag_runs o ON o.id = t.dag_run AND o.dagster_run_id = %(template)s,
     airflow_dag_runs r WHERE r.dagster_run_id LIKE 'seeded-%%';
ANALYZE;
"""


def seed(database: str, template: str, runs: int) -> None:
    """Store finished runs like one that ran, every tenth of them failed."""
    import psycopg2

    with psycopg2.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute(SEED, {"template": template, "runs": runs})
    connection.close()


def serve(runs: int) -> None:
    """Run page and database until standard input ends; print the page's address."""
    from clinical_orchestration.airflow.control import Control
    from clinical_orchestration.airflow.database import open_engine
    from clinical_orchestration.page.__main__ import SWITCH_SECONDS
    from clinical_orchestration.stack.testing import embedded
    from clinical_orchestration_tests.airflow.live import ThreadLauncher, live_page
    from clinical_orchestration_tests.databases import new_database

    sys.setswitchinterval(SWITCH_SECONDS)  # as the page's own process has it
    os.environ["DAGSTER_EVENT_BATCH_SIZE"] = "1000"  # as the stack sets it for the page
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        home.chmod(0o755)
        with embedded(home / "postgres", "postgres") as environment:
            database = new_database(environment["POSTGRES_URL"], "bench")
            (home / "dagster").mkdir()
            with live_page(database, home / "dagster") as page:
                engine = open_engine(database)
                control = Control(lambda: page.context, engine)
                run = control.trigger(control.dag(DAG), run_id="template")
                ThreadLauncher._workers.submit(lambda: None).result(60)
                control.runs.project()
                seed(database, run.dagster_run_id, runs)
                ThreadLauncher.executing = False  # runs are accepted and wait, as behind a full queue
                print(f"{READY}{page.url}", flush=True)
                sys.stdin.read()
                engine.dispose()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000


def measured(url: str, rounds: int, seconds: float) -> list[tuple[float, int]]:
    bursts = []
    together(url, KINDS[0], 0.5)  # everything is loaded and the password checked
    KINDS[0].rates.clear()
    KINDS[0].busy.clear()
    for number in range(rounds):
        for kind in KINDS:
            together(url, kind, seconds)
            alone(url, kind, seconds / 2)
        bursts.append(triggers(url, number))
        print(f"round {number + 1} of {rounds}: {KINDS[0].rates[-1]:.0f} lists of DAGs a second", file=sys.stderr)
    return bursts


def document(bursts: list[tuple[float, int]], runs: int) -> str:
    dags = KINDS[0]
    took = statistics.median(seconds for seconds, _ in bursts)
    most = max(seconds for seconds, _ in bursts)
    kept = sum(count for _, count in bursts)
    rate = statistics.median(dags.rates)
    p50, solo = percentile(dags.busy, 0.5), percentile(dags.alone, 0.5)
    rows = [
        ("GET /dags, 8 connections", f"{rate:.0f}/s", f"{AIRFLOW_RATE}/s", f"{rate / 16:.0f}-{rate / 13:.0f} times"),
        ("GET /dags, 8 connections, p50", f"{p50:.1f} ms", f"{AIRFLOW_P50_MS} ms", f"{AIRFLOW_P50_MS / p50:.0f} times"),
        ("GET /dags alone, p50", f"{solo:.1f} ms", f"{AIRFLOW_ALONE_MS} ms", f"{AIRFLOW_ALONE_MS / solo:.0f} times"),
    ]
    lines = [
        "# Speed of the API", "",
        f"`python -m benchmarks.api`, {os.cpu_count()} cores shared by page, PostgreSQL and caller; {runs:,} runs with "
        f"{runs * 12:,} task instances stored; every request with name and password through the door; "
        f"{len(bursts)} rounds in which the measurements took turns. Load of the machine over the last minute, with "
        f"this: {os.getloadavg()[0]:.1f}; with more than 3 other work was measured too.", "",
        "| | here | Airflow 2.11, recorded | ratio |", "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows), "",
        "| request | 8 connections, per second | p50 | p99 | alone, p50 | alone, p99 |", "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {kind.title} | {statistics.median(kind.rates):.0f} | {percentile(kind.busy, 0.5):.1f} ms | "
            f"{percentile(kind.busy, 0.99):.1f} ms | {percentile(kind.alone, 0.5):.1f} ms | "
            f"{percentile(kind.alone, 0.99):.1f} ms |"
            for kind in KINDS
        ), "",
        f"{TRIGGERS} triggers one after the other: {took:.2f} s, {most:.2f} s at most ({len(bursts)} bursts); "
        f"{kept} of {TRIGGERS * len(bursts)} runs are there.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.runs)
        return
    command = [sys.executable, "-m", "benchmarks.api", "--serve", "--runs", str(options.runs)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        url = next((line.strip().removeprefix(READY) for line in server.stdout if line.startswith(READY)), "")
        if not url:
            log.seek(0)
            raise SystemExit(f"the page did not start: {log.read()[-2000:]}")
        bursts = measured(url, options.rounds, options.seconds)
        server.stdin.close()
    text = document(bursts, options.runs)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
