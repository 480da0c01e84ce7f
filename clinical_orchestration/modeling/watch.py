"""Is the champion that serves still within its bounds? What is measured goes in, the decision to roll back comes out.

Pure and monotone: fewer errors, less latency or a smaller live error never turn "stay" into "roll back". What was
measured on too few answers or outcomes decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clinical_orchestration.modeling.promotion import Check


@dataclass(frozen=True)
class WatchBounds:
    """When a champion is out of bounds (variables ``rollback_*``).

    Attributes:
        max_error_rate: share of model answers that failed.
        max_p95_seconds: 95th percentile of the time of a model call.
        min_answers: answers below which errors and latency decide nothing.
        max_auroc_drop, max_brier_rise: against the champion's own evaluation; the 95 % interval of the live figure
            must lie beyond.
        min_outcomes: predictions with known outcome below which the live error decides nothing.
    """

    max_error_rate: float = 0.05
    max_p95_seconds: float = 0.5
    min_answers: int = 50
    max_auroc_drop: float = 0.05
    max_brier_rise: float = 0.02
    min_outcomes: int = 100


@dataclass(frozen=True)
class ServingSample:
    """Counts of one model version since its server started, from the model server's metrics.

    Attributes:
        version: the version that serves.
        failing_version: whether a newer champion cannot be loaded.
        answers, failures: model answers, and those that failed.
        latency: upper bound of a bucket in seconds -> calls at most that long, cumulative.
    """

    version: str | None
    failing: bool
    answers: float
    failures: float
    latency: tuple[tuple[float, float], ...] = ()

    def since(self, earlier: ServingSample | None) -> ServingSample:
        """Return what was counted after `earlier`; all of it where the server or the version changed in between."""
        if earlier is None or earlier.version != self.version or earlier.answers > self.answers:
            return self
        before = dict(earlier.latency)
        return ServingSample(
            self.version,
            self.failing,
            self.answers - earlier.answers,
            max(0.0, self.failures - earlier.failures),
            tuple((bound, max(0.0, count - before.get(bound, 0.0))) for bound, count in self.latency),
        )

    def error_rate(self) -> float | None:
        """Return the share of answers that failed; None without answers."""
        return self.failures / self.answers if self.answers > 0 else None

    def p95_seconds(self) -> float | None:
        """Return the 95th percentile of a call's time, linear within its bucket; infinite beyond the last bucket."""
        buckets = sorted(self.latency)
        total = buckets[-1][1] if buckets else 0.0
        if total <= 0:
            return None
        wanted, lower, below = 0.95 * total, 0.0, 0.0
        for bound, count in buckets:
            if count >= wanted:
                if bound == float("inf"):
                    return bound
                return lower + (bound - lower) * (wanted - below) / max(count - below, 1e-12)
            lower, below = bound, count
        return float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Return the sample as JSON-ready values; :meth:`from_dict` reads it back."""
        latency = [[None if bound == float("inf") else bound, count] for bound, count in self.latency]
        return {**asdict(self), "latency": latency}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ServingSample:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: the data are no sample.
        """
        try:
            latency = tuple((float("inf") if bound is None else float(bound), float(n)) for bound, n in data["latency"])
            return cls(data["version"], bool(data["failing"]), float(data["answers"]), float(data["failures"]), latency)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no stored sample: {type(error).__name__}") from None


@dataclass(frozen=True)
class LiveError:
    """How the champion does on outcomes, beside its own evaluation; None where not determined.

    Attributes:
        rows: predictions with a known outcome.
        auroc_upper: upper end of the 95 % interval of the live AUROC.
        brier_lower: lower end of the 95 % interval of the live Brier score.
        baseline_auroc, baseline_brier: of the champion's evaluation.
    """

    rows: int
    auroc_upper: float | None = None
    brier_lower: float | None = None
    baseline_auroc: float | None = None
    baseline_brier: float | None = None


@dataclass(frozen=True)
class WatchDecision:
    """Whether the champion is out of bounds; `reasons` names each bound that is broken, `checks` all that were judged.

    Attributes:
        error_only: whether the error on outcomes is the only reason, which shows late and may be the data's fault: then
            the version before is asked about the same rows first.
    """

    out_of_bounds: bool
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    error_only: bool


_OUTCOMES = frozenset({"live_auroc", "live_brier"})


def judge(sample: ServingSample | None, live: LiveError | None, bounds: WatchBounds) -> WatchDecision:
    """Return whether the champion is out of bounds.

    Args:
        sample: what the model server counted since the last look; None where it does not answer, which says nothing
            about the model.
        live: what monitoring found on outcomes; None where nothing was found for this version.
        bounds: of the deployment.
    """
    checks: list[Check] = []
    if sample is not None:
        failing = 1.0 if sample.failing else 0.0
        checks.append(_at_most("loads", failing, 0.0, "the model server can load the champion"))
        if sample.answers >= bounds.min_answers:
            checks += [
                _at_most("error_rate", sample.error_rate(), bounds.max_error_rate, "share of failed answers"),
                _at_most("p95_seconds", sample.p95_seconds(), bounds.max_p95_seconds, "95th percentile of a call"),
            ]
    if live is not None and live.rows >= bounds.min_outcomes:
        if live.auroc_upper is not None and live.baseline_auroc is not None:
            bound = live.baseline_auroc - bounds.max_auroc_drop
            checks.append(
                Check("live_auroc", live.auroc_upper >= bound, live.auroc_upper, ">=", bound,
                      "AUROC on outcomes (upper end of its interval) against the evaluation less the allowed drop")
            )  # fmt: skip
        if live.brier_lower is not None and live.baseline_brier is not None:
            checks.append(
                _at_most("live_brier", live.brier_lower, live.baseline_brier + bounds.max_brier_rise,
                         "Brier score on outcomes (lower end of its interval) against the evaluation and allowed rise")
            )  # fmt: skip
    broken = [check for check in checks if not check.passed]
    return WatchDecision(
        out_of_bounds=bool(broken),
        reasons=tuple(_reason(check) for check in broken),
        checks=tuple(checks),
        error_only=bool(broken) and all(check.name in _OUTCOMES for check in broken),
    )


def live_error(performance: dict[str, Any] | None, version: str) -> LiveError | None:
    """Return the live error from the result of the step check_model_performance; None if it is about another version.

    Anything that is missing or of another kind counts as not determined.
    """
    if not performance or str(performance.get("model_version")) != str(version):
        return None
    if performance.get("status") == "insufficient_data":
        return None

    def figure(source: Any, name: str) -> float | None:
        value = source.get(name) if isinstance(source, dict) else None
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    rows = figure(performance, "rows")
    return LiveError(
        rows=int(rows or 0),
        auroc_upper=figure(performance.get("auroc"), "upper"),
        brier_lower=figure(performance.get("brier"), "lower"),
        baseline_auroc=figure(performance.get("baseline"), "auroc"),
        baseline_brier=figure(performance.get("baseline"), "brier"),
    )


def watch_table(checks: Sequence[Check]) -> list[tuple[str, str, str, str]]:
    """Return the checks as rows for people: what, value, bound, result."""
    return [
        (
            check.description,
            "not determined" if check.value is None else f"{check.value:.4f}",
            f"{check.comparison} {check.bound:.4f}",
            "within" if check.passed else "out of bounds",
        )
        for check in checks
    ]


def _at_most(name: str, value: float | None, bound: float, description: str) -> Check:
    # what could not be determined is no evidence against the champion
    return Check(name, value is None or value <= bound, value, "<=", bound, description)


def _reason(check: Check) -> str:
    if check.name == "loads":
        return "the model server cannot load it"
    return f"{check.name}: {check.value:.4f}, must be {check.comparison} {check.bound:.4f} ({check.description})"
