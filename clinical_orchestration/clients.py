"""The platform from a notebook or a script: clinical data, features, models.

::

    eval "$(./pipeline-manager.sh --env)"     # or: from a shell that has these variables

    from clinical_orchestration.clients import ClinicalData, FeatureStore, Models

    data = ClinicalData()
    data.patients()
    data.vitals("01-701-1015", since="2014-01-01")
    FeatureStore().as_of(entities)
    Models().predict("01-701-1015")

Each is configured from the environment (see :class:`clinical_orchestration.settings.ClientSettings`) and reads what the
pipelines wrote: nothing here computes features or trains. Frames are polars; ``as_pandas=True`` gives pandas where a
method has it. All times are UTC; a time given without a zone is taken as UTC.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload
from urllib.parse import urlsplit

from clinical_orchestration.settings import ClientSettings, Variables
from clinical_orchestration.tables import (
    COHORT_ATTRITION,
    COHORT_DEFINITIONS,
    COHORT_MEMBERS,
    DOMAINS,
    DUPLICATES,
    FEATURES,
    PREDICTION_OUTCOMES,
    PREDICTIONS,
    QUARANTINE,
    TRAINING_SET,
    bronze,
    silver,
)
from clinical_orchestration.trials import TrialProfile, configured_trial

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

    from clinical_orchestration.cohorts.cohort import Cohort
    from clinical_orchestration.cohorts.criteria import CohortDefinition
    from clinical_orchestration.ingestion.kafka_tools import ValidationReport
    from clinical_orchestration.modeling.promotion import Decision
    from clinical_orchestration.modeling.results import Evaluation
    from clinical_orchestration.stores.cohorts import CohortReport
    from clinical_orchestration.stores.online import OnlineFeatures, OnlineStore
    from clinical_orchestration.stores.registry import LoadedModel, ModelRegistry, ModelVersionInfo
    from clinical_orchestration.stores.serving import ServingClient
    from clinical_orchestration.stores.tables import TableStore

Moment = datetime | date | str
"""A time: aware or naive (UTC) datetime, a date (its start), or ISO 8601 text."""

SHORT_NAMES = {"vitals": "patient_vitals", "labs": "lab_results", "events": "adverse_events", "patients": "subjects"}
"""What people call the silver tables."""

_REACHABLE_SECONDS = 3.0


class ClientError(RuntimeError):
    """What was asked for cannot be had; the message says why and what to do, and holds no secret."""


class _Client:
    """A trial of a deployment; raises :class:`ClientError` where there is no such trial."""

    def __init__(self, trial: str | None, settings: ClientSettings | None) -> None:
        self._settings = settings or ClientSettings()
        self.profile = _profile(trial or self._settings.trial)
        """The trial's profile."""

    @property
    def trial(self) -> str:
        """The trial's name."""
        return self.profile.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}(trial={self.trial!r})"


class _TablesClient(_Client):
    def __init__(
        self, trial: str | None = None, *, settings: ClientSettings | None = None, tables: TableStore | None = None
    ) -> None:
        super().__init__(trial, settings)
        self._tables = tables

    @property
    def tables(self) -> TableStore:
        """The Delta tables of the deployment, for what no method here does.

        Raises:
            ClientError: the S3 service does not answer.
        """
        if self._tables is None:
            from clinical_orchestration.stores.tables import DeltaTableStore

            store = DeltaTableStore.from_settings(self._settings)
            if store.root.startswith("s3://"):
                # delta-rs would try for minutes to reach what is not there
                _require_answer(self._settings.s3_endpoint, "the S3 service", 9000, "AWS_ENDPOINT_URL", level=0)
            self._tables = store
        return self._tables

    def _read(
        self,
        name: str,
        trial: str | None,
        columns: Sequence[str] | None = None,
        filters: Sequence[tuple[str, str, Any]] = (),
        version: int | None = None,
    ) -> pl.DataFrame:
        import polars as pl

        wanted = [*([("trial", "=", trial)] if trial else []), *filters]
        with _friendly(f"the table {name} cannot be read"):
            try:
                rows = self.tables.read(name, columns=columns, filters=wanted or None, version=version)
            except KeyError:
                raise ClientError(f"there is no table {name} yet; run the pipeline that writes it") from None
        return pl.DataFrame(pl.from_arrow(rows))


class ClinicalData(_TablesClient):
    """A trial's records: vital signs, laboratory results, medications, adverse events, subjects; cohorts and quality.

    Args:
        trial: name of the trial profile; default: the deployment's (``CLINICAL_TRIAL``).
        settings: where the systems answer; default: from the environment.
        tables: the tables; default: those of the deployment.
    """

    @overload
    def table(
        self,
        name: str,
        *,
        trial: str | None = ...,
        columns: Sequence[str] | None = ...,
        version: int | None = ...,
        as_pandas: Literal[False] = ...,
    ) -> pl.DataFrame: ...

    @overload
    def table(
        self,
        name: str,
        *,
        trial: str | None = ...,
        columns: Sequence[str] | None = ...,
        version: int | None = ...,
        as_pandas: Literal[True],
    ) -> pd.DataFrame: ...

    def table(
        self,
        name: str,
        *,
        trial: str | None = None,
        columns: Sequence[str] | None = None,
        version: int | None = None,
        as_pandas: bool = False,
    ) -> pl.DataFrame | pd.DataFrame:
        """Return the rows of a table that belong to a trial.

        Args:
            name: ``silver/lab_results``, ``gold/predictions`` ...; a bare name such as ``vitals`` or ``lab_results``
                is the silver table.
            trial: default: this client's; ``"*"`` for all trials.
            columns: only these.
            version: as of this Delta version; default: the newest.
            as_pandas: a pandas frame instead of a polars one.

        Returns:
            One row a record, columns as in :mod:`clinical_orchestration.tables`, in no particular order.

        Raises:
            ClientError: there is no such table, column or version.
        """
        path = _table_name(name)
        wanted = trial or self.trial
        frame = self._read(path, None if wanted == "*" else wanted, columns, version=version)
        return frame.to_pandas() if as_pandas else frame

    def catalog(self) -> pl.DataFrame:
        """Return one row a known table: ``table``, ``rows`` (all trials), ``version`` (null: absent), ``uri``."""
        import polars as pl

        known = [
            *(bronze(domain) for domain in DOMAINS), *(silver(domain) for domain in DOMAINS), QUARANTINE, DUPLICATES,
            FEATURES, TRAINING_SET, PREDICTIONS, PREDICTION_OUTCOMES, COHORT_MEMBERS, COHORT_ATTRITION,
            COHORT_DEFINITIONS,
        ]  # fmt: skip
        with _friendly("the tables cannot be listed"):
            rows = [
                (name, self.tables.row_count(name), self.tables.version(name), self.tables.uri(name)) for name in known
            ]
        schema = {"table": pl.String, "rows": pl.Int64, "version": pl.Int64, "uri": pl.String}
        return pl.DataFrame(rows, schema, orient="row")

    def patients(self) -> pl.DataFrame:
        """Return the newest row of each subject, sorted by ``patient_id`` (columns of ``subjects``)."""
        rows = self._read(silver("subjects"), self.trial).sort("patient_id", "received_at", "source_position")
        return rows.unique("patient_id", keep="last", maintain_order=True)

    def vitals(
        self,
        patient: str | Iterable[str] | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        tests: Iterable[str] | None = None,
    ) -> pl.DataFrame:
        """Return vital signs, one measurement a row, sorted by patient and time.

        Args:
            patient: one id, several, or all.
            since, until: only measurements with ``since <= event_time <= until``.
            tests: only these test codes (``SYSBP``, ``TEMP`` ...).
        """
        return self._records("patient_vitals", patient, since, until, tests)

    def labs(
        self,
        patient: str | Iterable[str] | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        tests: Iterable[str] | None = None,
    ) -> pl.DataFrame:
        """Return laboratory results, one a row; arguments as :meth:`vitals`."""
        return self._records("lab_results", patient, since, until, tests)

    def medications(
        self, patient: str | Iterable[str] | None = None, since: Moment | None = None, until: Moment | None = None
    ) -> pl.DataFrame:
        """Return medications, study treatment included (``study_drug``); arguments as :meth:`vitals`."""
        return self._records("medications", patient, since, until)

    def adverse_events(
        self, patient: str | Iterable[str] | None = None, since: Moment | None = None, until: Moment | None = None
    ) -> pl.DataFrame:
        """Return adverse events by their onset; arguments as :meth:`vitals`."""
        return self._records("adverse_events", patient, since, until)

    def quality(self, now: Moment | None = None) -> pl.DataFrame:
        """Check the trial's silver tables as the pipeline does.

        Args:
            now: the time that no record may be later than; default: now.

        Returns:
            One row a table: ``table``, ``rows``, ``score`` (0 to 1), ``acceptance_rate`` (share of received records
            that are in silver or duplicates of such), ``passed``, ``broken`` (names of the rules that fail).
        """
        import polars as pl

        from clinical_orchestration.quality.rules import check_table

        subjects = self._read(silver("subjects"), self.trial)
        rejected = self._read(QUARANTINE, self.trial, ["table", "source_position"])
        found = []
        for domain in DOMAINS:
            rows = subjects if domain == "subjects" else self._read(silver(domain), self.trial)
            accepted = rows["source_position"].n_unique() if rows.height else 0
            received = accepted + rejected.filter(pl.col("table") == domain).height
            rate = accepted / received if received else 1.0
            checked = check_table(
                domain, rows, now=_moment(now) or datetime.now(UTC), subjects=subjects, acceptance_rate=rate
            )
            failures = [failure.name for failure in checked.failures]
            found.append((domain, rows.height, checked.score, rate, not failures, failures))
        schema: dict[str, Any] = {
            "table": pl.String, "rows": pl.Int64, "score": pl.Float64, "acceptance_rate": pl.Float64,
            "passed": pl.Boolean, "broken": pl.List(pl.String),
        }  # fmt: skip
        return pl.DataFrame(found, schema, orient="row")

    def rejected(self) -> pl.DataFrame:
        """Return why records were rejected: ``table``, ``rule``, ``records``, most frequent first."""
        import polars as pl

        rows = self._read(QUARANTINE, self.trial, ["table", "reasons"]).explode("reasons")
        rule = pl.col("reasons").str.split(":").list.first().alias("rule")
        counted = rows.drop_nulls("reasons").select("table", rule).group_by("table", "rule").len("records")
        return counted.with_columns(pl.col("records").cast(pl.Int64)).sort("records", "table", descending=[True, False])

    def validate(self, messages: Iterable[bytes | str | Mapping[str, object]] | Path, domain: str) -> ValidationReport:
        """Check messages, or those of a file, against the contract of a domain; nothing is stored.

        Raises:
            ClientError: there is no such domain or file.
        """
        from clinical_orchestration.ingestion.kafka_tools import domain_of, validate_file, validate_messages

        try:
            name = domain_of(SHORT_NAMES.get(domain, domain))
            return validate_file(messages, name) if isinstance(messages, Path) else validate_messages(name, messages)
        except (LookupError, OSError) as error:
            raise ClientError(str(error)) from None

    def match(self, criteria: str | Path | Mapping[str, Any] | CohortDefinition) -> Cohort:
        """Return who meets criteria and why, and store nothing.

        Args:
            criteria: name of shipped ones, a YAML file, a mapping, or a definition.

        Raises:
            ClientError: the criteria cannot be read.
        """
        from clinical_orchestration.stores.cohorts import match_trial

        definition = _definition(criteria)
        with _friendly("the records cannot be matched"):
            return match_trial(self.tables, definition, self.trial)

    def build_cohort(self, criteria: str | Path | Mapping[str, Any] | CohortDefinition) -> CohortReport:
        """Build a cohort and store it over its build before; return the counts.

        Raises:
            ClientError: the criteria cannot be read, or are meant for another trial.
        """
        from clinical_orchestration.stores.cohorts import build_cohort

        definition = _definition(criteria)
        with _friendly("the cohort cannot be built"):
            try:
                report, _ = build_cohort(self.tables, definition, self.trial)
            except ValueError as error:
                raise ClientError(str(error)) from None
        return report

    def cohorts(self) -> pl.DataFrame:
        """Return one row a stored cohort: name, hash, definition (JSON), screened, members, when built."""
        from clinical_orchestration.stores.cohorts import list_cohorts

        with _friendly("the cohorts cannot be listed"):
            return list_cohorts(self.tables, self.trial)

    def cohort(self, name: str, *, members_only: bool = True) -> pl.DataFrame:
        """Return the patients of a stored cohort, with index time and the reason for each criterion.

        Args:
            name: the cohort.
            members_only: False: everybody who was screened, with ``member`` and ``removed_by``.

        Raises:
            ClientError: it was never built, or its last build was interrupted.
        """
        import polars as pl

        _, rows = self.stored_cohort(name)
        return rows.filter(pl.col("member")) if members_only else rows

    def stored_cohort(self, name: str) -> tuple[CohortReport, pl.DataFrame]:
        """Return the newest build of a cohort: its report, and one row a screened patient.

        Raises:
            ClientError: it was never built, or its last build was interrupted.
        """
        from clinical_orchestration.stores.cohorts import CohortIncompleteError, CohortNotFoundError, read_cohort

        with _friendly("the cohort cannot be read"):
            try:
                return read_cohort(self.tables, name, self.trial)
            except (CohortNotFoundError, CohortIncompleteError) as error:
                raise ClientError(str(error)) from None

    def attrition(self, name: str) -> pl.DataFrame:
        """Return the flow of a stored cohort, one row a step: entered, removed, removed_unknown, remaining.

        Raises:
            ClientError: it was never built, or its last build was interrupted.
        """
        from dataclasses import asdict

        import polars as pl

        report, _ = self.stored_cohort(name)
        return pl.DataFrame([asdict(step) for step in report.attrition])

    def _records(
        self,
        domain: str,
        patient: str | Iterable[str] | None,
        since: Moment | None,
        until: Moment | None,
        tests: Iterable[str] | None = None,
    ) -> pl.DataFrame:
        filters: list[tuple[str, str, Any]] = []
        if patient is not None:
            filters.append(("patient_id", "in", [patient] if isinstance(patient, str) else list(patient)))
        if tests is not None:
            filters.append(
                ("test_code", "in", [tests.upper()] if isinstance(tests, str) else [t.upper() for t in tests])
            )
        if (first := _moment(since)) is not None:
            filters.append(("event_time", ">=", first))
        if (last := _moment(until)) is not None:
            filters.append(("event_time", "<=", last))
        return self._read(silver(domain), self.trial, filters=filters).sort(
            "patient_id", "event_time", "source_position"
        )


class FeatureStore(_TablesClient):
    """A trial's features: offline by time (Delta), online by patient (Redis).

    Args:
        trial: name of the trial profile; default: the deployment's (``CLINICAL_TRIAL``).
        settings: where the systems answer; default: from the environment.
        tables: the tables; default: those of the deployment.
        store: the online store; default: the deployment's Redis.
    """

    def __init__(
        self,
        trial: str | None = None,
        *,
        settings: ClientSettings | None = None,
        tables: TableStore | None = None,
        store: OnlineStore | None = None,
    ) -> None:
        super().__init__(trial, settings=settings, tables=tables)
        self._store = store

    @property
    def names(self) -> tuple[str, ...]:
        """The features, in the documented order."""
        from clinical_orchestration.features.definitions import feature_names

        return feature_names(self.profile)

    @property
    def online_store(self) -> OnlineStore:
        """The online store, for what no method here does."""
        if self._store is None:
            from clinical_orchestration.stores.online import RedisOnlineStore

            self._store = RedisOnlineStore(
                self._settings.redis_url.get_secret_value(),
                Variables().feature_store_redis_prefix,
                retries=0,  # somebody waits for the answer
            )
        return self._store

    def online(self, patient: str) -> OnlineFeatures:
        """Return a patient's newest features: ``.features`` (value by name), ``.feature_time``, ``.age()``.

        Raises:
            ClientError: the patient has none (never loaded, or expired), or Redis does not answer.
        """
        with _friendly("the online features cannot be read"):
            found = self.online_store.get(patient)
        if found is None:
            raise ClientError(
                "there are no online features of this patient: never loaded, or not refreshed within 72 hours; "
                "run clinical_data_pipeline"
            )
        return found

    def online_many(self, patients: Iterable[str] | None = None) -> pl.DataFrame:
        """Return online features, one row a patient that has some: key columns, ``loaded_at``, then the features.

        Args:
            patients: default: everybody with offline features.
        """
        import polars as pl

        wanted = list(patients) if patients is not None else self._keys()["patient_id"].unique().sort().to_list()
        with _friendly("the online features cannot be read"):
            found = self.online_store.get_many(wanted)
        rows = [
            {
                "patient_id": row.patient_id,
                "feature_time": row.feature_time,
                "loaded_at": row.loaded_at,
                **row.select(self.names),
            }
            for row in (found[patient] for patient in wanted if patient in found)
        ]
        times = {name: pl.Datetime("us", "UTC") for name in ("feature_time", "loaded_at")}
        return pl.DataFrame(rows, {"patient_id": pl.String, **times, **dict.fromkeys(self.names, pl.Float64)})

    def offline(
        self, day: date | str | tuple[date | str, date | str] | None = None, *, features: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """Return offline features, sorted by patient and time.

        Args:
            day: one UTC day, (first, last) day, or None for all.
            features: only these.

        Returns:
            ``trial``, ``patient_id``, ``feature_time``, ``feature_date``, then the features as nullable doubles.

        Raises:
            ClientError: there is no such feature, or the table cannot be read.
        """
        from clinical_orchestration.stores.feature_store import read_features
        from clinical_orchestration.tables import FEATURE_KEY_COLUMNS

        chosen = self._features(features)
        with _friendly("the offline features cannot be read"):
            rows = read_features(self.tables, self.profile, dates=_days(day))
        return rows.select(*FEATURE_KEY_COLUMNS, *chosen)

    def days(self) -> pl.DataFrame:
        """Return the days that have offline features: ``feature_date``, ``rows``, ``patients``."""
        import polars as pl

        counted = self._keys().group_by("feature_date").agg(rows=pl.len(), patients=pl.col("patient_id").n_unique())
        return counted.with_columns(pl.col("rows", "patients").cast(pl.Int64)).sort("feature_date")

    def as_of(
        self,
        entities: pl.DataFrame | pd.DataFrame,
        *,
        time_column: str = "time",
        features: Sequence[str] | None = None,
        max_age: timedelta | None = None,
    ) -> pl.DataFrame:
        """Return the features that were valid at given times: a point-in-time join.

        Args:
            entities: ``patient_id`` and a UTC time in `time_column`, and any other columns (polars or pandas).
            time_column: the column with the times.
            features: only these.
            max_age: older features count as missing.

        Returns:
            The entity rows in their order, with ``feature_time`` and the features of the newest row with
            ``feature_time <= time``; nulls where there is none.

        Raises:
            ClientError: a column is missing or is no UTC time.
        """
        import polars as pl

        from clinical_orchestration.features.as_of import join_as_of

        chosen = self._features(features)
        frame = entities if isinstance(entities, pl.DataFrame) else pl.from_pandas(entities)
        try:
            return join_as_of(
                frame, self.offline(features=chosen), features=chosen, time_column=time_column, max_age=max_age
            )
        except ValueError as error:
            raise ClientError(str(error)) from None

    def training_set(self, version: int | None = None) -> pl.DataFrame:
        """Return labelled rows as a model was trained on them.

        Args:
            version: Delta version, as logged with the model (``ModelVersionInfo.training_set_version``); default: the
                newest.

        Returns:
            Key columns, features and the label, one row a subject and feature time.

        Raises:
            ClientError: there is none yet, or no such version.
        """
        return self._read(TRAINING_SET, self.trial, version=version)

    def compare(self, day: date | str | None = None) -> pl.DataFrame:
        """Compare the online features with the newest offline row of each patient.

        Args:
            day: only patients whose newest offline row is of this UTC day; default: everybody.

        Returns:
            One row a patient: ``patient_id``, ``status`` (``equal``; ``missing``: nothing online; ``newer`` or
            ``older``: the online row is of another time; ``differing``: of the same time with other values),
            ``offline_time``, ``online_time``, ``differing_features``.
        """
        import polars as pl

        rows = self.offline().unique("patient_id", keep="last", maintain_order=True)
        if (days := _days(day)) is not None:
            rows = rows.filter(pl.col("feature_date").is_in(days))
        with _friendly("the online features cannot be read"):
            found = self.online_store.get_many(rows["patient_id"].to_list())
        compared: list[tuple[Any, ...]] = []
        for row in rows.iter_rows(named=True):
            stored = found.get(row["patient_id"])
            if stored is None:
                compared.append((row["patient_id"], "missing", row["feature_time"], None, None))
                continue
            differing = sum(stored.features.get(name) != row[name] for name in self.names)
            if stored.feature_time != row["feature_time"]:
                status = "newer" if stored.feature_time > row["feature_time"] else "older"
            else:
                status = "differing" if differing else "equal"
            compared.append((row["patient_id"], status, row["feature_time"], stored.feature_time, differing))
        moment = pl.Datetime("us", "UTC")
        schema: dict[str, Any] = {
            "patient_id": pl.String, "status": pl.String, "offline_time": moment, "online_time": moment,
            "differing_features": pl.Int64,
        }  # fmt: skip
        return pl.DataFrame(compared, schema, orient="row")

    def _keys(self) -> pl.DataFrame:
        from clinical_orchestration.tables import FEATURE_KEY_COLUMNS

        return self._read(FEATURES, self.trial, list(FEATURE_KEY_COLUMNS))

    def _features(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        if wanted is None:
            return self.names
        import difflib

        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.names, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ClientError(f"{self.trial} has no feature {unknown[0]!r}{hint}")
        return tuple(wanted)


class Models(_Client):
    """A trial's models in MLflow, and the model server.

    Args:
        trial: name of the trial profile; default: the deployment's (``CLINICAL_TRIAL``).
        settings: where the systems answer; default: from the environment.
        registry: MLflow; default: the deployment's.
        serving: the model server; default: the deployment's.
    """

    def __init__(
        self,
        trial: str | None = None,
        *,
        settings: ClientSettings | None = None,
        registry: ModelRegistry | None = None,
        serving: ServingClient | None = None,
    ) -> None:
        super().__init__(trial, settings)
        self._registry = registry
        self._serving = serving

    @property
    def name(self) -> str:
        """The registered model of the trial."""
        return self.profile.model_name

    @property
    def registry(self) -> ModelRegistry:
        """MLflow as the platform uses it, for what no method here does."""
        if self._registry is None:
            from clinical_orchestration.stores.registry import ModelRegistry as Registry

            self._registry = Registry(self._settings.mlflow_tracking_uri)
        return self._registry

    @property
    def serving(self) -> ServingClient:
        """The model server's client."""
        if self._serving is None:
            from clinical_orchestration.stores.serving import ServingClient as Client

            self._serving = Client(self._settings.serving_url)
        return self._serving

    def champion(self) -> ModelVersionInfo | None:
        """Return the version that serves; None while no version has passed the promotion rule.

        Raises:
            ClientError: MLflow does not answer.
        """
        with _friendly("the champion cannot be read"):
            return self.registry.champion(self.name)

    def versions(self) -> pl.DataFrame:
        """Return one row a version, newest first: aliases, candidate, run, training set version, when made."""
        import polars as pl

        with _friendly("the versions cannot be read"):
            found = self.registry.versions(self.name)
        schema: dict[str, Any] = {
            "version": pl.String, "aliases": pl.List(pl.String), "candidate": pl.String, "run_id": pl.String,
            "training_set_version": pl.Int64, "promoted": pl.Boolean, "created_at": pl.Datetime("us", "UTC"),
        }  # fmt: skip
        rows = [
            (i.version, list(i.aliases), i.candidate, i.run_id, i.training_set_version, i.promoted, i.created_at)
            for i in found
        ]
        return pl.DataFrame(rows, schema, orient="row")

    def evaluation(self, version: str | None = None) -> Evaluation:
        """Return the stored evaluation of a version (default: the champion).

        Raises:
            ClientError: there is no such version, or no champion.
        """
        with _friendly("the evaluation cannot be read"):
            return self.registry.evaluation_of(self._version(version))

    def load(self, version: str | None = None) -> LoadedModel:
        """Return a version (default: the champion) in memory: ``.probabilities(frame)`` of the features' columns.

        Raises:
            ClientError: there is no such version, or no champion.
        """
        with _friendly("the model cannot be loaded"):
            found = self._version(version)
            return self.registry.load_model(found.name, found.version)

    def predict(self, patient: str) -> dict[str, Any]:
        """Ask the model server for a patient's risk, from the online features.

        Returns:
            The server's answer: ``probability``, ``risk_band``, ``model_version``, ``feature_time``, ``stale`` ...

        Raises:
            ClientError: the server does not answer, or says why it cannot.
        """
        with _friendly("the model server gives no prediction"):
            return self.serving.predict(patient)

    def create_experiment(self, name: str) -> str:
        """Return the id of an MLflow experiment; it is created, or restored if deleted, where needed."""
        with _friendly("the experiment cannot be made"):
            return self.registry.ensure_experiment(name)

    def log_run(
        self,
        experiment: str,
        *,
        name: str | None = None,
        params: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, bytes] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Log one finished run of an experiment and return its id.

        Args:
            experiment: its name; made where needed.
            name: of the run.
            params, metrics, tags: as MLflow shows them; never a row or an identifier of a subject.
            files: path -> content.
        """
        with _friendly("the run cannot be logged"):
            return self.registry.log_run(
                self.registry.ensure_experiment(experiment),
                name=name,
                params=params,
                metrics=metrics,
                files=files,
                tags={"trial": self.trial, **(tags or {})},
            )

    def register(self, run_id: str) -> ModelVersionInfo:
        """Make the model of a training run a version of the trial's model, or return the version that it is already.

        Raises:
            ClientError: there is no such run, or it has no model or no evaluation.
        """
        import json

        from clinical_orchestration.modeling.results import Evaluation as Stored
        from clinical_orchestration.stores.registry import EVALUATION_FILE

        with _friendly("the model cannot be registered"):
            evaluation = Stored.from_dict(json.loads(self.registry.read_file(run_id, EVALUATION_FILE)))
            return self.registry.register(self.name, run_id, evaluation)

    def promote(self, version: str) -> Decision:
        """Make a version the champion if the trial's promotion rule allows it; return the decision and its reasons.

        Raises:
            ClientError: there is no such version, or it has no evaluation.
        """
        from clinical_orchestration.modeling.promotion import decide

        with _friendly("the version cannot be promoted"):
            candidate = self._version(version)
            champion = self.registry.champion(self.name)
            best = champion if champion is not None and champion.version != candidate.version else None
            decision = decide(
                self.registry.evaluation_of(candidate),
                None if best is None else self.registry.evaluation_of(best),
                self.profile.promotion,
            )
            self.registry.record_decision(self.name, candidate.version, decision)
            if decision.promote:
                self.registry.promote(self.name, candidate.version)
        return decision

    def _version(self, version: str | None) -> ModelVersionInfo:
        if version is None:
            champion = self.registry.champion(self.name)
            if champion is None:
                raise ClientError(f"{self.name} has no champion yet: no version has passed the promotion rule")
            return champion
        found = {item.version: item for item in self.registry.versions(self.name)}
        if str(version) not in found:
            known = ", ".join(found) or "none"
            raise ClientError(f"{self.name} has no version {version}; there are: {known}")
        return found[str(version)]


# --- helpers ---------------------------------------------------------------------------------------------------------


def _profile(trial: str) -> TrialProfile:
    try:
        return configured_trial(trial)
    except ValueError as error:
        raise ClientError(str(error)) from None


def _definition(criteria: str | Path | Mapping[str, Any] | CohortDefinition) -> CohortDefinition:
    from clinical_orchestration.cohorts.criteria import CohortDefinition as Definition
    from clinical_orchestration.cohorts.criteria import CriteriaError, load_definition

    if isinstance(criteria, Definition):
        return criteria
    try:
        return load_definition(criteria)
    except CriteriaError as error:
        raise ClientError(str(error)) from None


def _table_name(name: str) -> str:
    text = name.strip().strip("/")
    if "/" in text:
        return text
    domain = SHORT_NAMES.get(text, text)
    if domain not in DOMAINS:
        known = ", ".join((*SHORT_NAMES, *DOMAINS))
        raise ClientError(f"there is no table {name!r}; write layer/table, such as gold/predictions, or one of {known}")
    return silver(domain)


def _moment(value: Moment | None) -> datetime | None:
    """Return a time as UTC."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        except ValueError:
            raise ClientError(f"{value!r} is no ISO 8601 time, such as 2025-01-31 or 2025-01-31T08:00:00Z") from None
    if not isinstance(value, datetime):
        value = datetime.combine(value, time(), UTC)
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _days(day: date | str | tuple[date | str, date | str] | None) -> list[date] | None:
    if day is None:
        return None
    first, last = day if isinstance(day, tuple) else (day, day)
    begin, end = _moment(first), _moment(last)
    if begin is None or end is None or begin.date() > end.date():
        raise ClientError(f"{first} to {last} is no span of days")
    return [begin.date() + timedelta(days=number) for number in range((end.date() - begin.date()).days + 1)]


def _require_answer(address: str, what: str, port: int, variable: str, *, level: int) -> None:
    place = urlsplit(address)
    host = place.hostname or "127.0.0.1"
    number = place.port or (443 if place.scheme == "https" else 80 if place.scheme == "http" else port)
    try:
        socket.create_connection((host, number), timeout=_REACHABLE_SECONDS).close()
    except OSError as error:
        raise ClientError(
            f"{what} does not answer at {host}:{number} ({error}); start level {level} of the stack "
            f'(./pipeline-manager.sh --start), then eval "$(./pipeline-manager.sh --env)", or set {variable}'
        ) from None


@contextlib.contextmanager
def _friendly(what: str) -> Iterator[None]:
    """Turn what the systems raise into one error that says what to do."""
    from clinical_orchestration.stores.online import OnlineStoreError
    from clinical_orchestration.stores.registry import RegistryError
    from clinical_orchestration.stores.serving import ServingUnavailableError

    try:
        yield
    except ClientError:
        raise
    except (OnlineStoreError, RegistryError, ServingUnavailableError) as error:
        raise ClientError(f"{what}: {error}") from None  # these name the address and the cure, and no secret
    except Exception as error:
        if not type(error).__module__.startswith(("deltalake", "pyarrow", "_internal", "polars")) and not isinstance(
            error, OSError
        ):
            raise
        raise ClientError(f"{what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
