"""The bridge on the real broker: killed at random moments, faults on the way, nothing lost and nothing doubled."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from clinical_orchestration.ingestion.kafka import ingest_topics
from clinical_orchestration.ingestion.mq_bridge import MESSAGE_ID_HEADER, NAME
from clinical_orchestration.ingestion.status_file import read_status
from clinical_orchestration.stack import control
from clinical_orchestration.stack.engine import Engine
from clinical_orchestration.stack.model import State
from clinical_orchestration.stack.services import spec, with_needs
from clinical_orchestration.stack.settings import INTERNAL_PORTS, PUBLIC_PORTS, StackSettings
from clinical_orchestration.stores.kafka import (
    ConfluentProducer,
    ConfluentTopicAdmin,
    ConfluentTopicReader,
    ConfluentTransactions,
    FencedError,
    Message,
    Record,
    RecordRefusedError,
)
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.tables import bronze
from clinical_orchestration_tests.ingestion.mq_standin import Answer, Drop, QueueManager, Seen

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds, for a machine that does much else


@dataclass
class Place:
    """Topics of the test's own."""

    servers: str
    topic: str
    progress: str

    def committed(self) -> list[Message]:
        reader = ConfluentTopicReader(self.servers)
        ranges = reader.offsets(self.topic)
        return [message for batch in reader.read(self.topic, ranges, max_messages=10_000) for message in batch.messages]

    def all_written(self) -> int:
        """Return how many records the log has, those of open and aborted transactions included."""
        consumer = Consumer(
            {"bootstrap.servers": self.servers, "group.id": "all", "isolation.level": "read_uncommitted",
             "auto.offset.reset": "earliest", "enable.partition.eof": True}
        )  # fmt: skip
        partitions = [TopicPartition(self.topic, number, 0) for number in range(4)]
        consumer.assign(partitions)
        records, ends = 0, 0
        while ends < len(partitions):
            item = consumer.poll(10)
            assert item is not None, "the log was not read to its end"
            ends, records = ends + (item.error() is not None), records + (item.error() is None)
        consumer.close()
        return records


@pytest.fixture
def place(kafka_env: dict[str, str]) -> Iterator[Place]:
    name = uuid.uuid4().hex[:8]
    place = Place(kafka_env["KAFKA_BOOTSTRAP_SERVERS"], f"lab-results-{name}", f"mq-progress-{name}")
    admin = ConfluentTopicAdmin(place.servers)
    admin.ensure_topics([place.topic], partitions=4)
    yield place
    admin.delete_topics([topic for topic in (place.topic, place.progress) if topic in admin.topics()])


def record(place: Place, value: str) -> Record:
    return Record(place.topic, value.encode(), value.encode())


def small_records(place: Place) -> None:
    """Let the topic refuse records that the bridge takes."""
    from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

    limit = ConfigEntry("max.message.bytes", "300000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, place.topic, incremental_configs=[limit])
    admin = AdminClient({"bootstrap.servers": place.servers})
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(30)


# --- transactions ----------------------------------------------------------------------------------------------------


def test_readers_see_a_transaction_whole_or_not_at_all_and_a_zombie_is_fenced(place: Place) -> None:
    first = ConfluentTransactions(place.servers, place.topic)
    first.start()
    first.commit([record(place, str(number)) for number in range(20)])
    killed = ConfluentTransactions(place.servers, place.topic)
    killed.start()
    # an open transaction, as a killed process leaves it
    killed._client.begin_transaction()
    killed._client.produce(place.topic, value=b"open", key=b"open")
    killed._client.flush(10)
    assert len(place.committed()) == 20, "what is not committed is not there"
    assert place.all_written() == 21

    second = ConfluentTransactions(place.servers, place.topic)
    second.start()
    second.commit([record(place, "after")])
    assert Counter(message.value for message in place.committed()) == Counter(
        [*(str(number).encode() for number in range(20)), b"after"]
    )
    with pytest.raises(FencedError):
        first.commit([record(place, "zombie")])
    assert b"zombie" not in {message.value for message in place.committed()}
    second.close()


def test_a_record_that_is_too_large_refuses_its_transaction_and_the_next_one_works(place: Place) -> None:
    writer = ConfluentTransactions(place.servers, place.topic)
    writer.start()
    large = Record(place.topic, random.Random(1).randbytes(2_000_000), b"large")
    with pytest.raises(RecordRefusedError) as caught:
        writer.commit([record(place, "a"), large])
    assert list(caught.value.refused) == [1]
    assert place.committed() == []
    writer.commit([record(place, "b")])
    assert [message.value for message in place.committed()] == [b"b"]
    writer.close()


def test_transactions_go_on_after_records_that_the_broker_refuses(place: Place) -> None:
    small_records(place)
    writer = ConfluentTransactions(place.servers, place.topic)
    writer.start()
    rng = random.Random(2)
    large = Record(place.topic, rng.randbytes(600_000), b"large")
    expected = []
    for number in range(8):
        others = [record(place, f"{number}-{index}") for index in range(rng.randint(0, 6))]
        mixed = [*others, large]
        rng.shuffle(mixed)
        with pytest.raises(RecordRefusedError) as caught:
            writer.commit(mixed)
        assert mixed.index(large) in caught.value.refused  # and those that were sent in one batch with it
        writer.commit(others)
        expected += [item.value for item in others]
    assert Counter(message.value for message in place.committed()) == Counter(expected)
    writer.close()


def test_bronze_takes_committed_records_once_and_offsets_pass_over_markers(place: Place, tmp_path: Path) -> None:
    tables = DeltaTableStore(str(tmp_path))
    reader = ConfluentTopicReader(place.servers)
    plain, writer = ConfluentProducer(place.servers), ConfluentTransactions(place.servers, place.topic)
    writer.start()
    rng = random.Random(3)
    expected: list[str] = []
    for number in range(12):
        values = [f"{number}-{index}" for index in range(rng.randint(1, 4))]
        if number % 3 == 0:
            plain.send([record(place, value) for value in values])
            expected += values
        elif number % 3 == 1:
            writer.commit([record(place, value) for value in values])
            expected += values
        else:  # given up: offsets are used, records are not
            writer._client.begin_transaction()
            for value in values:
                writer._client.produce(place.topic, value=value, key=value)
            writer._client.flush(10)
            if number > 6:  # ingestion while the transaction is open sees nothing of it, and nothing behind it
                ingest_topics(tables, reader, {"lab_results": place.topic}, default_trial="simulated")
            writer._client.abort_transaction(10)
        if number % 2:
            ingest_topics(tables, reader, {"lab_results": place.topic}, default_trial="simulated", max_batch_rows=3)
    report = ingest_topics(tables, reader, {"lab_results": place.topic}, default_trial="simulated", max_batch_rows=3)
    rows = tables.read(bronze("lab_results"))
    assert Counter(rows.column("payload").to_pylist()) == Counter(expected)
    assert report.topics["lab_results"].after == {p: bounds.end for p, bounds in reader.offsets(place.topic).items()}
    version = tables.version(bronze("lab_results"))
    again = ingest_topics(tables, reader, {"lab_results": place.topic}, default_trial="simulated")
    assert (again.rows, tables.version(bronze("lab_results"))) == (0, version)
    writer.close()
    plain.close()


# --- the bridge, killed ----------------------------------------------------------------------------------------------


def payload(number: int, rng: random.Random) -> tuple[str, int]:
    """Return a message body and how many records it gives (0: it cannot be read)."""
    kind = rng.random()
    if kind < 0.1:
        return f"{{broken {number}", 0
    if kind < 0.4:
        results = rng.randint(2, 5)
        segments = [f"OBX|{i}|NM|T{i}^Test {i}||{number}.{i}|mmol/L|||||F" for i in range(results)]
        head = [
            "MSH|^~\\&|LIS|L|||20240101||ORU^R01|1|P|2.5",
            f"PID|1||P{number}",
            "OBR|1||||||20240101101500+0000",
        ]
        return "\r".join([*head, *segments]), results
    message = {"patient_id": f"P{number}", "timestamp": "2024-01-01T10:00:00Z", "test_name": "K", "value": number}
    return json.dumps(message), 1


class Chaos:
    """Kills the bridge at a random request of a random kind, or a moment after one, and lets some others fail."""

    KINDS = ("GET before", "GET after", "DELETE before", "DELETE after", "POST before", "POST after", "later")

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.lock = threading.Lock()
        self.victim: subprocess.Popen[bytes] | None = None
        self.kind = ""
        self.wanted = self.patience = 0
        self.kills: Counter[str] = Counter()
        self.faults = 0

    def aim(self, victim: subprocess.Popen[bytes]) -> None:
        self.kind = self.rng.choice(self.KINDS)
        self.wanted, self.patience = self.rng.randint(1, 10), 120
        self.victim = victim

    def __call__(self, seen: Seen) -> None:
        kind = f"{seen.method} {seen.phase}"
        with self.lock:
            self.patience -= 1
            self.wanted -= kind == self.kind or (self.kind == "later" and kind == "GET after")
            victim = self.victim if self.wanted <= 0 or self.patience <= 0 else None
            if victim is not None:
                self.victim = None
                self.kills[self.kind if self.wanted <= 0 else f"{kind}, instead"] += 1
            chance, pause = self.rng.random(), self.rng.uniform(0, 0.1)
        if victim is not None:
            if self.kind == "later":  # wherever it is then: in a request, in a transaction, between the two
                threading.Timer(pause, victim.kill).start()
            else:
                victim.kill()
                raise Drop
        if chance < 0.01:
            self.faults += 1
            raise Drop
        if chance < 0.02 and seen.phase == "before":
            self.faults += 1
            raise Answer(503, 2059)
        if chance < 0.05:
            time.sleep(0.01)


def start(place: Place, qmgr: QueueManager, home: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "CLINICAL_HOME": str(home),
        "CLINICAL_TRIAL": "simulated",
        "KAFKA_BOOTSTRAP_SERVERS": place.servers,
        "CLINICAL_VAR_KAFKA_LAB_RESULTS_TOPIC": place.topic,
        "CLINICAL_MQ_PROGRESS_TOPIC": place.progress,
        "CLINICAL_MQ_URL": qmgr.url,
        "CLINICAL_MQ_USER": qmgr.user,
        "CLINICAL_MQ_PASSWORD": qmgr.password,
        "CLINICAL_MQ_BATCH": "12",
        "CLINICAL_MQ_BACKOUT_THRESHOLD": "1",
        "CLINICAL_MQ_POLL_SECONDS": "0.1",
    }
    command = [sys.executable, "-m", "clinical_orchestration.ingestion.mq_bridge"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def kill_and_account(place: Place, home: Path, *, seed: int, messages: int, kills: int) -> None:
    chaos = Chaos(seed)
    sent: dict[str, int] = {}
    with QueueManager(fault=chaos) as qmgr:

        def put(count: int) -> None:
            for _ in range(count):
                body, records = payload(len(sent), chaos.rng)
                sent[qmgr.put(body)] = records

        put(messages // 2)
        rest = messages - messages // 2
        while chaos.kills.total() < kills:
            put(min(rest, messages // 2 // kills + 1))
            rest -= min(rest, messages // 2 // kills + 1)
            with start(place, qmgr, home) as process:
                chaos.aim(process)
                process.wait(timeout=120)
            assert process.returncode == -signal.SIGKILL
        put(rest)
        with start(place, qmgr, home) as process:
            deadline = time.monotonic() + PATIENCE
            while qmgr.queues["LAB.RESULTS"] and time.monotonic() < deadline:
                time.sleep(0.1)
            process.terminate()
            assert process.wait(timeout=30) == 0, "a stop that was asked for is no failure"
        status = read_status(home, NAME)
        assert status is not None
        assert (status["state"], status["running"]) == ("stopped", False)
        left, aside = qmgr.queues["LAB.RESULTS"], [item.correlation_id for item in qmgr.queues["LAB.RESULTS.BACKOUT"]]
    assert left == []
    stored = Counter(message.header(MESSAGE_ID_HEADER) for message in place.committed())
    assert stored == Counter({identifier: records for identifier, records in sent.items() if records})
    values = Counter(message.value for message in place.committed())
    assert max(values.values()) == 1, "a record is there twice"
    assert Counter(aside) == Counter(identifier for identifier, records in sent.items() if not records)
    ended = place.all_written() - stored.total()
    sys.stdout.write(
        f"\n{len(sent)} messages, {stored.total()} records, {len(aside)} set aside; kills {dict(chaos.kills)}, "
        f"{chaos.faults} faults, {ended} records of transactions that were ended\n"
    )


def test_a_bridge_that_is_killed_again_and_again_moves_each_message_once(place: Place, tmp_path: Path) -> None:
    kill_and_account(place, tmp_path, seed=11, messages=120, kills=6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_five_hundred_messages_with_twenty_kills(place: Place, tmp_path: Path, seed: int) -> None:
    kill_and_account(place, tmp_path, seed=seed, messages=500, kills=20)


# --- as a service of the stack ---------------------------------------------------------------------------------------


def test_the_stack_runs_the_bridge_and_its_health_check_asks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = StackSettings.load(tmp_path, ports=dict.fromkeys((*PUBLIC_PORTS, *INTERNAL_PORTS), 0))
    with QueueManager() as qmgr:
        for name, value in {"URL": qmgr.url, "USER": qmgr.user, "PASSWORD": qmgr.password}.items():
            monkeypatch.setenv(f"CLINICAL_MQ_{name}", value)
        identifier = qmgr.put(payload(1, random.Random(5))[0])
        engine = Engine(settings, with_needs(["mq_bridge"]))
        engine.start()
        try:
            states = {state.name: state for state in engine.wait_ready(list(engine.units), 180)}
            if states["kafka"].state is State.NOT_INSTALLED:
                pytest.skip("Kafka's jars cannot be had here")
            assert states["mq_bridge"].state is State.HEALTHY, states["mq_bridge"].error
            deadline = time.monotonic() + 60
            while qmgr.queues["LAB.RESULTS"] and time.monotonic() < deadline:
                time.sleep(0.2)
            place = Place(settings.environment()["KAFKA_BOOTSTRAP_SERVERS"], "lab-results", "mq-bridge-progress")
            assert {message.header(MESSAGE_ID_HEADER) for message in place.committed()} == {identifier}
            asked = control._ask_service(settings, spec("mq_bridge"), engine.units["mq_bridge"].status)
            assert asked.state is State.HEALTHY
        finally:
            left = engine.stop()
    assert left == []
    told = read_status(tmp_path, NAME)
    assert told is not None
    assert (told["state"], told["moved"]) == ("stopped", 1)
