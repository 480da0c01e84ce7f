"""Dagster resources: configuration only. Each builds the plain adapter of one external system.

Every field may stay empty; the value then comes from the environment that ``pipeline-manager.sh --env`` prints, when
the run starts. Adapters load their drivers when they are first used.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from clinical_orchestration.settings import ClientSettings, Variables, lake_root
from clinical_orchestration.trials import TrialProfile, available_trials, configured_trial

if TYPE_CHECKING:
    from pathlib import Path

    from clinical_orchestration.alerts.model import Notifier
    from clinical_orchestration.stores.kafka import Producer, TopicAdmin, TopicReader
    from clinical_orchestration.stores.objects import Objects
    from clinical_orchestration.stores.online import OnlineStore
    from clinical_orchestration.stores.registry import ModelRegistry
    from clinical_orchestration.stores.serving import ServingClient
    from clinical_orchestration.stores.spark import SparkTables
    from clinical_orchestration.stores.spark_jobs import SparkJobs
    from clinical_orchestration.stores.tables import TableStore


MAX_RUNTIME_TAG = "dagster/max_runtime"
"""Tag of a run: seconds after which Dagster's run monitoring ends it."""


class PipelineResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """What a run works on: the trial, where its files are, and the free-form ``conf`` of whoever started it."""

    trial: str | None = Field(default=None, description="Trial profile; empty: the deployment's default trial.")
    source: str | None = Field(
        default=None,
        description="Folder of SDTM files (.xpt, .csv, .parquet), or an s3:// prefix that holds some; empty: as the "
        "profile says.",
    )
    conf: dict[str, Any] = Field(
        default_factory=dict,
        description="Free-form; `force_training: true` trains even when nothing changed, "
        "`keep_model: true` brings data and features up to date and trains nothing, "
        "`full_features: true` computes all features again, "
        "`force: true` retrains whatever the conditions say, `reason` says why a retraining is asked for, "
        "`hpo_trials` is its number of trials in the search for hyper-parameters, "
        "`apply_cleaning: true` applies the safe corrections of data_quality_monitoring and `revert: <batch id>` takes "
        "a batch of them back, "
        "`accept_loss: true` goes on behind Kafka messages that retention removed before they were ingested, "
        "`start_date` and `end_date` (ISO days, both included) are the range of a feature backfill, by default the "
        "whole trial.",
    )

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Bound the run's time as the variable ``execution_timeout_hours`` says, unless whoever started it did."""
        if context.run is None or context.instance is None or MAX_RUNTIME_TAG in context.run.tags:
            return
        if context.instance.has_run(context.run.run_id):
            seconds = round(Variables().execution_timeout_hours * 3600)
            context.instance.add_run_tags(context.run.run_id, {MAX_RUNTIME_TAG: str(seconds)})

    def profile(self) -> TrialProfile:
        """Return the trial's profile.

        Raises:
            dagster.Failure: there is no such profile; a retry would not help, so none is made.
        """
        name = self.trial or self.conf.get("trial") or ClientSettings().trial
        try:
            return configured_trial(name)
        except ValueError as error:
            raise dg.Failure(str(error), allow_retries=False) from error

    def source_folder(self) -> Path | None:
        """Return the folder of the trial's files, or None for the profile's own source.

        Objects below an ``s3://`` prefix are copied into the deployment's own folder first.

        Raises:
            dagster.Failure: there is no such folder, or no object below the prefix; a retry would not help.
        """
        from pathlib import Path

        text = self.source or self.conf.get("source")
        if not text:
            return None
        if str(text).startswith("s3://"):
            from clinical_orchestration.stores.objects import ObjectNotFoundError, ObjectStore, download

            bucket, _, prefix = str(text).removeprefix("s3://").partition("/")
            try:
                return download(
                    ObjectStore.from_settings(bucket=bucket), prefix, ClientSettings().home / "data" / "landing"
                )
            except ObjectNotFoundError as error:
                raise dg.Failure(f"{error}; give --source a prefix that holds files", allow_retries=False) from error
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise dg.Failure(f"the source folder {folder} does not exist; give --source a folder", allow_retries=False)
        return folder

    def scratch(self) -> Path:
        """Return the folder of files that the deployment makes for itself."""
        return ClientSettings().home / "data" / "simulation"

    def flag(self, name: str) -> bool:
        """Return whether `conf` sets the flag."""
        return bool(self.conf.get(name, False))

    def variables(self) -> Variables:
        """Return the platform's variables as they are now."""
        return Variables()


def profiles() -> dict[str, TrialProfile]:
    """Return every trial profile by name: records of several trials share the tables."""
    variables = Variables()
    return {name: configured_trial(name, variables) for name in available_trials()}


def _table_store(root: str | None) -> TableStore:
    from clinical_orchestration.stores.tables import DeltaTableStore, storage_options

    settings, variables = ClientSettings(), Variables()
    uri = root or lake_root(settings, variables)
    if not uri.startswith("s3"):
        return DeltaTableStore(uri, None)
    if uri == f"s3://{variables.clinical_data_bucket}":
        _ensure_bucket(settings, variables.clinical_data_bucket)
    retries = {
        "max_retries": str(variables.max_retry_attempts),
        "backoff_config.init_backoff": "1s",
        "backoff_config.max_backoff": f"{variables.longest_pause_seconds:.0f}s",
    }
    return DeltaTableStore(uri, {**storage_options(settings), **retries})


def _ensure_bucket(settings: ClientSettings, bucket: str) -> None:
    """Make the bucket that somebody named by the variable; the one of the default comes with the deployment."""
    if bucket == Variables.model_fields["clinical_data_bucket"].default:
        return
    from minio.error import MinioException
    from urllib3.exceptions import HTTPError

    from clinical_orchestration.stores.objects import ObjectStore

    # without the right to look at buckets, or without an answer, the first use of a table says what is wrong
    with contextlib.suppress(MinioException, HTTPError):
        ObjectStore.from_settings(settings, bucket=bucket).ensure_bucket()


class TablesResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The Delta tables of the lakehouse."""

    root: str | None = Field(default=None, description="Folder or s3:// URI; empty: the bucket clinical_data_bucket.")

    def create_resource(self, context: dg.InitResourceContext) -> TableStore:
        """Return the store of the tables."""
        return _table_store(self.root)


class SparkResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Spark over the lakehouse; the session is created when a step first asks for it."""

    root: str | None = Field(default=None, description="Folder or s3:// URI; empty: the bucket clinical_data_bucket.")

    def create_resource(self, context: dg.InitResourceContext) -> SparkTables:
        """Return the tables as Spark sees them."""
        from clinical_orchestration.stores.spark import spark_tables

        return spark_tables(_table_store(self.root), batch_rows=Variables().data_processing_batch_size)


class SparkJobsResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Spark batch jobs: submit, wait, status, logs, kill."""

    master_url: str | None = Field(
        default=None,
        description="Master for SparkSubmit, such as spark://host:7077; empty text: Spark Connect; "
        "not given: the variable spark_master_url.",
    )

    def create_resource(self, context: dg.InitResourceContext) -> SparkJobs:
        """Return the way of running jobs that fits the deployment."""
        from clinical_orchestration.stores.spark_jobs import spark_jobs

        return spark_jobs(master_url=self.master_url)


class KafkaResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The Kafka topics."""

    enabled: bool | None = Field(default=None, description="Empty: as CLINICAL_KAFKA_ENABLED says.")

    def available(self) -> bool:
        """Return whether this deployment has a broker."""
        return ClientSettings().kafka_enabled if self.enabled is None else self.enabled

    def reader(self) -> TopicReader:
        """Return a reader by explicit offsets."""
        from clinical_orchestration.stores.kafka import topic_reader

        return topic_reader()

    def admin(self) -> TopicAdmin:
        """Return the administration client."""
        from clinical_orchestration.stores.kafka import topic_admin

        return topic_admin()

    def producer(self) -> Producer:
        """Return a producer whose records are on all replicas when it says so."""
        from clinical_orchestration.stores.kafka import producer

        return producer()


class OnlineStoreResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The online features in Redis."""

    def create_resource(self, context: dg.InitResourceContext) -> OnlineStore:
        """Return the online store."""
        from clinical_orchestration.stores.online import RedisOnlineStore

        variables = Variables()
        return RedisOnlineStore(
            ClientSettings().redis_url.get_secret_value(),
            variables.feature_store_redis_prefix,
            retries=variables.max_retry_attempts,
            longest_pause_seconds=variables.longest_pause_seconds,
        )


class RegistryResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """MLflow: experiment, runs and registered models."""

    def create_resource(self, context: dg.InitResourceContext) -> ModelRegistry:
        """Return the model registry."""
        from clinical_orchestration.stores.registry import ModelRegistry

        settings, variables = ClientSettings(), Variables()
        environment = {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(variables.max_retry_attempts),
            "MLFLOW_TRACKING_USERNAME": settings.mlflow_username,
            "MLFLOW_TRACKING_PASSWORD": settings.mlflow_password.get_secret_value(),
        }
        return ModelRegistry(
            settings.mlflow_tracking_uri,
            {name: value for name, value in environment.items() if value},
            stage=variables.model_stage,
        )


class ObjectsResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Plain objects, such as reports, in a bucket of the S3 service."""

    bucket: str | None = Field(default=None, description="Empty: the variable clinical_data_bucket.")

    def create_resource(self, context: dg.InitResourceContext) -> Objects:
        """Return the bucket."""
        from clinical_orchestration.stores.objects import ObjectStore

        return ObjectStore.from_settings(bucket=self.bucket)


class ServingResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The model server."""

    def create_resource(self, context: dg.InitResourceContext) -> ServingClient:
        """Return a client of the model server."""
        from clinical_orchestration.stores.serving import ServingClient

        variables = Variables()
        return ServingClient(
            ClientSettings().serving_url,
            retries=variables.max_retry_attempts,
            longest_pause_seconds=variables.longest_pause_seconds,
        )


class AlertsResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Who tells people: Slack and e-mail where they are configured, always the log and, by the database, the page."""

    def create_resource(self, context: dg.InitResourceContext) -> Notifier:
        """Return the notifier; its channels are read from variables and environment for each message."""
        from clinical_orchestration.stores.alerts import build_notifier

        return build_notifier()


def build_resources() -> dict[str, Any]:
    """Return the resources of a deployment, configured from the environment."""
    return {
        "pipeline": PipelineResource(),
        "tables": TablesResource(),
        "spark": SparkResource(),
        "spark_jobs": SparkJobsResource(),
        "kafka": KafkaResource(),
        "online": OnlineStoreResource(),
        "registry": RegistryResource(),
        "objects": ObjectsResource(),
        "serving": ServingResource(),
        "alerts": AlertsResource(),
    }
