"""The promotion rule: may a candidate become the champion that serving uses?

Pure and monotone: a better metric never turns a promotion into a refusal. Two forms:

- :func:`decide` compares stored evaluations. Both come from cross-validation grouped by subject on the training set of
  their time, so they estimate the same quantity on possibly different rows.
- :func:`decide_paired` has both models' answers to the same held-out rows, and uses the interval of the difference.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clinical_orchestration.modeling.compare import Comparison
    from clinical_orchestration.modeling.results import Estimate, Evaluation
    from clinical_orchestration.trials.profile import Promotion

CHANCE = 0.5


@dataclass(frozen=True)
class Check:
    """One condition of the rule: `value` compared with `bound`; None means not determined, which fails."""

    name: str
    passed: bool
    value: float | None
    comparison: str
    bound: float | None
    description: str


@dataclass(frozen=True)
class Decision:
    """The outcome: `reasons` says what failed, or why it passed, in words.

    Attributes:
        promote: may become the champion.
        challenger: not promoted, but good enough to wait beside the champion: no harm is shown, and no benefit.
    """

    promote: bool
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    challenger: bool = False

    @property
    def outcome(self) -> str:
        """``promote``, ``challenger`` or ``refuse``."""
        if self.promote:
            return "promote"
        return "challenger" if self.challenger else "refuse"

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as JSON-ready values; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Decision:
        """Read what :meth:`to_dict` wrote."""
        checks = tuple(Check(**item) for item in data["checks"])
        return cls(bool(data["promote"]), tuple(data["reasons"]), checks, bool(data.get("challenger", False)))


def decide(candidate: Evaluation, champion: Evaluation | None, rule: Promotion) -> Decision:
    """Return whether `candidate` may replace `champion` (None: there is none yet).

    All of these must hold:

    - AUROC is at least ``rule.min_auroc``, and its interval lies above 0.5: skill is shown, not luck;
    - AUPRC divided by prevalence is at least ``rule.min_auprc_lift``;
    - the expected calibration error is at most ``rule.max_calibration_error``;
    - with a champion: AUROC is not below the champion's interval, and not more than ``rule.max_auroc_drop`` below its
      value. The first guards where the champion is known precisely, the second where its interval is wide.
    """
    auroc = _finite(candidate.auroc.value)
    checks = _floors(candidate, rule)
    if champion is not None:
        best = _finite(champion.auroc.value)
        if best is not None:
            checks += [
                _at_least(
                    "auroc_within_champion_interval", auroc, _lower(champion.auroc, best),
                    "AUROC is not below the champion's interval",
                ),
                _at_least(
                    "auroc_drop", auroc, best - rule.max_auroc_drop, "AUROC is not far below the champion's",
                ),
            ]  # fmt: skip
    failed = [check for check in checks if not check.passed]
    if failed:
        return Decision(False, tuple(_reason(check) for check in failed), tuple(checks))
    why = (
        "first champion: every floor is reached"
        if champion is None
        else "every floor is reached; not worse than the champion"
    )
    return Decision(True, (why,), tuple(checks))


def decide_paired(candidate: Evaluation, comparison: Comparison | None, rule: Promotion) -> Decision:
    """Return whether `candidate` may replace a champion with which it was compared on the same held-out rows.

    All of these must hold, else it is refused:

    - the floors of :func:`decide`, on the candidate's out-of-fold evaluation;
    - no harm is shown: for AUROC, AUPRC and Brier score the interval of the gain reaches 0 or above;
    - AUROC is not more than ``rule.max_auroc_drop`` below the champion's, however wide the interval.

    It is promoted where in addition a benefit is shown: for at least one of the three metrics the interval of the gain
    lies above 0. Without one it may wait as ``challenger``: a champion in use is not replaced for nothing.

    Args:
        candidate: evaluation on subjects that its models never saw.
        comparison: None where there is no champion yet: then the floors alone decide.
        rule: the trial's bounds.
    """
    checks = _floors(candidate, rule)
    benefits: list[Check] = []
    if comparison is not None:
        for name, gain in comparison.gains.items():
            title = {"auroc": "AUROC", "auprc": "AUPRC", "brier": "Brier score"}.get(name, name)
            checks.append(
                _at_least(f"{name}_no_harm", _finite(gain.gain.upper), 0.0, f"{title} is not shown to be worse")
            )
            benefits.append(_above(f"{name}_benefit", _finite(gain.gain.lower), 0.0, f"{title} is shown to be better"))
        drop = _finite(comparison.gains["auroc"].gain.value)
        checks.append(_at_least("auroc_drop", drop, -rule.max_auroc_drop, "AUROC is not far below the champion's"))
    failed = [check for check in checks if not check.passed]
    everything = (*checks, *benefits)
    if failed:
        return Decision(False, tuple(_reason(check) for check in failed), everything)
    if comparison is None:
        return Decision(True, ("first champion: every floor is reached",), everything)
    shown = [check for check in benefits if check.passed]
    if not shown:
        why = "no worse than the champion, but no benefit is shown on the held-out subjects"
        return Decision(False, (why,), everything, challenger=True)
    return Decision(True, tuple(f"{check.description} on the held-out subjects" for check in shown), everything)


def _floors(candidate: Evaluation, rule: Promotion) -> list[Check]:
    return [
        _at_least("auroc_floor", _finite(candidate.auroc.value), rule.min_auroc, "AUROC reaches the trial's floor"),
        _above("auroc_better_than_chance", _finite(candidate.auroc.lower), CHANCE, "AUROC's interval excludes chance"),
        _at_least(
            "auprc_lift_floor", _finite(candidate.auprc_lift), rule.min_auprc_lift,
            "AUPRC divided by prevalence reaches the trial's floor",
        ),
        _at_most(
            "calibration_bound", _finite(candidate.ece.value), rule.max_calibration_error,
            "expected calibration error is within the trial's bound",
        ),
    ]  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _lower(estimate: Estimate, value: float) -> float:
    lower = _finite(estimate.lower)
    return value if lower is None else lower


def _at_least(name: str, value: float | None, bound: float, description: str) -> Check:
    return Check(name, value is not None and value >= bound, value, ">=", bound, description)


def _above(name: str, value: float | None, bound: float, description: str) -> Check:
    return Check(name, value is not None and value > bound, value, ">", bound, description)


def _at_most(name: str, value: float | None, bound: float, description: str) -> Check:
    return Check(name, value is not None and value <= bound, value, "<=", bound, description)


def _reason(check: Check) -> str:
    value = "not determined" if check.value is None else f"{check.value:.4f}"
    return f"{check.name}: {value}, must be {check.comparison} {check.bound:.4f} ({check.description})"
