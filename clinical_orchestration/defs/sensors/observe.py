"""What sensors look at: topics, tables, landing folders, Redis, and the results that monitoring left."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from clinical_orchestration.defs.common import asset_key
from clinical_orchestration.defs.results import RESULT, TRIAL
from clinical_orchestration.defs.sensors.decisions import (
    DomainRows,
    FeatureStoreState,
    Inflow,
    LandingFile,
    ModelState,
    OnlineRow,
    PartitionLag,
)
from clinical_orchestration.tables import DOMAINS, FEATURES, MODEL_PERFORMANCE, bronze, silver

if TYPE_CHECKING:
    from clinical_orchestration.ingestion.sources import Kafka
    from clinical_orchestration.stores.objects import Objects
    from clinical_orchestration.stores.online import OnlineStore
    from clinical_orchestration.stores.tables import TableStore
    from clinical_orchestration.trials import TrialProfile

QUALITY_REPORT = "quality/report"
CLINICAL_DATA_QUALITY = "quality/clinical_data"
PERFORMANCE = "monitoring/performance"
DATA_DRIFT = "monitoring/data_drift"
CONCEPT_DRIFT = "monitoring/concept_drift"
SUFFIXES = (".xpt", ".csv", ".parquet")
FOLDER_MARKERS = ("_SUCCESS", ".done")
FILE_MARKER = ".done"
SAMPLE = 2000
"""Patients whose online rows are read in one evaluation; of more patients, other ones each time."""


def topic_lags(tables: TableStore, kafka: Kafka, topics: Mapping[str, str]) -> dict[str, PartitionLag] | None:
    """Return what bronze lacks of each partition, by ``topic/partition``; None where there is no broker.

    Args:
        tables: the lakehouse, for the ingested offsets.
        kafka: the broker.
        topics: topic by bronze domain.

    Raises:
        clinical_orchestration.stores.kafka.KafkaUnavailableError: it does not answer.
    """
    from clinical_orchestration.ingestion.kafka import monitor_topics

    if not kafka.available():
        return None
    reader = kafka.reader()
    try:
        report = monitor_topics(tables, reader, topics, sample=0)
    finally:
        reader.close()
    return {
        f"{state.topic}/{number}": PartitionLag(partition.end - partition.lag, partition.end)
        for state in report.topics.values()
        for number, partition in state.partitions.items()
    }


def inflow(
    instance: dg.DagsterInstance, tables: TableStore, kafka: Kafka, topics: Mapping[str, str], trial: str
) -> Inflow:
    """Return what has arrived and how good the trial's data were last."""
    domains = {}
    for domain in DOMAINS:
        version = tables.version(bronze(domain))
        if version is None:
            continue
        refined = tables.transaction_version(silver(domain), bronze(domain))
        domains[domain] = DomainRows(tables.row_count(bronze(domain)), refined is None or refined < version)
    return Inflow(
        topic_lags(tables, kafka, topics),
        domains,
        {topic: domain for domain, topic in topics.items()},
        quality(instance, trial),
    )


def newest_results(
    instance: dg.DagsterInstance, key: str, *, limit: int = 100
) -> dict[str, tuple[int, float, dict[str, Any]]]:
    """Return the newest result of an asset by trial: event id, time (seconds since the epoch), result."""
    found: dict[str, tuple[int, float, dict[str, Any]]] = {}
    for record in instance.fetch_materializations(asset_key(key), limit=limit).records:
        materialization = record.asset_materialization
        if materialization is None:
            continue
        trial, result = materialization.metadata.get(TRIAL), materialization.metadata.get(RESULT)
        if trial is None or result is None or not isinstance(result.value, dict):
            continue
        found.setdefault(str(trial.value), (record.storage_id, record.timestamp, dict(result.value)))
    return found


def quality(instance: dg.DagsterInstance, trial: str) -> float | None:
    """Return the lowest score of the trial's newest quality result, of whichever step; None before the first."""
    results = [
        found
        for key in (QUALITY_REPORT, CLINICAL_DATA_QUALITY)
        if (found := newest_results(instance, key).get(trial)) is not None
    ]
    if not results:
        return None
    _, _, result = max(results, key=lambda found: found[1])
    if isinstance(result.get("lowest"), int | float):
        return float(result["lowest"])
    scores = [float(score) for score in (result.get("scores") or {}).values() if score is not None]
    return min(scores, default=None)


def local_landing(root: Path, trials: Sequence[str]) -> tuple[list[LandingFile], dict[str, str]]:
    """Return the data files of the trials' folders below `root`, and the folders that exist, by trial."""
    files: list[LandingFile] = []
    folders: dict[str, str] = {}
    for trial in trials:
        folder = root / trial
        if not folder.is_dir():
            continue
        folders[trial] = str(folder.resolve())
        names = {path.name for path in folder.iterdir()}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in SUFFIXES:
                continue
            with suppress(OSError):  # gone between the listing and the look
                status = path.stat()
                if path.is_file() and status.st_size:
                    identity = f"{status.st_size}:{status.st_mtime_ns}"
                    files.append(LandingFile(trial, path.name, identity, _declared(path.name, names)))
    return files, folders


def remote_landing(objects: Objects, trials: Sequence[str]) -> tuple[list[LandingFile], dict[str, str]]:
    """Return the data files below ``landing/<trial>/`` of the bucket, and the prefixes that hold any, by trial.

    An object appears whole or not at all, but a folder of objects does not.
    """
    files: list[LandingFile] = []
    folders: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    for stored in objects.list("landing/"):
        _, trial, name = (*stored.key.split("/", 2), "", "")[:3]
        if trial in trials and name and "/" not in name:
            modified = stored.modified.isoformat() if stored.modified else ""
            found.setdefault(trial, {})[name] = f"{stored.size}:{modified}"
    for trial, names in found.items():
        folders[trial] = objects.uri(f"landing/{trial}/")
        for name, identity in names.items():
            if name.lower().endswith(SUFFIXES) and not identity.startswith("0:"):
                files.append(LandingFile(trial, name, identity, _declared(name, names)))
    return files, folders


def _declared(name: str, names: Mapping[str, str] | set[str]) -> bool:
    return any(marker in names for marker in FOLDER_MARKERS) or f"{name}{FILE_MARKER}" in names


class _Cache:
    """Keeps the newest answer of each question for as long as the table's version stays."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str, str], tuple[int, dict[str, datetime]]] = {}
        self._lock = threading.Lock()

    def newest(
        self, tables: TableStore, table: str, trial: str, column: str, read: Callable[[], dict[str, datetime]]
    ) -> dict[str, datetime]:
        version = tables.version(table)
        if version is None:
            return {}
        key = (tables.uri(table), trial, column)
        with self._lock:
            kept = self._answers.get(key)
        if kept is not None and kept[0] == version:
            return kept[1]
        answer = read()
        with self._lock:
            self._answers[key] = (version, answer)
        return answer


_CACHE = _Cache()


def newest_by_patient(tables: TableStore, table: str, column: str, trial: str) -> dict[str, datetime]:
    """Return the newest time of `column` by patient; read again only when the table has changed."""

    def read() -> dict[str, datetime]:
        import pyarrow as pa

        rows = tables.read(table, columns=["patient_id", column], filters=[("trial", "=", trial)])
        grouped: pa.Table = rows.group_by("patient_id").aggregate([(column, "max")])
        return {
            row["patient_id"]: row[f"{column}_max"].astimezone(UTC)
            for row in grouped.to_pylist()
            if row[f"{column}_max"] is not None
        }

    return _CACHE.newest(tables, table, trial, column, read)


def feature_store_states(
    tables: TableStore, online: OnlineStore, profiles: Sequence[TrialProfile], now: datetime
) -> Iterator[FeatureStoreState]:
    """Yield the state of each trial that has features offline.

    Raises:
        clinical_orchestration.stores.online.OnlineStoreError: Redis does not answer.
    """
    from clinical_orchestration.features.definitions import feature_set_id
    from clinical_orchestration.stores.feature_store import FeatureState
    from clinical_orchestration.trials.clock import trial_now

    for profile in profiles:
        offline = newest_by_patient(tables, FEATURES, "feature_time", profile.name)
        if not offline:
            continue
        records = newest_by_patient(tables, silver("patient_vitals"), "event_time", profile.name)
        versions = {domain: tables.version(silver(domain)) for domain in DOMAINS}
        recorded = FeatureState(profile, tables).recorded() or {}
        moved = any(version is not None and recorded.get(domain) != version for domain, version in versions.items())
        patients = _sample({*offline, *records}, now)
        yield FeatureStoreState(
            trial=profile.name,
            offline=offline,
            newest_record=records,
            silver_moved=moved,
            online={
                patient: OnlineRow(row.feature_time, row.feature_set, row.features)
                for patient, row in online.summaries(patients).items()
                if row.trial == profile.name
            },
            asked=frozenset(patients),
            now=trial_now(profile, max(records.values(), default=None), now),
            max_age=profile.online.max_age,
            feature_set=feature_set_id(profile),
        )


def _sample(patients: set[str], now: datetime) -> list[str]:
    """Return all patients, or of many those whose turn it is: everybody has a turn within the hour of the day."""
    if len(patients) <= SAMPLE:
        return sorted(patients)
    parts = -(-len(patients) // SAMPLE)
    turn = int(now.timestamp() // 60) % parts
    return sorted(
        patient
        for patient in patients
        if int.from_bytes(hashlib.blake2b(patient.encode(), digest_size=4).digest()) % parts == turn
    )


def model_states(
    instance: dg.DagsterInstance, tables: TableStore, profiles: Sequence[TrialProfile]
) -> list[ModelState]:
    """Return what monitoring last found out about each trial that it has looked at."""
    results = {key: newest_results(instance, key) for key in (PERFORMANCE, DATA_DRIFT, CONCEPT_DRIFT)}
    states = []
    for profile in profiles:
        mine = {key: found[profile.name] for key, found in results.items() if profile.name in found}
        if not mine:
            continue
        states.append(
            ModelState(
                trial=profile.name,
                performance=mine[PERFORMANCE][2] if PERFORMANCE in mine else None,
                data_drift=mine[DATA_DRIFT][2] if DATA_DRIFT in mine else None,
                concept_drift=mine[CONCEPT_DRIFT][2] if CONCEPT_DRIFT in mine else None,
                events={key: found[0] for key, found in mine.items()},
                auroc_by_window=auroc_by_window(tables, profile.name),
                min_auroc=profile.promotion.min_auroc,
            )
        )
    return states


def auroc_by_window(tables: TableStore, trial: str) -> list[float]:
    """Return the AUROC of consecutive windows as the newest monitoring run computed them, oldest first."""
    if not tables.exists(MODEL_PERFORMANCE):
        return []
    rows = tables.read(
        MODEL_PERFORMANCE,
        columns=["run_id", "computed_at", "window_end", "auroc"],
        filters=[("trial", "=", trial), ("span", "=", "window"), ("attribute", "=", "all")],
    ).to_pylist()
    if not rows:
        return []
    newest = max(rows, key=lambda row: row["computed_at"])["run_id"]
    mine = sorted((row for row in rows if row["run_id"] == newest), key=lambda row: row["window_end"])
    return [float(row["auroc"]) for row in mine if row["auroc"] is not None]
