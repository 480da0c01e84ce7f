"""The simulated trial on its way in: into Kafka, or into files where there is no Kafka.

``python -m clinical_orchestration.ingestion.simulate --messages 100000 --broken 0.02 --duplicates 0.01 --late 0.01``
streams into the broker that ``KAFKA_BOOTSTRAP_SERVERS`` names; ``--files FOLDER`` writes files instead: messages as
NDJSON by topic, Kafka records as ``<topic>.records.ndjson`` and SDTM domains as csv.

Every record carries the headers ``trial``, ``simulation`` (identity of the settings) and ``sequence``, by which an
interrupted simulation goes on where it was.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson

from clinical_orchestration.ingestion.kafka import TRIAL_HEADER, bronze_rows
from clinical_orchestration.simulation import GroundTruth, SimulatedMessage, simulate, simulation_id
from clinical_orchestration.simulation.physiology import LABS
from clinical_orchestration.stores.kafka import (
    Message,
    OffsetRange,
    Producer,
    Record,
    TopicAdmin,
    TopicReader,
    UnknownTopicError,
)
from clinical_orchestration.stores.tables import TableStore, TransactionMovedError
from clinical_orchestration.tables import bronze

if TYPE_CHECKING:
    from clinical_orchestration.trials import TrialProfile
    from clinical_orchestration.trials.profile import SimulationSettings

SIMULATION_HEADER = "simulation"
SEQUENCE_HEADER = "sequence"
MARKER_TOPIC = "clinical-simulations"
"""One message a finished simulation: key its identity, value JSON with the topics it is in."""

_CHUNK = 2_000
_REMEMBERED = 1_000_000  # messages among which a repeated one is looked for; repeats come within hours

Progress = Callable[[int], None]


@dataclass(slots=True)
class SimulationReport:
    """What :func:`ensure_simulated` did.

    Attributes:
        simulation: identity of the simulation.
        produced: messages produced, or rows written, by this call.
        present: messages that were there before.
        truth: what the messages are; empty where everything was there already and nothing was simulated.
    """

    simulation: str
    produced: int
    present: int
    truth: GroundTruth = field(default_factory=GroundTruth)

    def as_metadata(self) -> dict[str, Any]:
        """Return counts for a run's metadata."""
        return {
            "simulation": self.simulation,
            "produced": self.produced,
            "present_before": self.present,
            "kinds_by_table": self.truth.as_dict(),
        }


def record_of(message: SimulatedMessage, topics: Mapping[str, str], trial: str, simulation: str = "") -> Record:
    """Return the Kafka record of a simulated message; its timestamp is the time of arrival."""
    headers: tuple[tuple[str, bytes], ...] = ((TRIAL_HEADER, trial.encode()),)
    if simulation:
        sequence = str(message.sequence).encode()
        headers = (*headers, (SIMULATION_HEADER, simulation.encode()), (SEQUENCE_HEADER, sequence))
    return Record(topics[message.domain], message.value, message.key, headers, message.arrival_ms)


def stream_to_kafka(
    producer: Producer,
    messages: Iterable[SimulatedMessage],
    topics: Mapping[str, str],
    *,
    trial: str,
    simulation: str = "",
    rate: float | None = None,
    skip: Callable[[int], bool] | None = None,
    progress: Progress | None = None,
) -> int:
    """Produce messages in their order and return how many.

    Args:
        producer: where to.
        messages: what, in order of arrival.
        topics: domain -> topic.
        trial: name of the trial profile, for the header.
        simulation: identity of the simulation, for the header; empty for none.
        rate: messages a second; None as fast as they are acknowledged.
        skip: says of a sequence number that its message is there already.
        progress: called with the number of messages produced so far, about ten times a second or once a chunk.

    Raises:
        DeliveryError: Kafka did not acknowledge; everything before the last chunk is there.
    """
    size = _CHUNK if rate is None else max(1, min(_CHUNK, round(rate / 10)))
    started = time.monotonic()
    sent = 0
    chunk: list[Record] = []

    def send() -> None:
        nonlocal sent
        producer.send(chunk)
        sent += len(chunk)
        chunk.clear()
        if progress is not None:
            progress(sent)
        if rate is not None:
            time.sleep(max(0.0, started + sent / rate - time.monotonic()))

    for message in messages:
        if skip is not None and skip(message.sequence):
            continue
        chunk.append(record_of(message, topics, trial, simulation))
        if len(chunk) >= size:
            send()
    if chunk:
        send()
    return sent


def ensure_simulated(
    reader: TopicReader,
    producer: Producer,
    admin: TopicAdmin,
    profile: TrialProfile,
    topics: Mapping[str, str],
    *,
    messages: int | None = None,
    progress: Progress | None = None,
) -> SimulationReport:
    """See to it that the profile's simulation is in Kafka, each message once.

    A finished simulation is noted in the topic ``clinical-simulations``; then nothing is done. One that was
    interrupted goes on: what its topics hold already is known by the records' headers. The topics are set to keep
    messages of any age, because simulated ones carry the times of the simulated trial.

    Args:
        reader: to see what is there.
        producer: where to.
        admin: makes absent topics.
        profile: a trial with ``sources.simulation``.
        topics: domain -> topic.
        messages: exactly so many messages, see :func:`clinical_orchestration.simulation.simulate`.
        progress: called with the number of messages produced so far.

    Raises:
        ValueError: the profile has no simulation.
        DeliveryError: Kafka did not acknowledge; call again to go on.
        KafkaUnavailableError: no broker answers.
    """
    settings = _settings(profile)
    identity = simulation_id(settings, profile.study_id, messages)
    admin.ensure_topics([*topics.values(), MARKER_TOPIC])
    here = {topic: reader.topic_id(topic) for topic in topics.values()}
    marker = _marker(reader, identity)
    if marker is not None and marker.get("topics") == here:
        return SimulationReport(identity, 0, int(marker.get("messages", 0)))
    admin.keep_forever([*topics.values(), MARKER_TOPIC])
    seen = _sequences(reader, topics.values(), identity)
    truth = GroundTruth()
    produced = stream_to_kafka(
        producer,
        truth.watch(simulate(settings, profile.study_id, messages=messages)),
        topics,
        trial=profile.name,
        simulation=identity,
        skip=seen.__contains__ if seen else None,
        progress=progress,
    )
    done = orjson.dumps({"messages": truth.total, "topics": here, "kinds": truth.as_dict()})
    producer.send([Record(MARKER_TOPIC, done, identity.encode())])
    return SimulationReport(identity, produced, truth.total - produced, truth)


def _settings(profile: TrialProfile) -> SimulationSettings:
    if profile.sources.simulation is None:
        raise ValueError(f"trial {profile.name} has no simulation: its profile lacks sources.simulation")
    return profile.sources.simulation


def _marker(reader: TopicReader, identity: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = None
    for message in _all_messages(reader, MARKER_TOPIC):
        if message.key == identity.encode() and message.value:
            found = orjson.loads(message.value)
    return found


def _sequences(reader: TopicReader, topics: Iterable[str], identity: str) -> set[int]:
    """Return the sequence numbers of a simulation's messages that the topics hold."""
    wanted = identity.encode()
    seen: set[int] = set()
    for topic in topics:
        for message in _all_messages(reader, topic):
            headers = dict(message.headers)
            if headers.get(SIMULATION_HEADER) == wanted:
                seen.add(int(headers[SEQUENCE_HEADER]))
    return seen


def _all_messages(reader: TopicReader, topic: str) -> Iterator[Message]:
    try:
        kept: dict[int, OffsetRange] = reader.offsets(topic)
    except UnknownTopicError:
        return
    for batch in reader.read(topic, kept, max_messages=20_000):
        yield from batch.messages


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class WrittenFiles:
    """What :func:`write_files` wrote: lines or rows by file name, and what the messages were."""

    folder: Path
    rows: dict[str, int]
    truth: GroundTruth


_SDTM_COLUMNS = {
    "dm": (
        "STUDYID", "DOMAIN", "USUBJID", "SUBJID", "RFSTDTC", "RFICDTC", "SITEID", "AGE", "AGEU", "SEX", "RACE", "ARM",
        "ACTARM", "DMDTC",
    ),
    "vs": (
        "STUDYID", "DOMAIN", "USUBJID", "VSSEQ", "VSTESTCD", "VSTEST", "VSORRES", "VSORRESU", "VSSTRESC", "VSSTRESN",
        "VSSTRESU", "VSDTC",
    ),
    "lb": (
        "STUDYID", "DOMAIN", "USUBJID", "LBSEQ", "LBTESTCD", "LBTEST", "LBORRES", "LBORRESU", "LBSTRESC", "LBSTRESN",
        "LBSTRESU", "LBSTNRLO", "LBSTNRHI", "LBNRIND", "LBDTC",
    ),
    "ae": ("STUDYID", "DOMAIN", "USUBJID", "AESEQ", "AETERM", "AEDECOD", "AETOXGR", "AESTDTC", "AEDTC"),
    "ex": (
        "STUDYID", "DOMAIN", "USUBJID", "EXSEQ", "EXTRT", "EXDOSE", "EXDOSU", "EXROUTE", "EXDOSFRQ", "EXSTDTC",
        "EXENDTC",
    ),
    "cm": (
        "STUDYID", "DOMAIN", "USUBJID", "CMSEQ", "CMTRT", "CMDECOD", "CMDOSE", "CMDOSU", "CMROUTE", "CMDOSFRQ",
        "CMSTDTC", "CMDTC",
    ),
}  # fmt: skip
_VITAL_TESTS = {
    "heart_rate": ("HR", "Heart Rate", "beats/min"),
    "blood_pressure_systolic": ("SYSBP", "Systolic Blood Pressure", "mmHg"),
    "blood_pressure_diastolic": ("DIABP", "Diastolic Blood Pressure", "mmHg"),
    "temperature": ("TEMP", "Temperature", "C"),
    "spo2": ("OXYSAT", "Oxygen Saturation", "%"),
}
_STUDY_DRUGS = ("PLACEBO", "STUDY DRUG")
_REFERENCE = {lab.code: (lab.low, lab.high) for lab in LABS}


def write_files(
    folder: Path,
    messages: Iterable[SimulatedMessage],
    topics: Mapping[str, str],
    *,
    trial: str,
    sdtm: bool = True,
    ndjson: bool = True,
    progress: Progress | None = None,
) -> WrittenFiles:
    """Write messages into a folder, replacing what a former call left there.

    - ``<topic>.records.ndjson``: every message as a Kafka record in JSON: time of arrival, key, headers and value (as
      base64 where it is no UTF-8). Nothing is lost in it; :func:`ingest_record_files` reads it.
    - ``<topic>.ndjson``: the values, one a line, as the gateway takes them; messages without a value are left out.
    - ``dm.csv vs.csv lb.csv ae.csv ex.csv cm.csv``: the good messages (and repeated ones, as repeated rows) as SDTM
      domains, for ``--source``. Broken messages have no SDTM row.

    Args:
        folder: made where absent.
        messages: in order of arrival.
        topics: domain -> topic.
        trial: name of the trial profile, for the header.
        sdtm: whether to write the csv files.
        ndjson: whether to write ``<topic>.ndjson``.
        progress: called with the number of messages so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    truth = GroundTruth()
    rows: dict[str, int] = {}
    with _Files(folder, rows) as files:
        tables = _SdtmWriter(files) if sdtm else None
        for domain in topics:
            files.open(f"{topics[domain]}.records.ndjson")
        for count, message in enumerate(truth.watch(messages), start=1):
            record = record_of(message, topics, trial)
            files.line(f"{record.topic}.records.ndjson", orjson.dumps(_envelope(record)))
            if ndjson and record.value is not None:
                files.line(f"{record.topic}.ndjson", record.value)
            if tables is not None and message.record is not None:
                tables.write(message)
            if progress is not None and count % _CHUNK == 0:
                progress(count)
    return WrittenFiles(folder, rows, truth)


class _Files:
    """Files written under temporary names and renamed together, so that a reader never sees half of one."""

    def __init__(self, folder: Path, rows: dict[str, int]) -> None:
        self._folder, self._rows = folder, rows
        self._open: dict[str, IO[bytes]] = {}

    def __enter__(self) -> _Files:
        return self

    def open(self, name: str) -> IO[bytes]:
        if name not in self._open:
            self._open[name] = (self._folder / f".{name}.part").open("wb")
            self._rows[name] = 0
        return self._open[name]

    def line(self, name: str, line: bytes) -> None:
        self.open(name).write(line + b"\n")
        self._rows[name] += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, stream in self._open.items():
            stream.close()
            part = self._folder / f".{name}.part"
            if kind is None:
                part.replace(self._folder / name)
            else:
                part.unlink()


class _SdtmWriter:
    """Turns good messages into SDTM rows. A repeated message gives the same rows again, sequence numbers included."""

    def __init__(self, files: _Files) -> None:
        self._files = files
        self._last: dict[tuple[str, str], int] = {}
        self._given: dict[tuple[str, bytes], int] = {}
        for name, columns in _SDTM_COLUMNS.items():
            files.open(f"{name}.csv").write(_csv(columns) + b"\n")

    def write(self, message: SimulatedMessage) -> None:
        record = message.record or {}
        getattr(self, f"_{message.domain}")(record, message.value or b"")

    def _row(self, name: str, values: Mapping[str, object]) -> None:
        row = {"DOMAIN": name.upper(), **values}
        self._files.line(f"{name}.csv", _csv([row.get(column, "") for column in _SDTM_COLUMNS[name]]))

    def _first(self, name: str, patient: str, value: bytes, count: int) -> int:
        """Return the first of `count` sequence numbers; those given before where the message was written before."""
        digest = (name, hashlib.blake2b(value, digest_size=12).digest())
        if digest not in self._given:
            self._given[digest] = self._last.get((name, patient), 0) + 1
            self._last[name, patient] = self._given[digest] + count - 1
            if len(self._given) > _REMEMBERED:
                del self._given[next(iter(self._given))]
        return self._given[digest]

    def _subjects(self, record: Mapping[str, Any], value: bytes) -> None:
        self._row(
            "dm",
            {
                **_study(record), "SUBJID": record["patient_id"].rsplit("-", 1)[-1],
                "RFSTDTC": record["treatment_start"], "RFICDTC": record["enrolled_at"], "SITEID": record["site"],
                "AGE": record["age"], "AGEU": "YEARS", "SEX": record["sex"], "RACE": record["race"],
                "ARM": record["arm"], "ACTARM": record["arm"], "DMDTC": record["enrolled_at"],
            },
        )  # fmt: skip

    def _patient_vitals(self, record: Mapping[str, Any], value: bytes) -> None:
        taken = [field for field in _VITAL_TESTS if field in record]
        first = self._first("vs", record["patient_id"], value, len(taken))
        for place, name in enumerate(taken):
            code, label, unit = _VITAL_TESTS[name]
            self._row(
                "vs",
                {
                    **_study(record), "VSSEQ": first + place, "VSTESTCD": code, "VSTEST": label,
                    "VSORRES": record[name], "VSORRESU": unit, "VSSTRESC": record[name], "VSSTRESN": record[name],
                    "VSSTRESU": unit, "VSDTC": _dtc(record["timestamp"]),
                },
            )  # fmt: skip

    def _lab_results(self, record: Mapping[str, Any], value: bytes) -> None:
        code, number, unit = record["test_name"], record["value"], record["unit"]
        low, high = _REFERENCE[code]
        self._row(
            "lb",
            {
                **_study(record), "LBSEQ": self._first("lb", record["patient_id"], value, 1), "LBTESTCD": code,
                "LBTEST": code, "LBORRES": number, "LBORRESU": unit, "LBSTRESC": number, "LBSTRESN": number,
                "LBSTRESU": unit, "LBSTNRLO": low, "LBSTNRHI": high,
                "LBNRIND": "LOW" if number < low else "HIGH" if number > high else "NORMAL",
                "LBDTC": _dtc(record["timestamp"]),
            },
        )  # fmt: skip

    def _medications(self, record: Mapping[str, Any], value: bytes) -> None:
        name, patient, time_ = record["drug_name"], record["patient_id"], _dtc(record["timestamp"])
        if name in _STUDY_DRUGS:
            self._row(
                "ex",
                {
                    **_study(record), "EXSEQ": self._first("ex", patient, value, 1), "EXTRT": name,
                    "EXDOSE": record["dosage"], "EXDOSU": record["unit"], "EXROUTE": record["route"].upper(),
                    "EXDOSFRQ": record["frequency"], "EXSTDTC": time_, "EXENDTC": time_,
                },
            )  # fmt: skip
            return
        self._row(
            "cm",
            {
                **_study(record), "CMSEQ": self._first("cm", patient, value, 1), "CMTRT": name, "CMDECOD": name,
                "CMDOSE": record["dosage"], "CMDOSU": record["unit"], "CMROUTE": record["route"].upper(),
                "CMDOSFRQ": record["frequency"], "CMSTDTC": time_, "CMDTC": time_,
            },
        )  # fmt: skip

    def _adverse_events(self, record: Mapping[str, Any], value: bytes) -> None:
        self._row(
            "ae",
            {
                **_study(record), "AESEQ": self._first("ae", record["patient_id"], value, 1),
                "AETERM": record["event_type"].capitalize(), "AEDECOD": record["event_type"],
                "AETOXGR": record["severity"].removeprefix("grade_"), "AESTDTC": _dtc(record["event_timestamp"]),
                "AEDTC": _dtc(record["report_timestamp"]),
            },
        )  # fmt: skip


def _study(record: Mapping[str, Any]) -> dict[str, object]:
    return {"STUDYID": record["study_id"], "USUBJID": record["patient_id"]}


def _dtc(stamp: str) -> str:
    """Return an SDTM date: ISO 8601 without the zone, which the study's documents define (here UTC)."""
    return stamp.removesuffix("Z")


class _Line:
    """Gives one line of csv at a time."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text = text
        return len(text)


def _csv(values: Iterable[object]) -> bytes:
    line = _Line()
    csv.writer(line, lineterminator="").writerow(list(values))
    return line.text.encode()


def _envelope(record: Record) -> dict[str, object]:
    try:
        value, encoding = None if record.value is None else record.value.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        value, encoding = base64.b64encode(record.value or b"").decode("ascii"), "base64"
    return {
        "timestamp_ms": record.timestamp_ms,
        "key": None if record.key is None else record.key.decode(),
        "headers": {name: text.decode() for name, text in record.headers},
        "value": value,
        "encoding": encoding,
    }


def _opened(line: bytes, topic: str, row: int) -> Message:
    """Read one line of a ``.records.ndjson`` file; `row` stands for the offset."""
    item = orjson.loads(line)
    value = item["value"]
    if value is not None:
        value = base64.b64decode(value) if item["encoding"] == "base64" else value.encode()
    headers = tuple((name, text.encode()) for name, text in item.get("headers", {}).items())
    stamp = item["timestamp_ms"]
    return Message(topic, 0, row, -1 if stamp is None else stamp, (item["key"] or "").encode(), value, headers)


def ingest_record_files(
    tables: TableStore,
    folder: Path,
    topics: Mapping[str, str],
    *,
    default_trial: str,
    now: datetime | None = None,
    chunk_rows: int = 20_000,
) -> dict[str, int]:
    """Append the ``<topic>.records.ndjson`` files of a folder to bronze, each row once.

    Rows are messages (``record_format`` ``message``) of the source ``file:<topic>.records.ndjson``, received when the
    record says. The next row is a Delta app transaction (``file:<trial>:<name>@<sha256>``) in the commit of the rows.

    Returns:
        Rows appended by this call, by domain.
    """
    import pyarrow as pa

    appended: dict[str, int] = {}
    for domain, topic in topics.items():
        path = folder / f"{topic}.records.ndjson"
        if not path.is_file():
            continue
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        app = f"file:{default_trial}:{path.name}@{digest}"
        table = bronze(domain)
        start = tables.transaction_version(table, app) or 0
        appended[domain] = 0
        with path.open("rb") as stream:
            for chunk in _chunks(stream, start, chunk_rows):
                messages = [_opened(line, topic, row) for row, line in chunk]
                rows = bronze_rows(messages, default_trial, now or datetime.now(UTC))
                positions = [f"{path.name}@{digest[:12]}#{row}" for row, _ in chunk]
                for name, values in (
                    ("source", [f"file:{path.name}"] * len(chunk)),
                    ("source_position", positions),
                ):
                    place = rows.schema.get_field_index(name)
                    rows = rows.set_column(place, rows.schema.field(place), pa.array(values, pa.string()))
                after = start + len(chunk)
                expected = {app: start or None}
                try:
                    written = tables.append(table, rows, transactions={app: after}, expected=expected)
                except TransactionMovedError:
                    break  # another run ingests the same file; it has what we were about to add
                if written is not None:
                    appended[domain] += len(chunk)
                start = after
    return appended


def _chunks(stream: Iterable[bytes], start: int, size: int) -> Iterator[list[tuple[int, bytes]]]:
    chunk: list[tuple[int, bytes]] = []
    for row, line in enumerate(stream):
        if row < start:
            continue
        chunk.append((row, line))
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def ensure_simulated_files(
    tables: TableStore,
    folder: Path,
    profile: TrialProfile,
    topics: Mapping[str, str],
    *,
    messages: int | None = None,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> SimulationReport:
    """See to it that the profile's simulation is in bronze without Kafka, by way of files; each message once.

    Args:
        tables: the lakehouse.
        folder: where simulations are kept; this one gets a subfolder with its identity as name.
        profile: a trial with ``sources.simulation``.
        topics: domain -> topic, for file names.
        messages: see :func:`clinical_orchestration.simulation.simulate`.
        now: time of ingestion.
        progress: called with the number of messages written to files so far.

    Raises:
        ValueError: the profile has no simulation.
    """
    settings = _settings(profile)
    identity = simulation_id(settings, profile.study_id, messages)
    target = folder / identity
    complete = target / "complete.json"
    truth = GroundTruth()
    if not complete.is_file():
        stream = simulate(settings, profile.study_id, messages=messages)
        written = write_files(target, stream, topics, trial=profile.name, sdtm=False, ndjson=False, progress=progress)
        truth = written.truth
        complete.write_bytes(orjson.dumps({"messages": truth.total, "kinds": truth.as_dict()}))
    total = int(orjson.loads(complete.read_bytes())["messages"])
    appended = sum(ingest_record_files(tables, target, topics, default_trial=profile.name, now=now).values())
    return SimulationReport(identity, appended, total - appended, truth)


# --- command line ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Stream or write a simulated trial; a JSON summary with the truth about the messages goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m clinical_orchestration.ingestion.simulate", description=__doc__)
    parser.add_argument("--trial", default="simulated", help="profile that gives the defaults (default: %(default)s)")
    parser.add_argument("--messages", type=int, help="exactly so many (default: all of the profile's trial)")
    parser.add_argument("--rate", type=float, help="messages a second (default: as fast as Kafka takes them)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--broken", type=float, help="share of messages that the contract rejects")
    parser.add_argument("--duplicates", type=float, help="share of messages that repeat an earlier one")
    parser.add_argument("--late", type=float, help="share of messages that arrive hours late")
    parser.add_argument("--missing", type=float, help="share of measurements not taken")
    parser.add_argument("--subjects", type=int)
    parser.add_argument("--days", type=float)
    parser.add_argument("--start", help="first day of the trial, ISO 8601 with zone")
    parser.add_argument("--files", type=Path, metavar="FOLDER", help="write files there instead of streaming")
    parser.add_argument("--bootstrap-servers", help="Kafka brokers (default: KAFKA_BOOTSTRAP_SERVERS)")
    chosen = parser.parse_args(arguments)

    from clinical_orchestration.settings import ClientSettings, Variables
    from clinical_orchestration.stores.kafka import ConfluentProducer, ConfluentTopicAdmin
    from clinical_orchestration.trials import load_trial

    topics = Variables().topics()
    given = {
        "seed": chosen.seed, "broken_rate": chosen.broken, "duplicate_rate": chosen.duplicates,
        "late_rate": chosen.late, "missing_rate": chosen.missing, "subjects": chosen.subjects, "days": chosen.days,
        "start": chosen.start,
    }  # fmt: skip
    try:
        profile = load_trial(chosen.trial)
        changes = {name: value for name, value in given.items() if value is not None}
        settings = _settings(profile).model_copy(update=changes)
        stream = simulate(settings, profile.study_id, messages=chosen.messages)
        if chosen.rate is not None and chosen.rate <= 0:
            raise ValueError("the rate must be positive")
    except ValueError as error:
        parser.error(str(error))
    identity = simulation_id(settings, profile.study_id, chosen.messages)
    truth = GroundTruth()
    started = time.monotonic()
    summary: dict[str, Any] = {"simulation": identity, "trial": profile.name}
    with _ProgressBar(chosen.messages) as progress:
        if chosen.files is not None:
            written = write_files(chosen.files, stream, topics, trial=profile.name, progress=progress)
            truth = written.truth
            summary |= {"folder": str(chosen.files), "rows": written.rows}
        else:
            servers = chosen.bootstrap_servers or ClientSettings().kafka_bootstrap_servers
            try:
                admin = ConfluentTopicAdmin(servers, timeout=5.0)
                admin.ensure_topics(topics.values())
                admin.keep_forever(topics.values())
                producer = ConfluentProducer(servers)
                try:
                    stream_to_kafka(
                        producer,
                        truth.watch(stream),
                        topics,
                        trial=profile.name,
                        simulation=identity,
                        rate=chosen.rate,
                        progress=progress,
                    )
                finally:
                    producer.close()
            except RuntimeError as error:  # Kafka is out, or did not acknowledge
                sys.stderr.write(f"\n{error}\n")
                return 1
            summary["bootstrap_servers"] = servers
    summary |= {
        "messages": truth.total,
        "kinds": {kind: truth.of_kind(kind) for kind in ("ok", "late", "duplicate", "broken")},
        "kinds_by_table": truth.as_dict(),
        "seconds": round(time.monotonic() - started, 2),
    }
    sys.stdout.write(orjson.dumps(summary, option=orjson.OPT_INDENT_2).decode() + "\n")
    return 0


class _ProgressBar:
    """Shows progress on standard error: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("messages"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("messages", total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return lambda count: self._bar.update(self._task, completed=count)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


if __name__ == "__main__":
    sys.exit(main())
