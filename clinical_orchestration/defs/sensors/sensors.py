"""The sensors: each observes, decides and starts at most one run an event, or raises an alert.

All run from the start. Where a service is absent they stay quiet with a reason that names it.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import groupby

import dagster as dg

from clinical_orchestration.alerts.model import Alert, Notifier, Severity
from clinical_orchestration.contract import CLINICAL_DATA_PIPELINE, SCHEDULED_RETRAINING
from clinical_orchestration.defs.pipelines import JOBS
from clinical_orchestration.defs.sensors import decisions, observe
from clinical_orchestration.defs.sensors.decisions import Decision
from clinical_orchestration.defs.sensors.requests import Cursor, Patience, ask_for_run, describe
from clinical_orchestration.defs.sensors.runs import tell_failure, tell_success
from clinical_orchestration.resources import KafkaResource, profiles
from clinical_orchestration.settings import ClientSettings, Variables
from clinical_orchestration.stores.alerts import AlertCenter
from clinical_orchestration.stores.objects import Objects
from clinical_orchestration.stores.online import OnlineStore
from clinical_orchestration.stores.tables import TableStore

RUNNING = dg.DefaultSensorStatus.RUNNING
_JOB = {job.name: job for job in JOBS}
_PIPELINE = _JOB[CLINICAL_DATA_PIPELINE.name]

_clinical_data_patience = Patience()
_landing_patience = Patience()
_feature_store_patience = Patience()
_performance_patience = Patience()
_lag_patience = Patience()


@dg.sensor(
    name="clinical_data_sensor",
    job=_PIPELINE,
    minimum_interval_seconds=30,
    default_status=RUNNING,
    description="Starts clinical_data_pipeline when enough new records arrived (variable "
    "clinical_data_minimum_records) and the newest quality score is at least data_quality_threshold.",
)
def clinical_data_sensor(
    context: dg.SensorEvaluationContext, tables: dg.ResourceParam[TableStore], kafka: KafkaResource
) -> dg.SensorResult:
    """Count what topics and raw tables hold beyond silver."""

    def decide(cursor: Cursor) -> Decision:
        variables, trial = Variables(), ClientSettings().trial
        return decisions.clinical_data(
            observe.inflow(context.instance, tables, kafka, variables.topics(), trial),
            cursor.position,
            minimum=variables.clinical_data_minimum_records,
            threshold=variables.data_quality_threshold,
        )

    return ask_for_run(
        context, _PIPELINE.name, decide, patience=_clinical_data_patience, services="the lakehouse in S3, or Kafka"
    )


@dg.sensor(
    name="landing_files_sensor",
    job=_PIPELINE,
    minimum_interval_seconds=30,
    default_status=RUNNING,
    description="Starts clinical_data_pipeline on the SDTM files of a landing folder: CLINICAL_HOME/landing/<trial>/ "
    "or landing/<trial>/ of the bucket, once the files are complete (unchanged since the evaluation before, or "
    "declared by _SUCCESS, .done or <file>.done).",
)
def landing_files_sensor(context: dg.SensorEvaluationContext, objects: dg.ResourceParam[Objects]) -> dg.SensorResult:
    """Look for new complete files."""

    def decide(cursor: Cursor) -> Decision:
        trials = sorted(profiles())
        files, sources = observe.local_landing(ClientSettings().home / "landing", trials)
        try:
            remote, prefixes = observe.remote_landing(objects, [trial for trial in trials if trial not in sources])
        except Exception as error:
            if not files:
                raise
            context.log.warning(f"the bucket cannot be listed, only folders were looked at: {describe(error, 'S3')}")
            # files of the bucket are neither there nor gone
            remote, prefixes = [], {}
        return decisions.landing_files([*files, *remote], {**prefixes, **sources}, cursor.position, cursor.memory)

    return ask_for_run(
        context, _PIPELINE.name, decide, patience=_landing_patience, services="S3, or the landing folders"
    )


@dg.sensor(
    name="feature_store_sensor",
    job=_PIPELINE,
    minimum_interval_seconds=60,
    default_status=RUNNING,
    description="Starts clinical_data_pipeline when patients lack online features, or have stale or incomplete ones.",
)
def feature_store_sensor(
    context: dg.SensorEvaluationContext,
    tables: dg.ResourceParam[TableStore],
    online: dg.ResourceParam[OnlineStore],
) -> dg.SensorResult:
    """Compare the newest offline features with those in Redis."""
    now = datetime.now(UTC)

    def decide(cursor: Cursor) -> Decision:
        known = [profile for _, profile in sorted(profiles().items())]
        return decisions.feature_store(
            list(observe.feature_store_states(tables, online, known, now)), cursor.position, now
        )

    return ask_for_run(
        context, _PIPELINE.name, decide, patience=_feature_store_patience, services="the lakehouse in S3, or Redis"
    )


def model_performance_sensor(job: "dg.UnresolvedAssetJobDefinition") -> dg.SensorDefinition:
    """Return the sensor that asks `job` for retraining."""

    @dg.sensor(
        name="model_performance_sensor",
        job=job,
        minimum_interval_seconds=60,
        default_status=RUNNING,
        description="Starts scheduled_retraining when monitoring finds performance below its bounds, a falling trend, "
        "data drift or concept drift.",
    )
    def sensor(context: dg.SensorEvaluationContext, tables: dg.ResourceParam[TableStore]) -> dg.SensorResult:
        def decide(cursor: Cursor) -> Decision:
            known = [profile for _, profile in sorted(profiles().items())]
            return decisions.model_performance(
                observe.model_states(context.instance, tables, known),
                cursor.position,
                datetime.now(UTC),
                pause=timedelta(hours=Variables().retraining_pause_hours),
            )

        return ask_for_run(context, job.name, decide, patience=_performance_patience, services="the lakehouse in S3")

    return sensor


@dg.sensor(
    name="kafka_consumer_lag_sensor",
    minimum_interval_seconds=60,
    default_status=RUNNING,
    description="Raises an alert when the raw tables are more than kafka_lag_alert_messages behind a topic.",
)
def kafka_consumer_lag_sensor(
    context: dg.SensorEvaluationContext,
    tables: dg.ResourceParam[TableStore],
    kafka: KafkaResource,
    alerts: dg.ResourceParam[Notifier],
) -> dg.SkipReason:
    """Compare topics with the raw tables; starts no run."""
    variables = Variables()
    bound = variables.kafka_lag_alert_messages
    try:
        partitions = _lag_patience(lambda: observe.topic_lags(tables, kafka, variables.topics()))
    except Exception as error:
        return dg.SkipReason(f"the lag is not known: {describe(error, 'Kafka, or the lakehouse in S3')}")
    if partitions is None:
        return dg.SkipReason("no Kafka broker is installed here")
    by_topic = groupby(sorted(partitions.items()), key=lambda item: item[0].rpartition("/")[0])
    lags = {topic: sum(max(0, lag.end - lag.begin) for _, lag in found) for topic, found in by_topic}
    verdict = decisions.kafka_lag(lags, bound)
    for topic, lag in verdict.high.items():
        alerts.send(
            Alert(
                key=f"kafka_lag:{topic}",
                severity=Severity.WARNING,
                title=f"The raw tables are behind the topic {topic}",
                what=f"{lag:,} messages of {topic} are not in the raw tables yet; the bound is {bound:,}.",
                where="/dagster/assets/kafka/topics",
                action="See whether clinical_data_pipeline runs and succeeds; start it if it is paused.",
                source="kafka_consumer_lag_sensor",
                details={"lag": lag, "bound": bound},
            )
        )
    for topic in verdict.low:
        alerts.resolve(f"kafka_lag:{topic}", f"the lag is {lags[topic]:,} messages")
    shown = ", ".join(f"{topic} {lag:,}" for topic, lag in sorted(lags.items())) or "no topic exists"
    return dg.SkipReason(f"messages beyond the raw tables: {shown}")


@dg.sensor(
    name="alert_delivery_sensor",
    minimum_interval_seconds=60,
    default_status=RUNNING,
    description="Sends alert messages that wait: of a channel that did not answer, or held back by its limit.",
)
def alert_delivery_sensor(context: dg.SensorEvaluationContext, alerts: dg.ResourceParam[Notifier]) -> dg.SkipReason:
    """Deliver what waits; starts no run."""
    if not isinstance(alerts, AlertCenter) or not alerts.channels:
        return dg.SkipReason("no channel is configured: alerts are in the log and on the page")
    names = ", ".join(channel.name for channel in alerts.channels)
    return dg.SkipReason(f"{alerts.deliver()} waiting messages sent ({names})")


@dg.run_failure_sensor(
    name="run_failure_alerts",
    minimum_interval_seconds=30,
    default_status=RUNNING,
    description="Raises an alert when a run fails: pipeline, step, error, link.",
)
def run_failure_alerts(context: dg.RunFailureSensorContext, alerts: dg.ResourceParam[Notifier]) -> None:
    """Tell the failure."""
    if not tell_failure(context, alerts):
        context.log.info("A later run of the pipeline has finished: its result is told instead.")


@dg.run_status_sensor(
    name="run_success_alerts",
    run_status=dg.DagsterRunStatus.SUCCESS,
    minimum_interval_seconds=30,
    default_status=RUNNING,
    description="Resolves the alert of a pipeline that succeeds again; raises and resolves alerts of asset checks.",
)
def run_success_alerts(context: dg.RunStatusSensorContext, alerts: dg.ResourceParam[Notifier]) -> None:
    """Tell the success and the checks."""
    if not tell_success(context, alerts):
        context.log.info("A later run of the pipeline has finished: its result is told instead.")


_OF_JOBS: dict[str, Callable[["dg.UnresolvedAssetJobDefinition"], dg.SensorDefinition]] = {
    SCHEDULED_RETRAINING.name: model_performance_sensor,
}

SENSORS: list[dg.SensorDefinition] = [
    clinical_data_sensor,
    landing_files_sensor,
    feature_store_sensor,
    *(make(_JOB[name]) for name, make in _OF_JOBS.items() if name in _JOB),
    kafka_consumer_lag_sensor,
    alert_delivery_sensor,
    run_failure_alerts,
    run_success_alerts,
]
