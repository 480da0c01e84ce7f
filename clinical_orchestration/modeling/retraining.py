"""When a model is trained anew: facts about the champion and its data in, a decision with its conditions out.

Pure and monotone: an older champion, more new rows, more drift or worse performance never turn "retrain" into "skip".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """When a condition is met.

    Attributes:
        interval_days: age of the champion from which it is trained anew (variable model_retraining_interval_days).
        min_new_share: new labelled rows, as a share of those that the champion was trained on.
        min_new_rows: and at least so many of them.
    """

    interval_days: float
    min_new_share: float
    min_new_rows: int = 30


@dataclass(frozen=True)
class Facts:
    """What is known; None where it is not.

    Attributes:
        rows: labelled rows that could be trained on now.
        champion_version: version in the registry; None where there is no champion.
        champion_age_days: days since the champion was trained.
        champion_rows: labelled rows that the champion was trained on.
        rows_changed: whether the tables that training reads changed since the champion was trained.
        data_drift, concept_drift: status that monitoring found for this champion (``drift``, ``stable``, ...).
        drifted_share: share of drifted features.
        performance: status that monitoring found for this champion (``ok``, ``degraded``, ...).
        performance_drop: drop of AUROC below the champion's evaluation.
        requested: why somebody or a sensor asks for it; empty where nobody does.
        forced: whether the run was told to retrain whatever the conditions say.
    """

    rows: int
    champion_version: str | None = None
    champion_age_days: float | None = None
    champion_rows: int | None = None
    rows_changed: bool = True
    data_drift: str | None = None
    drifted_share: float | None = None
    concept_drift: str | None = None
    performance: str | None = None
    performance_drop: float | None = None
    requested: str = ""
    forced: bool = False


@dataclass(frozen=True)
class Condition:
    """One condition: met or not, the value it looked at and the bound, as JSON-ready values."""

    name: str
    met: bool
    value: float | str | None
    bound: float | str | None
    description: str


@dataclass(frozen=True)
class RetrainingDecision:
    """Whether to retrain, why, and every condition that was looked at."""

    retrain: bool
    reasons: tuple[str, ...]
    conditions: tuple[Condition, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as JSON-ready values."""
        return {
            "retrain": self.retrain,
            "reasons": list(self.reasons),
            "conditions": [asdict(condition) for condition in self.conditions],
        }


def decide_retraining(facts: Facts, bounds: Bounds) -> RetrainingDecision:
    """Return whether to retrain: some condition is met, and there are rows to train on.

    Conditions: it is forced or requested; there is no champion; enough new labelled rows; the champion is old and its
    tables have changed (the same rows would give the same model); data drift; concept drift; degraded performance.
    """
    conditions = (
        Condition("forced", facts.forced, str(facts.forced).lower(), "true", "the run was told to retrain"),
        Condition("requested", bool(facts.requested), facts.requested or None, None, "a sensor or a person asks"),
        Condition("no_champion", facts.champion_version is None, facts.champion_version, None, "there is no champion"),
        _new_data(facts, bounds),
        _age(facts, bounds),
        Condition(
            "data_drift", facts.data_drift == "drift", facts.data_drift, "drift",
            "the features of new rows differ from those that the champion was trained on"
            + ("" if facts.drifted_share is None else f" ({facts.drifted_share:.0%} of the features)"),
        ),
        Condition(
            "concept_drift", facts.concept_drift == "drift", facts.concept_drift, "drift",
            "the champion's errors changed over time",
        ),
        Condition(
            "performance", facts.performance == "degraded", facts.performance, "degraded",
            "the champion does worse on outcomes than in its evaluation"
            + ("" if facts.performance_drop is None else f" (drop {facts.performance_drop:.3f})"),
        ),
    )  # fmt: skip
    if facts.rows <= 0:
        why = "there are no labelled rows to train on yet: run clinical_data_pipeline first"
        return RetrainingDecision(False, (why,), conditions)
    met = [condition for condition in conditions if condition.met]
    if not met:
        return RetrainingDecision(False, ("no condition is met: the champion stays as it is",), conditions)
    return RetrainingDecision(True, tuple(_reason(condition) for condition in met), conditions)


def _new_data(facts: Facts, bounds: Bounds) -> Condition:
    description = "labelled rows that the champion was not trained on"
    if not facts.champion_rows:
        return Condition("new_data", False, None, bounds.min_new_share, f"{description}: not known")
    new = facts.rows - facts.champion_rows
    share = new / facts.champion_rows
    met = share >= bounds.min_new_share and new >= bounds.min_new_rows
    return Condition(
        "new_data", met, round(share, 4), bounds.min_new_share,
        f"{description}: {new:,} beside {facts.champion_rows:,}, at least {bounds.min_new_rows} needed",
    )  # fmt: skip


def _age(facts: Facts, bounds: Bounds) -> Condition:
    age = facts.champion_age_days
    old = age is not None and age >= bounds.interval_days
    description = "days since the champion was trained"
    if old and not facts.rows_changed:
        description += "; its tables have not changed since, so the same model would result"
    return Condition(
        "age", old and facts.rows_changed, None if age is None else round(age, 3), bounds.interval_days, description
    )


def _reason(condition: Condition) -> str:
    value = condition.value
    if condition.name in ("forced", "no_champion"):
        return condition.description
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    bound = "" if condition.bound in (None, value) else f", bound {condition.bound:g}" if isinstance(
        condition.bound, (int, float)
    ) else f", bound {condition.bound}"  # fmt: skip
    return f"{condition.name}: {shown}{bound} ({condition.description})"
