"""The same messages by the pipeline's ingestion and by the streaming job, which is killed on the way: equal tables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clinical_orchestration.ingestion.accounting import account_for
from clinical_orchestration.ingestion.simulate import stream_to_kafka
from clinical_orchestration.ingestion.status_file import read_status
from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.simulation import simulate
from clinical_orchestration.stores.kafka import ConfluentProducer, ConfluentTopicAdmin, ConfluentTransactions, Record
from clinical_orchestration.stores.tables import DeltaTableStore, storage_options
from clinical_orchestration.tables import DOMAINS, DUPLICATES, QUARANTINE, bronze, silver
from clinical_orchestration.trials import load_trial

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
OWN_TIMES = {"ingested_at", "quarantined_at", "detected_at"}


@dataclass
class Side:
    """One lake on the shared topics."""

    environment: dict[str, str]
    home: Path

    def store(self) -> DeltaTableStore:
        settings = ClientSettings.model_validate(self.environment)
        return DeltaTableStore(settings.lake_root, storage_options(settings))

    def run(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.home / "log.txt").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, **self.environment, "CLINICAL_HOME": str(self.home)},
            stdout=log,
            stderr=log,
        )

    def batch(self) -> None:
        with self.run("clinical_orchestration_tests.integration.exactly_once_worker", "400") as process:
            assert process.wait(timeout=300) == 0, (self.home / "log.txt").read_text()[-3000:]

    def stream(self, *arguments: str) -> subprocess.Popen[bytes]:
        return self.run("clinical_orchestration.ingestion.streaming", "run", "--max-offsets", "150", *arguments)

    def kill_when(self, condition: Callable[[], bool]) -> None:
        with self.stream("--interval", "0.5s") as process:
            try:
                wait_for(lambda: process.poll() is not None or condition())
                assert process.poll() is None, (self.home / "log.txt").read_text()[-3000:]
            finally:
                process.send_signal(signal.SIGKILL)

    def content(self, name: str) -> Counter[tuple[Any, ...]]:
        rows = self.store().read(name)
        columns = [column for column in sorted(rows.column_names) if column not in OWN_TIMES]
        return Counter(
            tuple(tuple(value) if isinstance(value, list) else value for value in row.values())
            for row in rows.select(columns).to_pylist()
        )


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {seconds:.0f} s"
        time.sleep(0.2)


@pytest.fixture
def sides(kafka_env: dict[str, str], spark_env: dict[str, str], tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    name = uuid.uuid4().hex[:8]
    topics = {domain: f"{domain.replace('_', '-')}-{name}" for domain in DOMAINS}
    servers = kafka_env["KAFKA_BOOTSTRAP_SERVERS"]
    environment = {
        **spark_env,
        "POSTGRES_URL": "",
        "KAFKA_BOOTSTRAP_SERVERS": servers,
        "CLINICAL_TRIAL": "simulated",
        **{f"CLINICAL_VAR_KAFKA_{domain.upper()}_TOPIC": topic for domain, topic in topics.items()},
    }
    admin = ConfluentTopicAdmin(servers)
    admin.ensure_topics(topics.values(), partitions=3)
    admin.keep_forever(topics.values())
    made = []
    for kind in ("batch", "stream"):
        (tmp_path / kind).mkdir()
        made.append(Side({**environment, "CLINICAL_LAKE_ROOT": f"s3://clinical-mlops/{kind}-{name}"}, tmp_path / kind))
    yield made[0], made[1]
    admin.delete_topics(topics.values())


def fill(side: Side, messages: int) -> None:
    profile = load_trial("simulated")
    assert profile.sources.simulation is not None
    rates = {"seed": 5, "broken_rate": 0.03, "duplicate_rate": 0.03, "late_rate": 0.01}
    settings = profile.sources.simulation.model_copy(update=rates)
    topics = {domain: side.environment[f"CLINICAL_VAR_KAFKA_{domain.upper()}_TOPIC"] for domain in DOMAINS}
    sent = list(simulate(settings, profile.study_id, messages=messages))
    servers = side.environment["KAFKA_BOOTSTRAP_SERVERS"]
    producer, transactions = ConfluentProducer(servers), ConfluentTransactions(servers, topics["lab_results"])
    half = len(sent) // 2
    stream_to_kafka(producer, sent[:half], topics, trial="simulated", simulation="test")
    # as the IBM MQ bridge writes: committed and aborted transactions leave markers between the records
    transactions.start()
    labs = [
        Record(topics["lab_results"], f'{{"patient_id": "MQ-{n}", "timestamp": "2024-01-01T10:00:00Z", '
               f'"test_name": "K", "value": {n}}}'.encode(), b"mq", (("trial", b"simulated"),))
        for n in range(30)
    ]  # fmt: skip
    for start in range(0, 30, 10):
        transactions.commit(labs[start : start + 10])
    transactions._client.begin_transaction()
    transactions._client.produce(topics["lab_results"], value=b"given up", key=b"mq")
    transactions._client.flush(10)
    transactions._client.abort_transaction(10)
    transactions.close()
    stream_to_kafka(producer, sent[half:], topics, trial="simulated", simulation="test-2")
    producer.close()


def test_streaming_killed_twice_and_batch_in_between_give_the_tables_of_batch(sides: tuple[Side, Side]) -> None:
    batch, stream = sides
    fill(batch, 1_200)
    batch.batch()

    store = stream.store()

    def rows() -> int:
        return sum(store.row_count(bronze(domain)) for domain in DOMAINS)

    # killed while micro-batches arrive in bronze
    stream.kill_when(lambda: rows() > 0)
    assert rows() < 1_230, "it was killed too late to show anything"
    # the query lives on at the server and goes on filling bronze, while the pipeline's own ingestion runs
    stream.batch()
    assert rows() == 1_230
    # killed while it refines
    fill(stream, 300)
    stream.kill_when(lambda: rows() > 1_230)
    began = time.monotonic()
    with stream.stream("--once") as process:
        assert process.wait(timeout=300) == 0, (stream.home / "log.txt").read_text()[-3000:]
    once = time.monotonic() - began
    batch.batch()

    status = read_status(stream.home, "streaming")
    assert status is not None
    assert (status["state"], status["lag"], status["last_error"]) == ("stopped", 0, None)
    for name in (*map(bronze, DOMAINS), *map(silver, DOMAINS), QUARANTINE, DUPLICATES):
        assert stream.content(name) == batch.content(name), name
    assert len(stream.content(DUPLICATES)) > 10
    assert len(stream.content(QUARANTINE)) > 10
    assert all(report.balanced for report in account_for(store).values())
    sys.stdout.write(f"\n{rows()} records; the last start took {once:.1f} s, its batch {status['batch_seconds']} s\n")


def test_the_commands_start_tell_and_stop(sides: tuple[Side, Side]) -> None:
    _, side = sides
    fill(side, 200)
    command = "clinical_orchestration.ingestion.streaming"
    try:
        with side.run(command, "start", "--interval", "1s") as process:
            code = process.wait(timeout=240)
        # on a machine that does much else, Spark gives its Python process up after ten seconds: the job tries again
        assert code == 0 or "the job tries on" in (side.home / "log.txt").read_text()

        def shows(name: str) -> float:
            return float((read_status(side.home, "streaming") or {}).get(name) or 0)

        wait_for(lambda: shows("refined_at") > 0 and shows("accepted") > 0, 400)
        shown = read_status(side.home, "streaming")
        assert shown is not None
        assert (shown["state"], shown["running"], shown["lag"]) == ("running", True, 0)
        assert shown["rows"] >= 230
        with side.run(command, "run") as second:
            assert second.wait(timeout=60) == 1, "one job at a time"
    finally:
        with side.run(command, "stop") as process:
            assert process.wait(timeout=150) == 0
    after = read_status(side.home, "streaming")
    assert after is not None
    assert (after["state"], after["running"]) == ("stopped", False)
    assert all(report.balanced for report in account_for(side.store()).values())
