"""Alerts of finished runs and of their checks, over runs that really happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from clinical_orchestration.alerts.model import Alert, Severity
from clinical_orchestration.alerts.policy import Kind
from clinical_orchestration.defs.sensors import runs
from clinical_orchestration.defs.sensors.runs import trial_of
from clinical_orchestration.defs.sensors.sensors import run_failure_alerts, run_success_alerts
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.alerts import AlertCenter, MemoryAlertStore
from clinical_orchestration_tests.alerts.test_center import Recorder
from clinical_orchestration_tests.fakes import RecordingNotifier

MOOD: dict[str, Any] = {}


@dg.asset(
    check_specs=[
        dg.AssetCheckSpec("hard", asset="tested"),
        dg.AssetCheckSpec("soft", asset="tested"),
        dg.AssetCheckSpec("fine", asset="tested"),
    ]
)
def tested(pipeline: PipelineResource) -> Iterator[Any]:
    error = MOOD.get("error")
    if error is not None:
        raise error
    yield dg.MaterializeResult(asset_key="tested")
    passed = MOOD.get("passed", True)
    yield dg.AssetCheckResult(check_name="hard", passed=passed, metadata={"score": 0.5, "rows": "P-001, P-002"})
    yield dg.AssetCheckResult(check_name="soft", passed=passed, severity=dg.AssetCheckSeverity.WARN)
    yield dg.AssetCheckResult(check_name="fine", passed=True)


defs = dg.Definitions(
    assets=[tested],
    jobs=[dg.define_asset_job("clinical_data_pipeline", executor_def=dg.in_process_executor)],
    resources={"pipeline": PipelineResource()},
)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    MOOD.clear()
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def run(instance: dg.DagsterInstance, trial: str = "simulated", **mood: Any) -> dg.ExecuteInProcessResult:
    MOOD.clear()
    MOOD.update(mood)
    config = {"resources": {"pipeline": {"config": {"trial": trial}}}}
    job = defs.resolve_job_def("clinical_data_pipeline")
    return job.execute_in_process(instance=instance, raise_on_error=False, run_config=config)


def tell(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult, alerts: Any) -> None:
    """Evaluate the sensor that Dagster evaluates for such a run."""
    event = result.get_run_failure_event() if not result.success else result.get_run_success_event()
    sensor = run_success_alerts if result.success else run_failure_alerts
    context = dg.build_run_status_sensor_context(
        sensor.name, dagster_event=event, dagster_instance=instance, dagster_run=result.dagster_run
    )
    if not result.success:
        context = context.for_run_failure()
    sensor(context, alerts=alerts)  # type: ignore[operator]


def of(alerts: RecordingNotifier, key: str) -> Alert:
    (found,) = [alert for alert in alerts.sent if alert.key == key]
    return found


def test_a_failure_names_pipeline_step_error_and_run(instance: dg.DagsterInstance) -> None:
    alerts = RecordingNotifier()
    result = run(instance, error=ValueError("3 rows are not enough"))
    tell(instance, result, alerts)
    alert = of(alerts, "run:clinical_data_pipeline:simulated")
    assert alert.severity is Severity.ERROR
    assert alert.title == "clinical_data_pipeline failed"
    assert alert.what == "The step tested failed: ValueError: 3 rows are not enough"
    assert alert.where == f"/dagster/runs/{result.run_id}"
    assert alert.trial == "simulated"


def test_our_own_failures_are_told_in_their_own_words(instance: dg.DagsterInstance) -> None:
    alerts = RecordingNotifier()
    tell(instance, run(instance, error=dg.Failure("the folder is empty; give another", allow_retries=False)), alerts)
    assert alerts.sent[0].what == "The step tested failed: the folder is empty; give another"


def test_a_failure_tells_no_secret(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "zyx-987-zyx")
    alerts = RecordingNotifier()
    error = OSError("postgresql://u:hush-hush@db refused; the key zyx-987-zyx as well")
    tell(instance, run(instance, error=error), alerts)
    text = repr(alerts.sent)
    assert "hush-hush" not in text
    assert "zyx-987-zyx" not in text
    assert "refused" in text


def test_the_next_success_resolves_the_failure_of_the_same_trial(instance: dg.DagsterInstance) -> None:
    channel = Recorder()
    alerts = AlertCenter(MemoryAlertStore(), [channel])
    tell(instance, run(instance, error=ValueError("no")), alerts)
    tell(instance, run(instance, error=ValueError("still no")), alerts)
    tell(instance, run(instance, trial="cdisc-pilot"), alerts)
    assert channel.kinds == [Kind.OPENED]
    tell(instance, run(instance), alerts)
    assert channel.kinds == [Kind.OPENED, Kind.RESOLVED]


def test_a_failure_that_is_seen_after_the_next_success_raises_nothing(instance: dg.DagsterInstance) -> None:
    alerts = RecordingNotifier()
    failed = run(instance, error=ValueError("no"))
    succeeded = run(instance)
    tell(instance, succeeded, alerts)
    tell(instance, failed, alerts)
    assert alerts.sent == []


def test_checks_that_do_not_pass_raise_alerts_by_their_severity_and_resolve_when_they_pass(
    instance: dg.DagsterInstance,
) -> None:
    alerts = RecordingNotifier()
    tell(instance, run(instance, passed=False), alerts)
    hard, soft = of(alerts, "check:tested:hard:simulated"), of(alerts, "check:tested:soft:simulated")
    assert (hard.severity, soft.severity) == (Severity.ERROR, Severity.WARNING)
    assert hard.details["score"] == 0.5
    assert "P-001" not in repr(hard), "texts of a check's metadata may name patients"
    assert len(alerts.sent) == 2
    assert "check:tested:fine:simulated" in alerts.resolved
    tell(instance, run(instance), alerts)
    assert {"check:tested:hard:simulated", "check:tested:soft:simulated"} <= set(alerts.resolved)
    assert len(alerts.sent) == 2


@pytest.mark.parametrize(
    ("config", "trial"),
    [
        ({"resources": {"pipeline": {"config": {"trial": "a"}}}}, "a"),
        ({"resources": {"pipeline": {"config": {"conf": {"trial": "b"}}}}}, "b"),
        ({}, "cdisc-pilot"),
        ({"resources": {"pipeline": {"config": None}}}, "cdisc-pilot"),
    ],
)
def test_the_trial_of_a_run(config: dict[str, Any], trial: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLINICAL_TRIAL", raising=False)
    assert trial_of(dg.DagsterRun(job_name="x", run_config=config)) == trial


def test_checks_that_their_pipeline_tells_itself_are_not_told_twice(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "TOLD_BY_THEIR_PIPELINE", frozenset({("tested", "hard")}))
    alerts = RecordingNotifier()
    tell(instance, run(instance, passed=False), alerts)
    assert [alert.key for alert in alerts.sent] == ["check:tested:soft:simulated"]


def test_the_checks_that_are_left_out_exist() -> None:
    from clinical_orchestration.definitions import defs as deployed

    known = {(key.asset_key.to_user_string(), key.name) for key in deployed.resolve_asset_graph().asset_check_keys}
    assert known >= runs.TOLD_BY_THEIR_PIPELINE
