"""The watch of the champions: every minute the model server's metrics, and each new result of monitoring."""

import json
from dataclasses import replace
from typing import Any

import dagster as dg

from clinical_orchestration.alerts.model import Notifier
from clinical_orchestration.defs.common import asset_key
from clinical_orchestration.defs.results import newest_result
from clinical_orchestration.defs.retraining.assets import OUTCOME, PERFORMANCE, outcome_materialization
from clinical_orchestration.modeling.watch import ServingSample
from clinical_orchestration.resources import profiles
from clinical_orchestration.settings import Variables
from clinical_orchestration.stores.champion_watch import Watched, bounds_of, watch_champion
from clinical_orchestration.stores.registry import ModelRegistry, RegistryError, RegistryUnavailableError
from clinical_orchestration.stores.serving import ServingClient
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.trials import TrialProfile

EVERY_SECONDS = 60


@dg.sensor(
    name="champion_watch_sensor",
    minimum_interval_seconds=EVERY_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Looks at each trial's champion: failed answers and latency from the model server's metrics since the "
    "last look, error on outcomes when model_monitoring has a new result. A champion out of bounds is rolled back to "
    "the one before, tagged, and an alert is raised. Starts no run.",
)
def champion_watch_sensor(
    context: dg.SensorEvaluationContext,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
    serving: dg.ResourceParam[ServingClient],
    alerts: dg.ResourceParam[Notifier],
) -> dg.SensorResult:
    """Look at every trial; one that fails does not keep the others from being looked at."""
    known = _cursor(context.cursor)
    after: dict[str, Any] = {}
    events: list[dg.AssetMaterialization] = []
    said: list[str] = []
    absent = False
    for name, profile in profiles().items():
        before = known.get(name, {})
        if absent:  # asking again for each trial would only wait again
            after[name] = before
            continue
        try:
            watched, mark = _look(context.instance, profile, before, tables, registry, serving, alerts)
        except RegistryError as error:
            # the mark stays where it was: the next look sees the same and tries again
            context.log.warning("the champion of %s cannot be looked at: %s", name, error)
            after[name] = before
            absent = isinstance(error, RegistryUnavailableError)
            said.append(f"{name}: registry not available")
            continue
        after[name] = mark
        said.append(f"{name}: {watched.state}")
        if watched.state in ("rolled back", "kept"):
            result = outcome_materialization(name, watched)
            events.append(dg.AssetMaterialization(asset_key(OUTCOME), metadata=result.metadata))
    return dg.SensorResult(skip_reason=dg.SkipReason("; ".join(said)), cursor=json.dumps(after), asset_events=events)


def _look(
    instance: dg.DagsterInstance,
    profile: TrialProfile,
    before: dict[str, Any],
    tables: TableStore,
    registry: ModelRegistry,
    serving: ServingClient,
    alerts: Notifier,
) -> tuple[Watched, dict[str, Any]]:
    performance = newest_result(instance, asset_key(PERFORMANCE), profile.name)
    moment = None if performance is None else performance[1].isoformat()
    news = moment is not None and moment != before.get("performance_at")
    bounds, earlier = bounds_of(Variables()), _sample(before)
    watched = watch_champion(
        profile,
        registry=registry,
        serving=serving,
        tables=tables,
        alerts=alerts,
        bounds=bounds,
        performance=performance if news else None,
        earlier=earlier,
        always_ask=news,
    )
    mark = _next_mark(earlier, watched.sample, bounds.min_answers)
    return watched, {
        "sample": None if mark is None else mark.to_dict(),
        "performance_at": moment or before.get("performance_at"),
    }


def _next_mark(earlier: ServingSample | None, sample: ServingSample | None, min_answers: int) -> ServingSample | None:
    """Return what the next look compares with: `earlier` until enough answers came after it to be judged."""
    if sample is None or earlier is None:
        return sample or earlier
    other = sample.version != earlier.version or sample.answers < earlier.answers
    if other or sample.since(earlier).answers >= min_answers:
        return sample
    return replace(earlier, failing=sample.failing)


def _sample(before: dict[str, Any]) -> ServingSample | None:
    try:
        return ServingSample.from_dict(before["sample"]) if before.get("sample") else None
    except ValueError:
        return None  # a cursor of an earlier form


def _cursor(text: str | None) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(text) if text else {}
    except ValueError:
        return {}
    return {name: value for name, value in known.items() if isinstance(value, dict)} if isinstance(known, dict) else {}
