"""The bridge against a queue manager's REST API over real HTTP, with a Kafka in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from clinical_orchestration.ingestion import mq_bridge
from clinical_orchestration.ingestion.mq_bridge import Bridge, decode
from clinical_orchestration.ingestion.status_file import StatusFile, read_status
from clinical_orchestration.ingestion.worker_alerts import WorkerAlerts
from clinical_orchestration.stores.ibm_mq import (
    MqRefusedError,
    MqSettings,
    MqUnavailableError,
    RestMessageQueue,
    UnreadableMessageError,
)
from clinical_orchestration.stores.kafka import FencedError, Message, Record, RecordRefusedError, TransactionFailedError
from clinical_orchestration_tests.fakes import RecordingNotifier
from clinical_orchestration_tests.ingestion.fake_kafka import FakeKafka
from clinical_orchestration_tests.ingestion.mq_standin import Answer, Drop, QueueManager, Seen

PATIENT = "SUBJ-0042"
QUEUE, BACKOUT = "LAB.RESULTS", "LAB.RESULTS.BACKOUT"


class MemoryKafka(FakeKafka):
    """A Kafka in memory that also takes transactions."""

    def __init__(self) -> None:
        super().__init__()
        self.starts = 0
        self.fail: Callable[[Sequence[Record]], None] | None = None

    def ensure_topics(
        self, topics: Iterable[str], *, partitions: int = 3, config: Mapping[str, str] | None = None
    ) -> list[str]:
        return super().ensure_topics(topics, partitions=partitions)

    def start(self) -> None:
        self.starts += 1

    def commit(self, records: Sequence[Record]) -> None:
        if self.fail is not None:
            self.fail(records)
        self.send(records)

    def messages(self, topic: str) -> list[Message]:
        ranges = self.offsets(topic)
        return [message for batch in self.read(topic, ranges, max_messages=10_000) for message in batch.messages]


@pytest.fixture
def qmgr() -> Iterator[QueueManager]:
    with QueueManager() as manager:
        yield manager


@pytest.fixture
def kafka() -> MemoryKafka:
    memory = MemoryKafka()
    memory.ensure_topics(["lab-results"], partitions=2)
    return memory


def settings(qmgr: QueueManager, **changes: Any) -> MqSettings:
    values: dict[str, Any] = {
        "url": qmgr.url, "user": qmgr.user, "password": qmgr.password, "backout_threshold": 2, "batch": 10,
    }  # fmt: skip
    return MqSettings(**{**values, **changes})


GIVEN = ("now", "status", "alerts")


def bridge(qmgr: QueueManager, kafka: MemoryKafka, **changes: Any) -> Bridge:
    chosen = settings(qmgr, **{name: value for name, value in changes.items() if name not in GIVEN})
    made = Bridge(
        RestMessageQueue(chosen),
        chosen,
        transactions=kafka,
        reader=lambda: kafka,
        topics=kafka,
        topic="lab-results",
        trial="simulated",
        **{name: value for name, value in changes.items() if name in GIVEN},
    )
    made.connect()
    return made


def lab(value: float) -> str:
    return json.dumps({"patient_id": PATIENT, "timestamp": "2024-01-01T10:00:00Z", "test_name": "K", "value": value})


HL7 = "\r".join(
    [
        "MSH|^~\\&|LIS|LAB7|||20240102080000+0100||ORU^R01|1|P|2.5",
        f"PID|1||{PATIENT}",
        "OBR|1||||||20240101101500",
        "OBX|1|NM|K^Potassium||4.1|mmol/L|||||F",
        "OBX|2|NM|NA^Sodium||140|mmol/L|||||F",
        "OBX|3|NM|CL^Chloride||100|mmol/L|||||P",
    ]
)


# --- what is moved ---------------------------------------------------------------------------------------------------


def test_messages_are_moved_under_their_id_and_gone_from_the_queue(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    first, second = qmgr.put(lab(4.1)), qmgr.put(HL7)
    moving = bridge(qmgr, kafka)

    assert moving.cycle() is True
    assert moving.cycle() is False

    stored = sorted(kafka.messages("lab-results"), key=lambda item: (item.key, item.value))
    assert [item.key for item in stored] == [first.encode(), second.encode(), second.encode()]
    assert stored[0].value == lab(4.1).encode()
    assert {json.loads(item.value or b"")["test_name"] for item in stored[1:]} == {"Potassium", "Sodium"}
    assert {item.header("trial") for item in stored} == {"simulated"}
    assert stored[0].header("mq-message-id") == first
    assert qmgr.queues[QUEUE] == []
    report = moving.report()
    assert (report["moved"], report["records"], report["removed"], report["withheld"]) == (2, 3, 2, {"P": 1})
    assert report["depth"] == 0


def test_an_array_gives_a_record_each_and_json_keeps_its_bytes() -> None:
    assert decode("\ufeff [1, 2]").reasons == ["not_an_object: 2 of 2 elements are no objects, the first is 0"]
    assert decode("[]").reasons == ["empty: the array has no record"]
    assert decode('[{"a": 1}, {"a": 2}]').values == [b'{"a":1}', b'{"a":2}']
    assert decode(' {"a":  "\u00b5"}\n').values == ['{"a":  "\u00b5"}'.encode()]
    assert decode("{").reasons == ["invalid_json: not JSON, at line 1 column 2"]
    assert decode("x" * 10).reasons[0].startswith("invalid_json")
    assert decode(json.dumps({"a": "x" * 1_000_000})).reasons[0].startswith("too_large")


def test_a_message_that_breaks_the_contract_is_moved_because_silver_accounts_for_it(
    qmgr: QueueManager, kafka: MemoryKafka
) -> None:
    qmgr.put(json.dumps({"patient_id": PATIENT, "value": "???"}))
    bridge(qmgr, kafka).cycle()
    assert len(kafka.messages("lab-results")) == 1


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_what_was_moved_before_a_crash_is_only_removed_after_it(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    qmgr.put(lab(1))

    def no_delete(seen: Seen) -> None:
        if (seen.method, seen.phase) == ("DELETE", "before"):
            raise Drop

    qmgr.fault = no_delete
    with pytest.raises(MqUnavailableError):
        bridge(qmgr, kafka).cycle()
    assert len(qmgr.queues[QUEUE]) == 1
    qmgr.fault = None

    successor = bridge(qmgr, kafka)
    successor.cycle()

    assert len(kafka.messages("lab-results")) == 1
    assert qmgr.queues[QUEUE] == []
    assert successor.counts.suppressed == 1


def test_an_answer_lost_after_the_removal_loses_nothing(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    qmgr.put(lab(1))
    qmgr.put(lab(2))

    def lost_answer(seen: Seen) -> None:
        if (seen.method, seen.phase) == ("DELETE", "after"):
            qmgr.fault = None
            raise Drop

    qmgr.fault = lost_answer
    moving = bridge(qmgr, kafka)
    with pytest.raises(MqUnavailableError):
        moving.cycle()
    moving.cycle()
    assert len(kafka.messages("lab-results")) == 2
    assert qmgr.queues[QUEUE] == []


def test_a_failed_transaction_moves_nothing_and_the_bridge_connects_anew(
    qmgr: QueueManager, kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mq_bridge, "BACK_OFF", (0.01,))
    qmgr.put(lab(1))
    moving = bridge(qmgr, kafka, poll_seconds=0.01)

    def once(_: Sequence[Record]) -> None:
        kafka.fail = None
        raise TransactionFailedError("the transaction did not end well")

    kafka.fail = once
    qmgr.fault = lambda seen: moving.stopping.set() if seen.method == "DELETE" else None
    moving.run()
    assert kafka.starts == 3  # the fixture's, that of run, and the one after the failure
    assert len(kafka.messages("lab-results")) == 1
    assert moving.state == "stopped"


def test_a_fenced_bridge_ends(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    def fenced(_: Sequence[Record]) -> None:
        raise FencedError("another writer took over")

    qmgr.put(lab(1))
    kafka.fail = fenced
    with pytest.raises(FencedError):
        bridge(qmgr, kafka).run()
    assert len(qmgr.queues[QUEUE]) == 1


def test_ids_are_forgotten_only_when_the_message_is_gone_for_long(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    time = [1_000_000.0]
    identifier = qmgr.put(lab(1))
    copy = qmgr.queues[QUEUE][0]
    moving = bridge(qmgr, kafka, now=lambda: time[0], remember_seconds=60)
    moving.cycle()
    qmgr.queues[QUEUE].append(copy)  # another reader got it and rolled back
    time[0] += 30
    moving.cycle()
    assert len(kafka.messages("lab-results")) == 1
    assert moving.report()["remembered"] == 1
    time[0] += 60
    moving.cycle()
    assert moving.report()["remembered"] == 0
    facts = kafka.messages("mq-bridge-progress")
    assert [(item.key, item.value is None) for item in facts] == [
        (f"QM1/{QUEUE}/{identifier}".encode(), False),
        (f"QM1/{QUEUE}/{identifier}".encode(), True),
    ]
    assert bridge(qmgr, kafka).report()["remembered"] == 0


# --- poison ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_goes_to_the_backout_queue_with_its_reasons(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    body = HL7.replace("|4.1|", f"|{PATIENT}|").replace("|140|", "||")
    poison, good = qmgr.put(body), qmgr.put(lab(2))
    moving = bridge(qmgr, kafka)

    moving.cycle()
    assert [item.key for item in kafka.messages("lab-results")] == [good.encode()]
    assert len(qmgr.queues[QUEUE]) == 1, "one try is not enough"
    moving.cycle()

    assert qmgr.queues[QUEUE] == []
    (aside,) = qmgr.queues[BACKOUT]
    assert (aside.body, aside.correlation_id, aside.persistence) == (body, poison, "persistent")
    assert aside.properties is not None
    assert "invalid_number: OBX-5 of OBX 1" in aside.properties
    assert "missing_field: OBX-5 of OBX 2" in aside.properties
    assert PATIENT not in aside.properties
    report = moving.report()
    assert (report["poison"], report["poison_reasons"]) == (1, {"invalid_number": 1, "missing_field": 1})
    assert PATIENT not in json.dumps(report)


@pytest.mark.parametrize("phase", ["before", "after"])
def test_a_crash_around_the_backout_neither_loses_nor_doubles(
    qmgr: QueueManager, kafka: MemoryKafka, phase: str
) -> None:
    qmgr.put("{")

    def crash(seen: Seen) -> None:
        if (seen.method, seen.phase) == ("POST", phase):
            qmgr.fault = None
            raise Drop

    qmgr.fault = crash
    with pytest.raises(MqUnavailableError):
        bridge(qmgr, kafka, backout_threshold=1).cycle()
    assert len(qmgr.queues[QUEUE]) == 1, "it is removed only after it was put"
    bridge(qmgr, kafka, backout_threshold=1).cycle()
    assert qmgr.queues[QUEUE] == []
    assert len(qmgr.queues[BACKOUT]) == 1


def test_people_are_told_of_poison_and_of_a_bridge_that_cannot_work_for_long(
    qmgr: QueueManager, kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mq_bridge, "BACK_OFF", (0.01,))
    people, time = RecordingNotifier(), [0.0]
    alerts = WorkerAlerts(lambda: people, "mq_bridge", "IBM MQ bridge", "logs", clock=lambda: time[0])
    qmgr.put(f'{{"patient_id": "{PATIENT}"')
    moving = bridge(qmgr, kafka, alerts=alerts, backout_threshold=1, poll_seconds=0.01)
    states: list[list[str]] = []

    def away(seen: Seen) -> None:
        time[0] += 100
        states.append([alert.key for alert in people.sent])
        if 6 < seen.number < 16:
            raise Answer(503, 2059)
        if seen.number > 20:
            moving.stopping.set()

    qmgr.fault = away
    moving.run()

    assert [alert.key for alert in people.sent] == ["mq_bridge:poison", "mq_bridge:degraded"]
    assert people.resolved == ["mq_bridge:degraded", "mq_bridge:degraded"], "at the start, and when it works again"
    poison, degraded = people.sent
    assert "LAB.RESULTS.BACKOUT" in poison.what
    assert "2059 MQRC_Q_MGR_NOT_AVAILABLE" in degraded.what
    assert PATIENT not in str(people.sent)


def test_a_notifier_that_fails_does_not_stop_the_bridge(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    def broken() -> Any:
        raise OSError("no database")

    qmgr.put("{")
    alerts = WorkerAlerts(broken, "mq_bridge", "IBM MQ bridge", "logs")
    bridge(qmgr, kafka, alerts=alerts, backout_threshold=1).cycle()
    assert len(qmgr.queues[BACKOUT]) == 1


def test_a_full_backout_queue_holds_up_nothing_else(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    qmgr.put("{")
    qmgr.inhibited.add((BACKOUT, "PUT"))
    moving = bridge(qmgr, kafka, backout_threshold=1)
    for number in range(3):
        qmgr.put(lab(number))
        with pytest.raises(MqUnavailableError, match="MQRC_PUT_INHIBITED"):
            moving.cycle()
    assert len(kafka.messages("lab-results")) == 3
    assert len(qmgr.queues[QUEUE]) == 1


def test_a_record_that_kafka_refuses_does_not_hold_up_the_others(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    qmgr.put(lab(666))
    good = qmgr.put(lab(2))

    def refuse(records: Sequence[Record]) -> None:
        large = {index: "MSG_SIZE_TOO_LARGE" for index, item in enumerate(records) if b"666" in (item.value or b"")}
        if large:
            raise RecordRefusedError(large)

    kafka.fail = refuse
    moving = bridge(qmgr, kafka, backout_threshold=1)
    moving.cycle()
    assert [item.key for item in kafka.messages("lab-results")] == [good.encode()]
    assert [item.body for item in qmgr.queues[BACKOUT]] == [lab(666)]


def test_a_message_that_is_no_text_is_passed_over_and_told(qmgr: QueueManager, kafka: MemoryKafka) -> None:
    for _ in range(12):
        qmgr.put("binary", message_format="MQHRF2")
    qmgr.put(lab(1))
    moving = bridge(qmgr, kafka, batch=10)
    for _ in range(3):
        moving.cycle()
    assert len(kafka.messages("lab-results")) == 1
    assert moving.report()["stuck"] == 12
    assert "MQSTR" in str(moving.last_error)
    assert len(qmgr.queues[QUEUE]) == 12


# --- the client ------------------------------------------------------------------------------------------------------


def client(qmgr: QueueManager, **changes: Any) -> RestMessageQueue:
    return RestMessageQueue(settings(qmgr, **changes))


def test_the_client_lists_browses_puts_and_removes(qmgr: QueueManager) -> None:
    queue = client(qmgr)
    identifier = queue.put(BACKOUT, "caf\u00e9 \u00b5", correlation_id="ab" * 24, properties={"why": 'a;"b", c'})
    assert len(identifier) == 48
    assert [item.message_id for item in queue.listing(BACKOUT, limit=5)] == [identifier]
    assert queue.listing(BACKOUT, limit=5, correlation_id="cd" * 24) == []
    message = queue.browse(BACKOUT, identifier)
    assert message is not None
    assert (message.body, message.correlation_id, message.persistence) == ("caf\u00e9 \u00b5", "ab" * 24, "persistent")
    assert message.properties == 'why;"a  b   c";string'
    assert queue.remove(BACKOUT, identifier) is True
    assert queue.remove(BACKOUT, identifier) is False
    assert queue.browse(BACKOUT, identifier) is None
    assert queue.listing(QUEUE, limit=1) == []


def test_errors_say_what_to_do_and_no_secret(qmgr: QueueManager) -> None:
    identifier = qmgr.put("secret body")
    seen: list[str] = []

    def failing(kind: type[Exception], act: Callable[[], object], *words: str) -> None:
        with pytest.raises(kind) as caught:
            act()
        text = str(caught.value)
        assert all(word in text for word in words), text
        seen.append(text + repr(caught.value.__cause__))

    failing(MqRefusedError, lambda: client(qmgr, password="wrong-1").listing(QUEUE, limit=1), "401", "CLINICAL_MQ_USER")
    failing(MqRefusedError, lambda: client(qmgr).listing("NO.SUCH", limit=1), "2085 MQRC_UNKNOWN_OBJECT_NAME")
    failing(MqRefusedError, lambda: client(qmgr, queue_manager="QM2").listing(QUEUE, limit=1), "404", "QUEUE_MANAGER")
    qmgr.running = False
    failing(MqUnavailableError, lambda: client(qmgr).browse(QUEUE, identifier), "503", "2059 MQRC_Q_MGR_NOT_AVAILABLE")
    qmgr.running = True
    qmgr.inhibited.add((QUEUE, "GET"))
    failing(MqUnavailableError, lambda: client(qmgr).remove(QUEUE, identifier), "2016 MQRC_GET_INHIBITED")
    qmgr.inhibited.clear()
    binary = qmgr.put("x", message_format="MQIMS")
    failing(UnreadableMessageError, lambda: client(qmgr).browse(QUEUE, binary), "MQSTR")

    def drop(_: Seen) -> None:
        raise Drop

    qmgr.fault = drop
    failing(MqUnavailableError, lambda: client(qmgr).browse(QUEUE, identifier), "no answer")
    failing(MqUnavailableError, lambda: client(qmgr, url="http://127.0.0.1:9").listing(QUEUE, limit=1), "127.0.0.1:9")
    for text in seen:
        assert not any(word in text for word in (qmgr.password, "wrong-1", qmgr.user, "secret body"))


def test_ltpa_logs_in_once_and_again_when_the_token_has_run_out(qmgr: QueueManager) -> None:
    queue = client(qmgr, auth="ltpa")
    queue.listing(QUEUE, limit=1)
    queue.listing(QUEUE, limit=1)
    assert qmgr.logins == 1
    qmgr.tokens.clear()
    queue.listing(QUEUE, limit=1)
    assert qmgr.logins == 2
    with pytest.raises(MqRefusedError, match="logging in"):
        client(qmgr, auth="ltpa", password="wrong-1").listing(QUEUE, limit=1)


def test_settings_refuse_credentials_in_the_address_and_without_tls(qmgr: QueueManager, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not hold credentials") as caught:
        MqSettings(url="https://bridge:pass-word-1@mq:9443")
    assert "CLINICAL_MQ_USER" in str(caught.value)
    with pytest.raises(ValueError, match="https"):
        RestMessageQueue(MqSettings(url="http://mq.example:9080", user="bridge"))
    (tmp_path / "password").write_text(f"{qmgr.password}\n")
    queue = client(qmgr, password="", password_file=tmp_path / "password")
    assert queue.listing(QUEUE, limit=1) == []


def test_tls_wants_the_right_certificate(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mqweb")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "server.pem").write_bytes(private + public)
    (tmp_path / "ca.pem").write_bytes(public)
    with QueueManager(certificate=tmp_path / "server.pem") as manager:
        assert client(manager, ca_file=tmp_path / "ca.pem").listing(QUEUE, limit=1) == []
        with pytest.raises(MqUnavailableError, match="no answer"):
            client(manager).listing(QUEUE, limit=1)


# --- how it lives ----------------------------------------------------------------------------------------------------


def test_a_queue_manager_that_is_away_is_waited_for_and_told(
    qmgr: QueueManager, kafka: MemoryKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mq_bridge, "BACK_OFF", (0.01,))
    qmgr.put(lab(1))
    status = StatusFile(tmp_path, mq_bridge.NAME)
    moving = bridge(qmgr, kafka, status=status, poll_seconds=0.01)
    states: list[tuple[str, str | None]] = []

    def away(seen: Seen) -> None:
        if seen.number <= 3:
            shown = read_status(tmp_path, mq_bridge.NAME)
            states.append((str((shown or {}).get("state")), (shown or {}).get("last_error")))
            raise Answer(503, 2059)
        if seen.method == "DELETE" and seen.phase == "after":
            moving.stopping.set()

    qmgr.fault = away
    moving.run()
    moving.close()

    assert states[-1][0] == "degraded"
    assert "2059 MQRC_Q_MGR_NOT_AVAILABLE" in str(states[-1][1])
    shown = read_status(tmp_path, mq_bridge.NAME)
    assert shown is not None
    assert (shown["state"], shown["moved"], shown["errors"], shown["running"]) == ("stopped", 1, 3, True)
    assert status.path.stat().st_mode & 0o777 == 0o600


def test_without_configuration_it_is_off_and_says_how_to_turn_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    monkeypatch.delenv("CLINICAL_MQ_URL", raising=False)
    assert mq_bridge.main(["run"]) == 2
    assert "off: not configured" in capsys.readouterr().err
    assert mq_bridge.main(["status"]) == 0
    assert json.loads(capsys.readouterr().out)["what_to_do"] == mq_bridge.CURE
    monkeypatch.setenv("CLINICAL_MQ_URL", "https://bridge:pass-word-1@mq:9443")
    assert mq_bridge.main(["run"]) == 2
    shown = capsys.readouterr().err
    assert "CLINICAL_MQ_URL" in shown
    assert "pass-word-1" not in shown
