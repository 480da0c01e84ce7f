"""Simulated messages through Kafka, bronze and silver, with the process killed on the way: all accounted for."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clinical_orchestration.ingestion.simulate import stream_to_kafka
from clinical_orchestration.simulation import simulate
from clinical_orchestration.stores.kafka import ConfluentProducer, ConfluentTopicAdmin, ConfluentTopicReader
from clinical_orchestration.tables import DOMAINS, DUPLICATES, QUARANTINE, bronze, silver
from clinical_orchestration.trials import load_trial

pytestmark = pytest.mark.integration
PATIENCE = 900  # seconds, for a machine that does much else
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Deployment:
    """Topics and a lake of the test's own on shared services."""

    environment: dict[str, str]
    topics: dict[str, str]
    kills: list[str] = field(default_factory=list)

    @property
    def servers(self) -> str:
        return self.environment["KAFKA_BOOTSTRAP_SERVERS"]

    def store(self):  # type: ignore[no-untyped-def]
        from clinical_orchestration.settings import ClientSettings
        from clinical_orchestration.stores.tables import DeltaTableStore, storage_options

        settings = ClientSettings.model_validate(self.environment)
        return DeltaTableStore(settings.lake_root, storage_options(settings))

    def start(self, batch_rows: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "clinical_orchestration_tests.integration.exactly_once_worker", str(batch_rows)],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def deployment(kafka_env: dict[str, str], spark_env: dict[str, str]) -> Iterator[Deployment]:
    name = uuid.uuid4().hex[:8]
    topics = {domain: f"{domain.replace('_', '-')}-{name}" for domain in DOMAINS}
    environment = {
        **spark_env,
        "KAFKA_BOOTSTRAP_SERVERS": kafka_env["KAFKA_BOOTSTRAP_SERVERS"],
        "CLINICAL_LAKE_ROOT": f"s3://clinical-mlops/exactly-once-{name}",
        **{f"CLINICAL_VAR_KAFKA_{domain.upper()}_TOPIC": topic for domain, topic in topics.items()},
    }
    admin = ConfluentTopicAdmin(environment["KAFKA_BOOTSTRAP_SERVERS"])
    admin.ensure_topics(topics.values(), partitions=4)
    admin.keep_forever(topics.values())
    yield Deployment(environment, topics)
    admin.delete_topics(topics.values())


@pytest.fixture
def asked_for(request: pytest.FixtureRequest) -> None:
    """Skip unless slow tests were asked for by name of their mark."""
    if "slow" not in (request.config.getoption("markexpr") or "").replace("not slow", ""):
        pytest.skip("slow: run with -m slow")


def kill_after_commits(deployment: Deployment, batch_rows: int, commits: int, delay: float) -> None:
    """Kill the process a moment after it told of so many commits, while it still reads topics."""
    with deployment.start(batch_rows) as process:
        assert process.stdout is not None
        for line in process.stdout:
            assert line.startswith("commit"), f"it ended its reading before {commits} commits: {line}"
            commits -= 1
            if commits == 0:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    deployment.kills.append("ingest")


def kill_when(deployment: Deployment, batch_rows: int, condition: Callable[[], bool], delay: float) -> None:
    """Kill the process a moment after the tables are in a state, while it still refines."""
    with deployment.start(batch_rows) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not condition():
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.1)
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    deployment.kills.append("refine")


def finish(deployment: Deployment, batch_rows: int) -> None:
    with deployment.start(batch_rows) as process:
        output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output


def run_and_account(deployment: Deployment, messages: int, batch_rows: int, seed: int) -> dict[str, Counter[str]]:
    """Stream, ingest with three or four kills, and compare every message's fate with the truth."""
    moments = random.Random(seed)
    profile = load_trial("simulated")
    assert profile.sources.simulation is not None
    rates = {"seed": seed, "broken_rate": 0.02, "duplicate_rate": 0.01, "late_rate": 0.01}
    settings = profile.sources.simulation.model_copy(update=rates)
    sent = list(simulate(settings, profile.study_id, messages=messages))
    assert len(sent) == messages
    producer = ConfluentProducer(deployment.servers)
    stream_to_kafka(producer, sent, deployment.topics, trial="simulated", simulation="test")
    producer.close()

    store = deployment.store()
    for _ in range(2):
        kill_after_commits(deployment, batch_rows, moments.randint(1, 4), moments.uniform(0, 0.2))

    def a_destination_is_written() -> bool:
        return (store.version(QUARANTINE) or 0) > 0  # version 0 is the empty table

    kill_when(deployment, batch_rows, a_destination_is_written, moments.uniform(0, 0.3))
    started = time.monotonic()
    finish(deployment, batch_rows)
    sys.stdout.write(f"\nlast run: {time.monotonic() - started:.1f} s\n")

    # the truth by position: the header tells which simulated message it is
    reader = ConfluentTopicReader(deployment.servers)
    truth: dict[str, dict[str, str]] = {}
    for domain, topic in deployment.topics.items():
        kinds = truth.setdefault(domain, {})
        for batch in reader.read(topic, reader.offsets(topic), max_messages=10_000):
            for message in batch.messages:
                kinds[message.position] = sent[int(message.header("sequence") or -1)].kind
    assert sum(len(kinds) for kinds in truth.values()) == messages

    counts: dict[str, Counter[str]] = {}
    quarantine, duplicates = store.read(QUARANTINE).to_pylist(), store.read(DUPLICATES).to_pylist()
    for domain, kinds in truth.items():
        raw = store.read(bronze(domain), columns=["source_position", "payload"]).to_pydict()
        payloads = dict(zip(raw["source_position"], raw["payload"], strict=True))
        assert len(raw["source_position"]) == len(payloads), f"{domain}: a message is in bronze twice"
        assert payloads.keys() == kinds.keys(), f"{domain}: bronze is not what the topic holds"
        columns = ["source_position", *(["test_code"] if domain == "patient_vitals" else [])]
        rows = [tuple(row.values()) for row in store.read(silver(domain), columns=columns).to_pylist()]
        assert len(rows) == len(set(rows)), f"{domain}: a measurement is in silver twice"
        accepted = {row[0] for row in rows}
        repeated = [row["source_position"] for row in duplicates if row["table"] == domain]
        rejected = [row["source_position"] for row in quarantine if row["table"] == domain]
        assert len(accepted) + len(repeated) + len(rejected) == len(kinds), f"{domain}: accounts do not add up"
        assert accepted | set(repeated) | set(rejected) == set(kinds), f"{domain}: a message has no account"
        assert set(rejected) == {position for position, kind in kinds.items() if kind == "broken"}
        assert len(repeated) == sum(kind == "duplicate" for kind in kinds.values())
        for row in duplicates:
            if row["table"] == domain:
                assert row["duplicate_of"] in accepted
                assert payloads[row["source_position"]] == payloads[row["duplicate_of"]]
        counts[domain] = Counter(accepted=len(accepted), duplicates=len(repeated), quarantined=len(rejected))
    assert all(row["reasons"] for row in quarantine)

    # what nothing is new for changes nothing
    versions = {
        name: store.version(name) for name in (QUARANTINE, DUPLICATES, *map(silver, DOMAINS), *map(bronze, DOMAINS))
    }
    finish(deployment, batch_rows)
    assert versions == {name: store.version(name) for name in versions}
    return counts


def test_messages_are_accounted_for_exactly_when_the_process_is_killed_three_times(deployment: Deployment) -> None:
    counts = run_and_account(deployment, messages=5_000, batch_rows=300, seed=7)
    assert deployment.kills == ["ingest", "ingest", "refine"]
    assert sum((count for count in counts.values()), Counter()).total() == 5_000


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("asked_for")
def test_a_hundred_thousand_messages_are_accounted_for_exactly(deployment: Deployment) -> None:
    counts = run_and_account(deployment, messages=100_000, batch_rows=5_000, seed=20250101)
    assert deployment.kills == ["ingest", "ingest", "refine"]
    total = sum((count for count in counts.values()), Counter())
    assert total.total() == 100_000
    sys.stdout.write(f"\n{dict(total)} { ({domain: dict(count) for domain, count in counts.items()}) }\n")
