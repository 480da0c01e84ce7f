"""What a finished run tells: that it failed, that it succeeded again, and which checks did not pass."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from clinical_orchestration.alerts.model import Alert, Notifier, Severity
from clinical_orchestration.alerts.redact import short_error
from clinical_orchestration.defs.results import TRIAL
from clinical_orchestration.settings import ClientSettings, Variables

FINISHED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE)
_LOOKED_AT = 25

TOLD_BY_THEIR_PIPELINE = frozenset(
    {
        ("quality/report", "quality_score_at_least_threshold"),
        ("quality/freshness", "sources_are_fresh"),
        ("quality/anomalies", "sites_are_alike"),
        ("monitoring/performance", "performance_as_at_training"),
        ("monitoring/data_drift", "features_as_at_training"),
        ("monitoring/concept_drift", "errors_do_not_grow"),
        ("monitoring/feature_distribution", "features_in_range"),
        ("monitoring/feature_distribution", "enough_features"),
    }
)
"""Checks (asset, name) whose finding is an alert of a step of the same run, with more to say: not told again."""


def run_alert_key(job_name: str, trial: str) -> str:
    """Return the key of the alert that a pipeline fails."""
    return f"run:{job_name}:{trial}"


def check_alert_key(asset: str, check: str, trial: str) -> str:
    """Return the key of the alert that an asset check does not pass."""
    return f"check:{asset}:{check}:{trial}"


def trial_of(run: dg.DagsterRun) -> str:
    """Return the trial that a run works on."""
    config: Any = run.run_config
    for name in ("resources", "pipeline", "config"):
        config = config.get(name) if isinstance(config, dict) else None
    config = config if isinstance(config, dict) else {}
    conf = config.get("conf") if isinstance(config.get("conf"), dict) else {}
    return str(config.get("trial") or conf.get("trial") or ClientSettings().trial)


def secrets() -> list[str]:
    """Return the values that no message may hold, as far as the settings know them."""
    settings, variables = ClientSettings(), Variables()
    values = [settings.s3_secret_key, settings.postgres_url, settings.redis_url, variables.slack_webhook_url]
    return [value.get_secret_value() for value in values if value.get_secret_value()]


def is_outdated(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Say whether a later run of the same pipeline and trial has finished: what this one tells is no longer true.

    Failures and successes are told by different sensors, so that they may be seen in another order than they happened.
    """
    records = instance.get_run_records(
        dg.RunsFilter(job_name=run.job_name, statuses=list(FINISHED)), limit=_LOOKED_AT, order_by="id"
    )
    mine = next((record for record in records if record.dagster_run.run_id == run.run_id), None)
    if mine is None:
        mine = instance.get_run_record_by_id(run.run_id)
    if mine is None:
        return False
    return any(
        record.storage_id != mine.storage_id
        and (record.end_time or 0.0) > (mine.end_time or 0.0)
        and trial_of(record.dagster_run) == trial_of(run)
        for record in records
    )


def failure_alert(
    run: dg.DagsterRun, message: str, steps: list[tuple[str, str]], hidden: list[str], job_description: str = ""
) -> Alert:
    """Return the alert of a failed run.

    Args:
        run: the run.
        message: what Dagster says about the whole run.
        steps: failed steps with their errors.
        hidden: values that must not appear.
        job_description: what the pipeline does.
    """
    trial = trial_of(run)
    if steps:
        step, error = steps[0]
        others = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
        what = f"The step {step}{others} failed: {short_error(error, hidden)}"
    else:
        what = f"The run failed outside of its steps: {short_error(message, hidden) or 'no error was stored'}"
    return Alert(
        key=run_alert_key(run.job_name, trial),
        severity=Severity.ERROR,
        title=f"{run.job_name} failed",
        what=what,
        where=f"/dagster/runs/{run.run_id}",
        action="Look at the step's log, remove the cause and start the pipeline again: nothing is done twice. "
        "The alert resolves itself when the pipeline next succeeds.",
        source="run_failure_alerts",
        trial=trial,
        details={"run": run.run_id, **({"failed steps": ", ".join(step for step, _ in steps)} if steps else {})},
    )


def tell_failure(context: dg.RunFailureSensorContext, alerts: Notifier) -> bool:
    """Raise the alert of a failed run, and those of its checks; return whether the run still matters."""
    run = context.dagster_run
    if is_outdated(context.instance, run):
        return False
    steps = []
    for event in context.get_step_failure_events():
        data = event.step_failure_data
        reason = data.user_failure_data.description if data.user_failure_data else None
        error = data.error
        while reason is None and error is not None and error.cause is not None:
            error = error.cause  # Dagster's own error around the step says nothing about the cause
        steps.append((event.step_key or "?", reason or (error.message if error else "") or "no error was stored"))
    alerts.send(failure_alert(run, context.failure_event.message or "", steps, secrets()))
    tell_checks(context.instance, run, alerts)
    return True


def tell_success(context: dg.RunStatusSensorContext, alerts: Notifier) -> bool:
    """Resolve the alert of the pipeline, and tell its checks; return whether the run still matters."""
    run = context.dagster_run
    if is_outdated(context.instance, run):
        return False
    alerts.resolve(run_alert_key(run.job_name, trial_of(run)), f"{run.job_name} succeeded in run {run.run_id}")
    tell_checks(context.instance, run, alerts)
    return True


def tell_checks(instance: dg.DagsterInstance, run: dg.DagsterRun, alerts: Notifier) -> None:
    """Raise an alert for each check of the run that did not pass and resolve those of checks that did."""
    for evaluation in check_evaluations(instance, run.run_id):
        trial = _trial(evaluation, run)
        asset = evaluation.asset_key.to_user_string()
        if (asset, evaluation.check_name) in TOLD_BY_THEIR_PIPELINE:
            continue
        key = check_alert_key(asset, evaluation.check_name, trial)
        if evaluation.passed:
            alerts.resolve(key, f"the check passed in run {run.run_id}")
        else:
            alerts.send(check_alert(evaluation, run, trial, key))


def check_evaluations(instance: dg.DagsterInstance, run_id: str) -> Iterator[dg.AssetCheckEvaluation]:
    """Yield the newest evaluation of each check in a run (a step that was repeated evaluates twice)."""
    newest: dict[tuple[str, str], dg.AssetCheckEvaluation] = {}
    records = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
    for record in records:
        event = record.event_log_entry.dagster_event
        if event is not None:
            evaluation = event.asset_check_evaluation_data
            newest[evaluation.asset_key.to_user_string(), evaluation.check_name] = evaluation
    yield from newest.values()


def check_alert(evaluation: dg.AssetCheckEvaluation, run: dg.DagsterRun, trial: str, key: str) -> Alert:
    """Return the alert of a check that did not pass: WARN is a warning, ERROR an error."""
    asset = evaluation.asset_key.to_user_string()
    warn = evaluation.severity is dg.AssetCheckSeverity.WARN
    said = short_error(evaluation.description or "", secrets())
    return Alert(
        key=key,
        severity=Severity.WARNING if warn else Severity.ERROR,
        title=f"Check {evaluation.check_name} of {asset} did not pass",
        what=said or f"The check {evaluation.check_name} of the asset {asset} did not pass in {run.job_name}.",
        where=f"/dagster/assets/{asset}?view=checks",
        action="Look at the check's metadata in the asset's view and at the run; the alert resolves itself when the "
        "check passes.",
        source=asset,
        trial=trial,
        details={"run": run.run_id, "pipeline": run.job_name, **_figures(evaluation)},
    )


def _figures(evaluation: dg.AssetCheckEvaluation) -> dict[str, Any]:
    """Return the check's single figures; texts and tables may hold anything and stay in the UI."""
    figures = {}
    for name, value in evaluation.metadata.items():
        if isinstance(value.value, bool | int | float):
            figures[name] = value.value
    return dict(list(figures.items())[:6])


def _trial(evaluation: dg.AssetCheckEvaluation, run: dg.DagsterRun) -> str:
    value = evaluation.metadata.get(TRIAL)
    return str(value.value) if value is not None else trial_of(run)
