"""Watching the champion that serves, and going back to the one before when it fails.

Errors and latency come from the model server's metrics, the error on outcomes from what monitoring found. Where only
the outcomes speak against it, the data may have changed for every model: then the version before answers the same rows
first, and nothing is rolled back to a version that does worse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clinical_orchestration.alerts.model import Alert, Notifier, Severity
from clinical_orchestration.modeling.promotion import Check
from clinical_orchestration.modeling.watch import ServingSample, WatchBounds, WatchDecision, judge, live_error
from clinical_orchestration.stores.registry import ROLLBACK_REASON_TAG, ModelVersionInfo, RegistryError
from clinical_orchestration.stores.serving import ServingUnavailableError
from clinical_orchestration.tables import PREDICTION_OUTCOMES, PREDICTIONS

if TYPE_CHECKING:
    from clinical_orchestration.settings import Variables
    from clinical_orchestration.stores.registry import ModelRegistry
    from clinical_orchestration.stores.serving import ServingClient
    from clinical_orchestration.stores.tables import TableStore
    from clinical_orchestration.trials import TrialProfile

SOURCE = "retraining/champion_watch"
_MOST_ROWS = 20_000  # outcomes that the version before is asked about, newest first
_MIN_ROWS = 50


@dataclass(frozen=True)
class Watched:
    """What a look at the champion found and did.

    Attributes:
        state: ``within bounds``, ``rolled back``, ``kept`` (out of bounds, but there is nothing better to go back to),
            ``unknown`` (nothing could be measured) or ``no champion``.
        version: the champion that was looked at.
        now: the champion afterwards.
        reasons: why.
        checks: what was judged.
        sample: what the model server counted, for the next look.
        note: what could not be looked at.
    """

    state: str
    version: str | None
    now: str | None
    reasons: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    sample: ServingSample | None = field(default=None, repr=False)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {
            "state": self.state,
            "version": self.version,
            "champion": self.now,
            "rolled_back": self.state == "rolled back",
            "reasons": list(self.reasons),
            "note": self.note,
        }


def bounds_of(variables: Variables) -> WatchBounds:
    """Return the bounds that the platform's variables set."""
    return WatchBounds(
        max_error_rate=variables.rollback_max_error_rate,
        max_p95_seconds=variables.rollback_max_p95_seconds,
        min_answers=variables.rollback_min_answers,
        max_auroc_drop=variables.rollback_max_auroc_drop,
        max_brier_rise=variables.rollback_max_brier_rise,
        min_outcomes=variables.rollback_min_outcomes,
    )


def rollback_key(trial: str) -> str:
    """Return the key of the alert about a rolled back champion."""
    return f"champion_rolled_back:{trial}"


def out_of_bounds_key(trial: str) -> str:
    """Return the key of the alert about a champion that fails and cannot be replaced."""
    return f"champion_out_of_bounds:{trial}"


def watch_champion(
    profile: TrialProfile,
    *,
    registry: ModelRegistry,
    serving: ServingClient,
    tables: TableStore,
    alerts: Notifier,
    bounds: WatchBounds,
    model_name: str | None = None,
    performance: tuple[dict[str, Any], datetime] | None = None,
    earlier: ServingSample | None = None,
    always_ask: bool = False,
) -> Watched:
    """Look at a trial's champion once, and roll it back where it is out of bounds.

    Calling it again is harmless: it acts on the champion of the moment only, and finishes a rollback that stopped
    half-way.

    Args:
        profile: the trial.
        registry: where champions are; asked only where something is wrong, or `always_ask`.
        serving: the model server.
        tables: for what it predicted and what then happened.
        alerts: told about what is done.
        bounds: of the deployment.
        model_name: registered model; default: the profile's.
        performance: newest result of monitoring and its time.
        earlier: what the model server had counted at the look before: only what came after is judged.
        always_ask: ask the registry even where nothing is wrong.

    Raises:
        RegistryError: the registry does not answer, or refuses; the next look tries again.
    """
    name = model_name or profile.model_name
    sample, note = _sample(serving, profile.name)
    served = sample.version if sample is not None else None
    live = None if performance is None else live_error(performance[0], served or _version_of(performance[0]) or "")
    recent = None if sample is None else sample.since(earlier)
    if recent is not None and recent.failing and not (earlier is not None and earlier.failing):
        # a champion that cannot be loaded is tried again by the server: one bad moment decides nothing
        recent = ServingSample(recent.version, False, recent.answers, recent.failures, recent.latency)
    decision = judge(recent, live, bounds)
    state = "within bounds" if decision.checks else "unknown"
    if decision.checks and not decision.out_of_bounds:
        alerts.resolve(out_of_bounds_key(profile.name), "the champion is within its bounds again")
    if not decision.out_of_bounds and not always_ask:
        return Watched(state, served, served, checks=decision.checks, sample=sample, note=note)
    champion = registry.champion(name)
    if champion is None:
        return Watched("no champion", None, None, sample=sample, note=note)
    reasons = _reasons(champion, decision, served, performance)
    if champion.rolled_back:  # a rollback stopped half-way
        reasons = (champion.tags.get(ROLLBACK_REASON_TAG) or "it was to be rolled back",)
    if not reasons:
        return Watched(state, champion.version, champion.version, checks=decision.checks, sample=sample, note=note)
    target = registry.rollback_target(name, champion.version)
    veto = ""
    if target is None:
        veto = "there is no version to go back to"
    elif decision.error_only and not champion.rolled_back:
        veto = _veto(registry, tables, profile, champion, target)
    what = "; ".join(reasons)
    if veto:
        alerts.send(
            Alert(
                key=out_of_bounds_key(profile.name),
                severity=Severity.ERROR,
                title=f"Champion {champion.version} of {name} is out of bounds and stays",
                what=f"{what}. It is not rolled back: {veto}.",
                where="/dagster/assets/retraining/outcome",
                action="Look at the monitoring report; start scheduled_retraining, or promote another version by hand.",
                source=SOURCE,
                trial=profile.name,
            )
        )
        return Watched("kept", champion.version, champion.version, (*reasons, veto), decision.checks, sample, note)
    try:
        restored = registry.roll_back(name, champion.version, what)
    except RegistryError:
        present = registry.champion(name)
        if present is not None and present.version == champion.version:
            raise
        # somebody else, such as the sensor beside a run, was faster: the next look is about another champion
        now = None if present is None else present.version
        moved = "the champion was moved by somebody else at the same moment"
        return Watched("within bounds", now, now, checks=decision.checks, sample=sample, note=moved)
    now = champion.version if restored is None else restored.version
    alerts.send(
        Alert(
            key=rollback_key(profile.name),
            severity=Severity.ERROR,
            title=f"Champion {champion.version} of {name} was rolled back to {now}",
            what=what,
            where="/dagster/assets/retraining/outcome",
            action=f"Nothing is urgent: version {now} serves. Find out why before another version is trained.",
            source=SOURCE,
            trial=profile.name,
            details={"rolled_back": champion.version, "champion": now},
        )
    )
    alerts.resolve(out_of_bounds_key(profile.name), f"version {champion.version} was rolled back")
    return Watched("rolled back", champion.version, now, reasons, decision.checks, sample, note)


def _reasons(
    champion: ModelVersionInfo,
    decision: WatchDecision,
    served: str | None,
    performance: tuple[dict[str, Any], datetime] | None,
) -> tuple[str, ...]:
    """Return those reasons that concern the present champion."""
    broken = [check for check in decision.checks if not check.passed]
    reasons = []
    for check, reason in zip(broken, decision.reasons, strict=True):
        if check.name == "loads":
            concerns = served != champion.version
        elif check.name.startswith("live_"):
            judged = _version_of(performance[0]) if performance else None
            # what was found before it (last) became champion was answered already
            after = performance is None or champion.promoted_at is None or performance[1] >= champion.promoted_at
            concerns = judged == champion.version and after
        else:
            concerns = served == champion.version
        if concerns:
            reasons.append(reason)
    return tuple(reasons)


def _version_of(performance: dict[str, Any]) -> str | None:
    version = performance.get("model_version")
    return None if version is None else str(version)


def _sample(serving: ServingClient, trial: str) -> tuple[ServingSample | None, str]:
    try:
        return serving.sample(trial), ""
    except ServingUnavailableError as error:
        return None, str(error)


def _veto(
    registry: ModelRegistry, tables: TableStore, profile: TrialProfile, champion: ModelVersionInfo,
    target: ModelVersionInfo,
) -> str:  # fmt: skip
    """Return why going back to `target` would not help; "" where it would, or where that cannot be told."""
    import numpy as np

    from clinical_orchestration.modeling.compare import compare
    from clinical_orchestration.modeling.evaluate import EvaluationError

    try:
        rows = judged_rows(tables, profile.name, champion.version)
        if rows is None:
            return ""
        labels, probabilities, subjects, features = rows
        model = registry.load_model(target.name, target.version)
        matrix = np.array(
            [[_number(values.get(name)) for name in model.feature_names] for values in features], dtype=np.float64
        )
        gains = compare(labels, model.probabilities(matrix), probabilities, subjects, seed=0, replicates=200).gains
    except (EvaluationError, RegistryError, ValueError):
        return ""
    better = [name for name, gain in gains.items() if gain.gain.value is not None and gain.gain.value < 0]
    if better:
        return ""
    return (
        f"version {target.version} does no better on the same {len(labels):,} predictions "
        f"(AUROC {gains['auroc'].champion}, Brier score {gains['brier'].champion})"
    )


def judged_rows(
    tables: TableStore, trial: str, version: str
) -> tuple[list[int], list[float], list[str], list[dict[str, Any]]] | None:
    """Return labels, probabilities, subjects and features of a version's newest predictions with a known outcome.

    None where there are fewer than 50.
    """
    import orjson

    where = [("trial", "=", trial), ("model_version", "=", version)]
    outcomes = tables.read(
        PREDICTION_OUTCOMES, columns=["prediction_id", "patient_id", "probability", "outcome"], filters=where
    ).to_pylist()
    found = {row["prediction_id"]: row for row in outcomes if row["outcome"] is not None and row["patient_id"]}
    if len(found) < _MIN_ROWS:
        return None
    predictions = tables.read(
        PREDICTIONS, columns=["prediction_id", "predicted_at", "features"], filters=where
    ).to_pylist()
    known = [row for row in predictions if row["prediction_id"] in found and row["features"]]
    known.sort(key=lambda row: row["predicted_at"] or datetime.min.replace(tzinfo=UTC), reverse=True)
    known = known[:_MOST_ROWS]
    if len(known) < _MIN_ROWS:
        return None
    rows = [found[row["prediction_id"]] for row in known]
    return (
        [int(row["outcome"]) for row in rows],
        [float(row["probability"]) for row in rows],
        [str(row["patient_id"]) for row in rows],
        [dict(orjson.loads(row["features"])) for row in known],
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
