"""Experiments, model versions and the champion in MLflow. The only module that calls MLflow.

Calls name the tracking server explicitly and use no process-wide MLflow state, so that threads may use several
registries. Everything is logged in batches; artifacts go through the tracking server, so that a client needs its
address only. What is logged holds counts, metrics and feature names, never a row or an identifier of a subject.

Models are stored in the skops format: reading one executes no code. :meth:`ModelRegistry.load_model` accepts only the
types this platform trains, whatever list of trusted types a model brings along.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from clinical_orchestration.modeling.promotion import Decision
from clinical_orchestration.modeling.results import Evaluation

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

_T = TypeVar("_T")

EXPERIMENT = "clinical_adverse_events"
CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS_CHAMPION = "previous_champion"
MODEL_NAME_IN_RUN = "model"
EVALUATION_FILE = "evaluation.json"
DECISION_FILE = "decision.json"

TRIAL_TAG = "trial"
FINGERPRINT_TAG = "fingerprint"
FEATURE_SET_TAG = "feature_set"
TRAINING_SET_TAG = "training_set_version"
CANDIDATE_TAG = "candidate"
DECISION_TAG = "decision"
LOGGED_TAG = "training_logged"

# the story of a version
PROMOTION_TAG = "promotion"  # champion, challenger, refused, replaced, rolled back
STAGE_TAG = "stage"  # of the champion: as the deployment calls it; of those that were: archived
ARCHIVED = "archived"
PROMOTED_AT_TAG = "promoted_at"
REPLACED_TAG = "replaced_version"  # the champion before, to go back to
ROLLED_BACK_AT_TAG = "rolled_back_at"
ROLLBACK_REASON_TAG = "rollback_reason"
REASONS_TAG = "decision_reasons"
DECIDED_AT_TAG = "decided_at"
TRAINING_ROWS_TAG = "training_rows"

TRUSTED_TYPES = (
    "numpy.dtype",
    "sklearn.tree._tree.Tree",
    "sklearn.utils._bunch.Bunch",
    "xgboost.core.Booster",
    "xgboost.sklearn.XGBClassifier",
)
"""What a stored model may hold beyond what skops trusts by itself: the types of our own candidates."""

_MLFLOW_DEFAULTS = {
    # as MLflow sets them, a broken artifact store is an error only after four minutes; this way after 20 seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    # nothing leaves for MLflow's makers
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # logs of runs are read by people: no progress bars, no addresses printed to standard output
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of the MLflow library where the environment sets nothing; the library reads them from there only."""

_ANSWER_SECONDS = 5.0
_PING_EVERY_SECONDS = 1.0
_PARAMS_A_BATCH = 100
_METRICS_A_BATCH = 900
_DATASET_DIGEST_LENGTH = 36
_TAG_LENGTH = 4000


class RegistryError(RuntimeError):
    """MLflow refused a request; the message names what was asked, never a credential."""


class RegistryUnavailableError(RegistryError):
    """The MLflow server does not answer."""


class ModelNotFoundError(RegistryError):
    """There is no such registered model, version, run or artifact."""


class ModelFormatError(RegistryError):
    """The stored model cannot be used here; the message says why and what to do."""


@dataclass(frozen=True)
class TrainingRecord:
    """What is known about a training run, for people who ask later how a model came about.

    Attributes:
        trial: Name of the trial profile.
        fingerprint: :func:`clinical_orchestration.modeling.train.fingerprint` of the run.
        candidate: The chosen candidate.
        feature_names: In the order of the model's input.
        feature_set: Id of the feature set, as the online store writes it.
        training_set_uri, training_set_version, training_set_digest: Table, Delta version and content of the rows.
        table_versions: Delta version of every table that was read.
        row_counts: Rows by table or stage; ``training_rows`` are those of the training set.
        params: Hyper-parameters, seed, folds.
        profile: The trial's profile as JSON-ready values.
        code_version: Version of the package.
        tags: Anything else worth finding a run by, such as the orchestrator's run id.
    """

    trial: str
    fingerprint: str
    candidate: str
    feature_names: tuple[str, ...]
    feature_set: str
    training_set_uri: str
    training_set_version: int
    training_set_digest: str
    table_versions: Mapping[str, int]
    row_counts: Mapping[str, int]
    params: Mapping[str, str | int | float]
    profile: Mapping[str, Any]
    code_version: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingRun:
    """A logged training run."""

    run_id: str
    experiment_id: str
    trial: str
    fingerprint: str
    candidate: str
    finished: bool


@dataclass(frozen=True)
class ModelVersionInfo:
    """A registered model version."""

    name: str
    version: str
    run_id: str
    trial: str
    fingerprint: str
    candidate: str
    feature_set: str
    training_set_version: int | None
    promoted: bool | None
    aliases: tuple[str, ...]
    created_at: datetime
    tags: Mapping[str, str] = field(repr=False)

    @property
    def uri(self) -> str:
        """The address that any MLflow client understands."""
        return f"models:/{self.name}/{self.version}"

    @property
    def promoted_at(self) -> datetime | None:
        """When it became champion last; None where it never did, or before times were kept."""
        return _moment(self.tags.get(PROMOTED_AT_TAG))

    @property
    def rolled_back(self) -> bool:
        """Whether it was rolled back: such a version is never promoted again without a hand."""
        return bool(self.tags.get(ROLLED_BACK_AT_TAG))


@dataclass(frozen=True)
class LoadedModel:
    """A model version in memory, ready to be asked.

    Attributes:
        feature_names: The inputs, in the order of the signature.
        example: The stored input example, rows x features.
    """

    name: str
    version: str
    trial: str
    feature_set: str
    feature_names: tuple[str, ...]
    example: NDArray[np.float64] | None = field(repr=False)
    estimator: Any = field(repr=False)

    def predict_proba(self, rows: NDArray[np.float64] | pd.DataFrame) -> NDArray[np.float64]:
        """Return rows x 2 probabilities (no event, event), as scikit-learn does.

        Args:
            rows: A matrix in the order of `feature_names`, NaN where missing, or a frame with these columns.

        Raises:
            ValueError: a column is missing or the matrix has another width.
        """
        import numpy as np
        import pandas as pd

        if isinstance(rows, pd.DataFrame):
            missing = [name for name in self.feature_names if name not in rows.columns]
            if missing:
                raise ValueError(f"{len(missing)} features are missing, such as {', '.join(missing[:5])}")
            frame = rows[list(self.feature_names)].astype("float64")
        else:
            matrix = np.asarray(rows, dtype=np.float64)
            if matrix.ndim != 2 or matrix.shape[1] != len(self.feature_names):
                raise ValueError(f"the model needs rows of {len(self.feature_names)} features")
            frame = pd.DataFrame(matrix, columns=list(self.feature_names), copy=False)
        return np.clip(np.asarray(self.estimator.predict_proba(frame), dtype=np.float64), 0.0, 1.0)

    def probabilities(self, rows: NDArray[np.float64] | pd.DataFrame) -> NDArray[np.float64]:
        """Return the probability of the event for each row; arguments and errors as :meth:`predict_proba`."""
        return self.predict_proba(rows)[:, 1]


class ModelRegistry:
    """Experiments and registered models of one MLflow server.

    Args:
        tracking_uri: Address of the server, such as ``http://127.0.0.1:5000``.
        environment: Further variables that the MLflow library reads; what the process has already stays.
        stage: What the champion's tag ``stage`` says.
    """

    def __init__(
        self, tracking_uri: str, environment: Mapping[str, str] | None = None, *, stage: str = "production"
    ) -> None:
        self.tracking_uri = tracking_uri
        self._stage = stage
        self._environment = {**_MLFLOW_DEFAULTS, **(environment or {})}
        self._mlflow_client: Any = None
        self._answered = -_PING_EVERY_SECONDS

    # ------------------------------------------------------------------------------------------------------ training

    def ensure_experiment(self, name: str = EXPERIMENT) -> str:
        """Return the id of the experiment called `name`; it is created, or restored if deleted, where needed."""

        def ask() -> str:
            client = self._client()
            found = client.get_experiment_by_name(name)
            if found is None:
                from mlflow.exceptions import MlflowException

                try:
                    return str(client.create_experiment(name))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = client.get_experiment_by_name(name)  # another process was faster
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)

        return self._call(f"experiment {name}", ask)

    def log_run(
        self,
        experiment_id: str,
        *,
        name: str | None = None,
        params: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, bytes] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Store one finished run that is no training of the pipeline, such as an analysis, and return its id.

        Args:
            experiment_id: From :meth:`ensure_experiment`.
            name: Shown in MLflow; made up by it where not given.
            params, metrics, tags: As MLflow shows them.
            files: Artifacts of the run, path -> content.
        """

        def ask() -> str:
            from mlflow.entities import Param

            client = self._client()
            own = {"mlflow.source.name": "clinical_orchestration", **(tags or {})}
            run_id = str(client.create_run(experiment_id, tags=own, run_name=name).info.run_id)
            try:
                entries = [Param(key, str(value)) for key, value in (params or {}).items()]
                for start in range(0, len(entries), _PARAMS_A_BATCH):
                    client.log_batch(run_id, params=entries[start : start + _PARAMS_A_BATCH])
                self._log_metrics(client, run_id, metrics or {}, None)
                if files:
                    self._log_files(client, run_id, files)
            except BaseException:
                with suppress(Exception):  # the first error is the one to tell
                    client.set_terminated(run_id, status="FAILED")
                raise
            client.set_terminated(run_id, status="FINISHED")
            return run_id

        return self._call(f"run of experiment {experiment_id}", ask)

    def log_training(
        self,
        experiment_id: str,
        record: TrainingRecord,
        estimator: Any,
        example: pd.DataFrame,
        *,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> TrainingRun:
        """Store a training run with its model: parameters, dataset, lineage, metrics, files, and the model itself.

        The run stays open (status RUNNING) until :meth:`log_evaluation` ends it; if logging fails it is marked FAILED.

        Args:
            experiment_id: From :meth:`ensure_experiment`.
            record: What to say about the run.
            estimator: Fitted scikit-learn estimator with ``predict_proba``, fitted on a frame with the features' names.
            example: Input example; it is stored, so it must be nobody's data (``TrainingData.typical_row``).
            metrics: Of the cross-validation.
            files: Artifacts of the run, path -> content.

        Raises:
            ModelFormatError: the estimator holds types that :data:`TRUSTED_TYPES` does not list.
        """

        def ask() -> TrainingRun:
            client = self._client()
            tags = {
                TRIAL_TAG: record.trial,
                FINGERPRINT_TAG: record.fingerprint,
                CANDIDATE_TAG: record.candidate,
                FEATURE_SET_TAG: record.feature_set,
                TRAINING_SET_TAG: str(record.training_set_version),
                "mlflow.source.name": "clinical_orchestration",
                "code_version": record.code_version,
                **record.tags,
            }
            name = f"{record.trial}-{record.candidate}-{record.fingerprint[:8]}"
            run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
            try:
                self._log_lineage(client, run_id, record)
                self._log_files(
                    client,
                    run_id,
                    {
                        "features.json": _json(list(record.feature_names)),
                        "lineage.json": _json(
                            {
                                "training_set": {
                                    "uri": record.training_set_uri,
                                    "version": record.training_set_version,
                                    "digest": record.training_set_digest,
                                },
                                "table_versions": dict(record.table_versions),
                                "row_counts": dict(record.row_counts),
                            }
                        ),
                        "profile.json": _json(dict(record.profile)),
                        **(files or {}),
                    },
                )
                model_id = self._log_model(client, experiment_id, run_id, record, estimator, example)
                self._log_metrics(client, run_id, metrics or {}, model_id)
                client.set_tag(run_id, LOGGED_TAG, "true")
            except BaseException:
                with suppress(Exception):  # the first error is the one to tell
                    client.set_terminated(run_id, status="FAILED")
                raise
            return TrainingRun(
                run_id, str(experiment_id), record.trial, record.fingerprint, record.candidate, finished=False
            )

        return self._call(f"training run of {record.trial}", ask)

    def find_run(self, experiment_id: str, fingerprint: str) -> TrainingRun | None:
        """Return the newest completely logged training run with this fingerprint, or None.

        With it a retry goes on where a run stopped after training: nothing is trained twice.
        """

        def ask() -> TrainingRun | None:
            found = self._client().search_runs(
                [experiment_id],
                filter_string=f"tags.{FINGERPRINT_TAG} = '{_quoted(fingerprint)}' and tags.{LOGGED_TAG} = 'true'",
                order_by=["attributes.start_time DESC"],
                max_results=1,
            )
            if not found:
                return None
            tags = found[0].data.tags
            return TrainingRun(
                found[0].info.run_id,
                str(experiment_id),
                tags.get(TRIAL_TAG, ""),
                fingerprint,
                tags.get(CANDIDATE_TAG, ""),
                finished=found[0].info.status == "FINISHED",
            )

        return self._call("training runs", ask)

    def log_evaluation(
        self,
        run_id: str,
        evaluation: Evaluation,
        *,
        figures: Mapping[str, bytes] | None = None,
        reports: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Store an evaluation with its run and end the run.

        Args:
            run_id: The training run.
            evaluation: Stored whole as ``evaluation.json``, and its figures as metrics.
            figures: File name -> PNG; stored under ``plots/``.
            reports: File name -> Markdown; stored under ``reports/``.
            metrics: Further metrics.
        """

        def ask() -> None:
            client = self._client()
            model_id = client.get_run(run_id).data.tags.get("model_id")
            self._log_files(
                client,
                run_id,
                {
                    EVALUATION_FILE: _json(evaluation.to_dict()),
                    **{f"plots/{name}": content for name, content in (figures or {}).items()},
                    **{f"reports/{name}": text.encode() for name, text in (reports or {}).items()},
                },
            )
            self._log_metrics(client, run_id, {**evaluation.metrics(), **(metrics or {})}, model_id)
            client.set_terminated(run_id, status="FINISHED")

        self._call(f"evaluation of run {run_id}", ask)

    def add_files(self, run_id: str, files: Mapping[str, bytes], *, metrics: Mapping[str, float] | None = None) -> None:
        """Add artifacts and metrics to a run, which may have ended."""

        def ask() -> None:
            client = self._client()
            self._log_files(client, run_id, files)
            self._log_metrics(client, run_id, metrics or {}, None)

        self._call(f"artifacts of run {run_id}", ask)

    def run_params(self, run_id: str) -> dict[str, str]:
        """Return the parameters of a run.

        Raises:
            ModelNotFoundError: there is no such run.
        """
        return self._call(f"run {run_id}", lambda: dict(self._client().get_run(run_id).data.params))

    def read_file(self, run_id: str, path: str) -> bytes:
        """Return one artifact of a run.

        Raises:
            ModelNotFoundError: there is no such run or artifact.
        """

        def ask() -> bytes:
            from mlflow.exceptions import MlflowException

            with tempfile.TemporaryDirectory(prefix="clinical-registry-") as folder:
                try:
                    local = self._client().download_artifacts(run_id, path, folder)
                except (OSError, MlflowException) as error:
                    # which of several errors says "not there" depends on the artifact store: ask for the listing
                    if path in self._paths(run_id, str(Path(path).parent)):
                        raise
                    raise ModelNotFoundError(f"run {run_id} has no artifact {path}") from error
                return Path(local).read_bytes()

        return self._call(f"artifact {path} of run {run_id}", ask)

    def _paths(self, run_id: str, folder: str) -> set[str]:
        listed = self._client().list_artifacts(run_id, None if folder == "." else folder)
        return {item.path for item in listed}

    # ---------------------------------------------------------------------------------------------- registered models

    def find_version(self, model_name: str, fingerprint: str) -> ModelVersionInfo | None:
        """Return the newest version made from the same rows, parameters and code, or None."""
        found = self._versions(
            f"name = '{_quoted(model_name)}' and tags.{FINGERPRINT_TAG} = '{_quoted(fingerprint)}'", "find a version"
        )
        return found[0] if found else None

    def versions(self, model_name: str) -> list[ModelVersionInfo]:
        """Return all versions of a registered model, newest first; none where there is no such model."""
        return self._versions(f"name = '{_quoted(model_name)}'", f"versions of {model_name}")

    def register(
        self,
        model_name: str,
        run_id: str,
        evaluation: Evaluation,
        *,
        description: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> ModelVersionInfo:
        """Make the run's model a version of the registered model `model_name`, which is created where needed.

        Registering a run with a fingerprint that a version already has returns that version: nothing is doubled.

        Raises:
            ModelNotFoundError: there is no such run, or it holds no model.
        """

        def ask() -> ModelVersionInfo:
            client = self._client()
            run = client.get_run(run_id)
            known = run.data.tags
            fingerprint, model_id = known.get(FINGERPRINT_TAG, ""), known.get("model_id")
            if not model_id:
                raise ModelNotFoundError(f"run {run_id} holds no model")
            if fingerprint:
                existing = self.find_version(model_name, fingerprint)
                if existing is not None:
                    return existing
            self._ensure_registered_model(client, model_name)
            auroc, auprc, lift = evaluation.auroc, evaluation.auprc, evaluation.auprc_lift
            own = {
                **{name: known[name] for name in _VERSION_TAGS if name in known},
                "auroc": str(auroc),
                "auprc": str(auprc),
                "auprc_lift": "" if lift is None else f"{lift:.3f}",
                "brier": str(evaluation.brier),
                "ece": str(evaluation.ece),
                "rows": str(evaluation.rows),
                "subjects": str(evaluation.subjects),
                **(tags or {}),
            }
            created = client.create_model_version(
                model_name,
                source=f"models:/{model_id}",
                run_id=run_id,
                model_id=model_id,
                tags=own,
                await_creation_for=0,  # this server creates it in the same request
                description=description or f"{known.get(CANDIDATE_TAG, 'model')}, AUROC {auroc}, AUPRC {auprc}",
            )
            return _version_info(created)

        return self._call(f"registration of {model_name}", ask)

    def record_decision(self, model_name: str, version: str, decision: Decision) -> None:
        """Store a promotion decision: as ``decision.json`` of the run, and as tags of the version."""

        def ask() -> None:
            client = self._client()
            found = client.get_model_version(model_name, version)
            self._log_files(client, found.run_id, {DECISION_FILE: _json(decision.to_dict())})
            self._tag(
                client,
                model_name,
                version,
                {
                    DECISION_TAG: decision.outcome,
                    REASONS_TAG: "; ".join(decision.reasons),
                    DECIDED_AT_TAG: datetime.now(UTC).isoformat(timespec="seconds"),
                },
            )

        self._call(f"decision on {model_name} version {version}", ask)

    def champion(self, model_name: str) -> ModelVersionInfo | None:
        """Return the version that the alias ``champion`` points to; None where there is no such model or alias."""
        return self.by_alias(model_name, CHAMPION)

    def by_alias(self, model_name: str, alias: str) -> ModelVersionInfo | None:
        """Return the version that an alias points to; None where there is no such model or alias."""

        def ask() -> ModelVersionInfo | None:
            from mlflow.exceptions import MlflowException

            try:
                return _version_info(self._client().get_model_version_by_alias(model_name, alias))
            except MlflowException as error:
                absent = error.error_code == "INVALID_PARAMETER_VALUE" and f"alias {alias} not found" in str(error)
                if absent or error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

        return self._call(f"{alias} of {model_name}", ask)

    def set_champion(self, model_name: str, version: str) -> None:
        """Point the alias ``champion`` to a version. The change is atomic: readers see the old or the new version.

        Raises:
            ModelNotFoundError: there is no such version.
        """
        self._call(
            f"champion of {model_name}",
            lambda: self._client().set_registered_model_alias(model_name, CHAMPION, str(version)),
        )

    def promote(self, model_name: str, version: str, *, at: datetime | None = None) -> str | None:
        """Make a version the champion, keep the champion before for a rollback, and tell it in tags.

        Calling it again, such as after a crash half-way, gives the same state. Nothing is lost in between: the alias
        ``previous_champion`` is set before ``champion`` moves.

        Args:
            model_name: registered model.
            version: the new champion.
            at: when (UTC); now by default.

        Returns:
            The version that it replaces; None for the first champion.

        Raises:
            ModelNotFoundError: there is no such version.
            RegistryError: the version was rolled back, which only a hand undoes (remove its tag rolled_back_at).
        """
        version = str(version)
        moment = (at or datetime.now(UTC)).isoformat(timespec="seconds")
        before = self.champion(model_name)

        def ask() -> str | None:
            client = self._client()
            info = _version_info(client.get_model_version(model_name, version))
            if info.rolled_back:
                raise RegistryError(f"{info.uri} was rolled back and is not promoted again; train another version")
            replaced = info.tags.get(REPLACED_TAG) or None
            if before is not None and before.version != version:
                replaced = before.version
                self._tag(client, model_name, version, {REPLACED_TAG: replaced})
                client.set_registered_model_alias(model_name, PREVIOUS_CHAMPION, replaced)
            client.set_registered_model_alias(model_name, CHAMPION, version)
            self._tag(client, model_name, version, self._promoted(moment))
            if before is not None and before.version != version:
                self._tag(client, model_name, before.version, {PROMOTION_TAG: "replaced", STAGE_TAG: ARCHIVED})
            if self._alias_of(client, model_name, CHALLENGER) == version:
                client.delete_registered_model_alias(model_name, CHALLENGER)
            return replaced

        return self._call(f"promotion of {model_name} version {version}", ask)

    def _promoted(self, moment: str) -> dict[str, str]:
        return {PROMOTION_TAG: "champion", PROMOTED_AT_TAG: moment, STAGE_TAG: self._stage}

    def set_challenger(self, model_name: str, version: str) -> None:
        """Point the alias ``challenger`` to a version that waits beside the champion."""

        def ask() -> None:
            client = self._client()
            client.set_registered_model_alias(model_name, CHALLENGER, str(version))
            self._tag(client, model_name, str(version), {PROMOTION_TAG: "challenger"})

        self._call(f"challenger of {model_name}", ask)

    def set_version_tags(self, model_name: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version; a text that MLflow would refuse for its length is cut."""
        self._call(
            f"tags of {model_name} version {version}",
            lambda: self._tag(self._client(), model_name, str(version), tags),
        )

    def rollback_target(self, model_name: str, version: str) -> ModelVersionInfo | None:
        """Return the version to go back to from champion `version`: the one it replaced, or one before that.

        Versions that were rolled back themselves are passed over. None where there is none.
        """
        known = {info.version: info for info in self.versions(model_name)}
        previous = next((info for info in known.values() if PREVIOUS_CHAMPION in info.aliases), None)
        here, seen = known.get(str(version)), {str(version)}
        while here is not None:
            replaced = here.tags.get(REPLACED_TAG) or (previous.version if previous and len(seen) == 1 else "")
            if not replaced or replaced in seen:
                return None
            seen.add(replaced)
            here = known.get(replaced)
            if here is not None and not here.rolled_back:
                return here
        return None

    def roll_back(
        self, model_name: str, version: str, reason: str, *, at: datetime | None = None
    ) -> ModelVersionInfo | None:
        """Move ``champion`` from `version` back to :meth:`rollback_target`, and tell it in tags.

        The bad version is tagged first, so that a crash half-way leaves a champion that says of itself that it is to be
        rolled back; calling it again finishes. The alias ``previous_champion`` then points to what the restored
        version had replaced, or is removed.

        Args:
            model_name: registered model.
            version: the bad champion.
            reason: why, in words, without an identifier of a patient.
            at: when (UTC); now by default.

        Returns:
            The version that is champion now; None where there is no version to go back to: then nothing is changed.

        Raises:
            RegistryError: `version` is not the champion (any more).
        """
        version = str(version)
        champion = self.champion(model_name)
        if champion is None or champion.version != version:
            raise RegistryError(f"{model_name} version {version} is not the champion; nothing is rolled back")
        target = self.rollback_target(model_name, version)
        if target is None:
            return None
        after = self.rollback_target(model_name, target.version) if target.tags.get(REPLACED_TAG) else None
        moment = (at or datetime.now(UTC)).isoformat(timespec="seconds")

        def ask() -> ModelVersionInfo:
            client = self._client()
            story = {
                PROMOTION_TAG: "rolled back",
                STAGE_TAG: ARCHIVED,
                ROLLED_BACK_AT_TAG: moment,
                ROLLBACK_REASON_TAG: reason,
            }
            self._tag(client, model_name, version, story)
            client.set_registered_model_alias(model_name, CHAMPION, target.version)
            self._tag(client, model_name, target.version, self._promoted(moment))
            if after is not None and after.version != version:
                client.set_registered_model_alias(model_name, PREVIOUS_CHAMPION, after.version)
            elif self._alias_of(client, model_name, PREVIOUS_CHAMPION) is not None:
                client.delete_registered_model_alias(model_name, PREVIOUS_CHAMPION)
            if self._alias_of(client, model_name, CHALLENGER) == version:
                client.delete_registered_model_alias(model_name, CHALLENGER)
            return _version_info(client.get_model_version(model_name, target.version))

        return self._call(f"rollback of {model_name} version {version}", ask)

    def withdraw_champion(self, model_name: str) -> None:
        """Remove the alias ``champion``, if there is one; serving then stops answering for the model's trial."""
        if self.champion(model_name) is not None:
            self._call(
                f"champion of {model_name}",
                lambda: self._client().delete_registered_model_alias(model_name, CHAMPION),
            )

    def evaluation_of(self, version: ModelVersionInfo) -> Evaluation:
        """Return the evaluation stored with a version.

        Raises:
            ModelNotFoundError: it has none.
            ModelFormatError: it cannot be read.
        """
        content = self.read_file(version.run_id, EVALUATION_FILE)
        try:
            return Evaluation.from_dict(json.loads(content))
        except ValueError as error:
            raise ModelFormatError(f"the evaluation of {version.uri} cannot be read: {error}") from None

    def load_model(self, model_name: str, version: str) -> LoadedModel:
        """Load a version into memory.

        Raises:
            ModelNotFoundError: there is no such version.
            ModelFormatError: it is no model of this platform: another format, untrusted types, or no signature.
        """

        def ask() -> LoadedModel:
            import mlflow.artifacts

            client = self._client()
            info = _version_info(client.get_model_version(model_name, str(version)))
            with tempfile.TemporaryDirectory(prefix="clinical-model-") as folder:
                local = mlflow.artifacts.download_artifacts(
                    artifact_uri=client.get_model_version_download_uri(model_name, str(version)),
                    dst_path=folder,
                    tracking_uri=self.tracking_uri,
                    registry_uri=self.tracking_uri,
                )
                return _read_model(Path(local), info)

        return self._call(f"model {model_name} version {version}", ask)

    # ------------------------------------------------------------------------------------------------------- plumbing

    def ping(self) -> None:
        """Return when the server answers within five seconds.

        Raises:
            RegistryUnavailableError: it does not.
        """
        if not self.tracking_uri.startswith(("http://", "https://")):
            return
        try:
            # MLflow's own client retries for minutes, which would make a dead server look like a slow one
            request = urllib.request.Request(f"{_bare(self.tracking_uri)}/health")  # noqa: S310 - http(s) only
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS):  # noqa: S310 - http(s) only
                pass
        except urllib.error.HTTPError as error:
            if error.code >= 500:  # 401 and 404 are answers too
                raise self._unavailable(f"status {error.code}") from None
        except (OSError, urllib.error.URLError) as error:
            raise self._unavailable(str(getattr(error, "reason", error))) from None
        self._answered = time.monotonic()

    def _unavailable(self, why: str) -> RegistryUnavailableError:
        return RegistryUnavailableError(
            f"the MLflow server at {_bare(self.tracking_uri)} does not answer ({why}); start it, or set "
            "MLFLOW_TRACKING_URI to where it runs"
        )

    def _client(self) -> Any:
        if self._mlflow_client is None:
            for name, value in self._environment.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            self._mlflow_client = MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
        return self._mlflow_client

    def _call(self, what: str, ask: Callable[[], _T]) -> _T:
        """Run `ask`; turn what MLflow raises into this module's errors."""
        if time.monotonic() - self._answered > _PING_EVERY_SECONDS:
            self.ping()
        self._client()  # sets MLflow's environment before anything of it is imported
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        try:
            result = ask()
        except RegistryError:
            raise
        except RequestException as error:
            raise self._unavailable(type(error).__name__) from None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise ModelNotFoundError(f"{what}: {_first_line(error)}") from None
            if "Max retries exceeded" in str(error) or "API request to" in str(error):
                raise self._unavailable(_first_line(error).split(" with exception", 1)[0][:120]) from None
            raise RegistryError(f"{what}: {_first_line(error)}") from None
        self._answered = time.monotonic()
        return result

    @staticmethod
    def _tag(client: Any, model_name: str, version: str, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            client.set_model_version_tag(model_name, version, name, value[:_TAG_LENGTH])

    @staticmethod
    def _alias_of(client: Any, model_name: str, alias: str) -> str | None:
        version = client.get_registered_model(model_name).aliases.get(alias)
        return None if version is None else str(version)

    def _versions(self, filter_string: str, what: str) -> list[ModelVersionInfo]:
        def ask() -> list[ModelVersionInfo]:
            client, found, token = self._client(), [], None
            while True:
                page = client.search_model_versions(filter_string, max_results=200, page_token=token)
                found += [_version_info(item) for item in page]
                token = page.token
                if not token:
                    break
            # a search tells no aliases
            aliases = {name: client.get_registered_model(name).aliases for name in {item.name for item in found}}
            found = [
                replace(item, aliases=tuple(a for a, v in aliases[item.name].items() if str(v) == item.version))
                for item in found
            ]
            return sorted(found, key=lambda item: -int(item.version))

        return self._call(what, ask)

    @staticmethod
    def _ensure_registered_model(client: Any, model_name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(
                model_name, description="Risk of an adverse event within the trial's horizon"
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @staticmethod
    def _log_lineage(client: Any, run_id: str, record: TrainingRecord) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        params = {
            **{name: str(value) for name, value in record.params.items()},
            "trial": record.trial,
            "candidate": record.candidate,
            "features": str(len(record.feature_names)),
            "feature_set": record.feature_set,
            "training_set_version": str(record.training_set_version),
            **{f"delta_version/{table}": str(version) for table, version in record.table_versions.items()},
            **{f"rows/{table}": str(rows) for table, rows in record.row_counts.items()},
        }
        entries = [Param(name, value) for name, value in params.items()]
        for start in range(0, len(entries), _PARAMS_A_BATCH):
            client.log_batch(run_id, params=entries[start : start + _PARAMS_A_BATCH])
        source = {"uri": record.training_set_uri, "delta_version": record.training_set_version}
        dataset = Dataset(
            name=record.training_set_uri.rstrip("/").rsplit("/", 1)[-1] or "training_set",
            digest=record.training_set_digest[:_DATASET_DIGEST_LENGTH],
            source_type="delta",
            source=json.dumps(source),
            schema=json.dumps({"mlflow_colspec": [{"type": "double", "name": name} for name in record.feature_names]}),
            profile=json.dumps({"rows": record.row_counts.get("training_rows", 0)}),
        )
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    @staticmethod
    def _log_metrics(client: Any, run_id: str, metrics: Mapping[str, float], model_id: str | None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, 0, model_id=model_id) for name, value in metrics.items()]
        for start in range(0, len(entries), _METRICS_A_BATCH):
            client.log_batch(run_id, metrics=entries[start : start + _METRICS_A_BATCH])

    @staticmethod
    def _log_files(client: Any, run_id: str, files: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory(prefix="clinical-artifacts-") as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            client.log_artifacts(run_id, folder)

    @staticmethod
    def _log_model(
        client: Any, experiment_id: str, run_id: str, record: TrainingRecord, estimator: Any, example: pd.DataFrame
    ) -> str:
        """Store the model and return its id.

        The steps of ``mlflow.sklearn.log_model``, without the process-wide active run and without starting the model
        once more in a scratch server to try the example.
        """
        import mlflow.sklearn
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.exceptions import MlflowException
        from mlflow.models import Model, infer_signature

        logged = client.create_logged_model(
            experiment_id,
            name=MODEL_NAME_IN_RUN,
            source_run_id=run_id,
            params={name: str(value) for name, value in record.params.items()},
            tags={TRIAL_TAG: record.trial, FINGERPRINT_TAG: record.fingerprint},
        )
        try:
            with tempfile.TemporaryDirectory(prefix="clinical-model-") as folder, _quiet("mlflow"):
                local = str(Path(folder, "model"))
                mlflow.sklearn.save_model(
                    estimator,
                    local,
                    mlflow_model=Model(
                        artifact_path=logged.artifact_location,
                        model_uuid=logged.model_id,
                        run_id=run_id,
                        model_id=logged.model_id,
                    ),
                    serialization_format="skops",
                    skops_trusted_types=list(TRUSTED_TYPES),
                    signature=infer_signature(example, estimator.predict_proba(example)),
                    input_example=example,
                    pip_requirements=_requirements(),
                    pyfunc_predict_fn="predict_proba",
                    metadata={
                        TRIAL_TAG: record.trial,
                        FEATURE_SET_TAG: record.feature_set,
                        TRAINING_SET_TAG: record.training_set_version,
                    },
                )
                client.log_model_artifacts(logged.model_id, local)
        except BaseException as error:
            with suppress(Exception):
                client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
            if isinstance(error, MlflowException) and "untrusted types" in str(error):
                raise ModelFormatError(f"the model holds types that are not trusted: {_first_line(error)}") from None
            raise
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        client.set_tag(run_id, "model_id", logged.model_id)
        return str(logged.model_id)


_VERSION_TAGS = (TRIAL_TAG, FINGERPRINT_TAG, CANDIDATE_TAG, FEATURE_SET_TAG, TRAINING_SET_TAG, "code_version")


def _read_model(folder: Path, info: ModelVersionInfo) -> LoadedModel:
    import numpy as np
    import skops.io  # type: ignore[import-untyped]
    from mlflow.models import Model
    from skops.io.exceptions import UntrustedTypesFoundException  # type: ignore[import-untyped]

    model = Model.load(str(folder))
    flavor = model.flavors.get("sklearn", {})
    if flavor.get("serialization_format") != "skops":
        raise ModelFormatError(
            f"{info.uri} is not stored in the skops format; log it with "
            'mlflow.sklearn.log_model(..., serialization_format="skops")'
        )
    inputs = model.signature.inputs.input_names() if model.signature and model.signature.inputs else []
    if not inputs:
        raise ModelFormatError(f"{info.uri} has no signature with named inputs; log it with one")
    path = (folder / flavor["pickled_model"]).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ModelFormatError(f"{info.uri} lacks its model file")
    try:
        estimator = skops.io.load(path, trusted=list(TRUSTED_TYPES))
    except UntrustedTypesFoundException as error:
        raise ModelFormatError(f"{info.uri} holds types that are not trusted: {_first_line(error)}") from None
    if not hasattr(estimator, "predict_proba"):
        raise ModelFormatError(f"{info.uri} gives no probabilities")
    example = model.load_input_example(str(folder))
    return LoadedModel(
        name=info.name,
        version=info.version,
        trial=info.trial or str((model.metadata or {}).get(TRIAL_TAG, "")),
        feature_set=info.feature_set or str((model.metadata or {}).get(FEATURE_SET_TAG, "")),
        feature_names=tuple(str(name) for name in inputs),
        example=None if example is None else np.asarray(example[list(inputs)], dtype=np.float64),
        estimator=estimator,
    )


def _version_info(version: Any) -> ModelVersionInfo:
    tags = dict(version.tags or {})
    training_set = tags.get(TRAINING_SET_TAG, "")
    return ModelVersionInfo(
        name=version.name,
        version=str(version.version),
        run_id=version.run_id or "",
        trial=tags.get(TRIAL_TAG, ""),
        fingerprint=tags.get(FINGERPRINT_TAG, ""),
        candidate=tags.get(CANDIDATE_TAG, ""),
        feature_set=tags.get(FEATURE_SET_TAG, ""),
        training_set_version=int(training_set) if training_set.isdigit() else None,
        promoted={"promote": True, "refuse": False}.get(tags.get(DECISION_TAG, "")),
        aliases=tuple(version.aliases or ()),
        created_at=datetime.fromtimestamp((version.creation_timestamp or 0) / 1000, tz=UTC),
        tags=tags,
    )


def _moment(text: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _requirements() -> list[str]:
    """Return what a model needs to be loaded, pinned; given to MLflow, which else starts a process to find out."""
    from importlib.metadata import PackageNotFoundError, version

    pinned = []
    for name in ("mlflow", "scikit-learn", "xgboost-cpu", "xgboost", "skops", "numpy", "pandas", "scipy"):
        try:
            pinned.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue  # one of the two distributions of XGBoost is always absent
    return pinned


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hold back what a library says below an error, such as advice for notebooks."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _json(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, default=str, allow_nan=False).encode()


def _quoted(text: str) -> str:
    """Return text for a filter of MLflow, whose strings have no escape."""
    if "'" in text or "`" in text:
        raise RegistryError("a name holds a quote, which MLflow cannot search for")
    return text


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "message", "") or error)
    return text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__


def _bare(uri: str) -> str:
    """Return an address without user and password."""
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path.rstrip("/"), "", ""))
