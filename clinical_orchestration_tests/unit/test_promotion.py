from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.modeling.promotion import Decision, decide
from clinical_orchestration.modeling.results import Estimate, Evaluation
from clinical_orchestration.trials import available_trials, load_trial
from clinical_orchestration.trials.profile import Promotion

RULE = Promotion(min_auroc=0.62, min_auprc_lift=1.2, max_calibration_error=0.12, max_auroc_drop=0.02)
UNKNOWN = Estimate(None)


def evaluation(
    auroc: float | None = 0.70, width: float = 0.04, *, lift: float = 1.6, prevalence: float = 0.25,
    ece: float | None = 0.03,
) -> Evaluation:  # fmt: skip
    area = UNKNOWN if auroc is None else Estimate(auroc, auroc - width, auroc + width)
    return Evaluation(
        rows=1900, subjects=240, events=475, prevalence=prevalence, auroc=area, auprc=Estimate(lift * prevalence),
        brier=Estimate(0.17), ece=Estimate(ece), calibration_slope=Estimate(1.0), calibration_intercept=Estimate(0.0),
        bins=(), operating_points=(), groups=(), seed=0, replicates=1000,
    )  # fmt: skip


def test_a_first_model_that_reaches_the_floors_is_promoted() -> None:
    decision = decide(evaluation(), None, RULE)
    assert decision.promote
    assert decision.reasons == ("first champion: every floor is reached",)
    assert [check.name for check in decision.checks] == [
        "auroc_floor", "auroc_better_than_chance", "auprc_lift_floor", "calibration_bound",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("candidate", "failed"),
    [
        (evaluation(0.61), ["auroc_floor"]),
        (evaluation(0.63, width=0.14), ["auroc_better_than_chance"]),
        (evaluation(lift=1.1), ["auprc_lift_floor"]),
        (evaluation(ece=0.13), ["calibration_bound"]),
        (evaluation(0.5, lift=1.0, ece=0.3),
         ["auroc_floor", "auroc_better_than_chance", "auprc_lift_floor", "calibration_bound"]),
        (evaluation(None), ["auroc_floor", "auroc_better_than_chance"]),
        (evaluation(ece=None), ["calibration_bound"]),
        (evaluation(float("nan")), ["auroc_floor", "auroc_better_than_chance"]),
        (replace(evaluation(), auroc=Estimate(0.7)), ["auroc_better_than_chance"]),
        (replace(evaluation(), auprc=UNKNOWN), ["auprc_lift_floor"]),
        (evaluation(prevalence=0.0), ["auprc_lift_floor"]),
    ],
)  # fmt: skip
def test_each_floor_refuses_and_says_so(candidate: Evaluation, failed: list[str]) -> None:
    decision = decide(candidate, None, RULE)
    assert not decision.promote
    assert [check.name for check in decision.checks if not check.passed] == failed
    assert [reason.split(":")[0] for reason in decision.reasons] == failed


@pytest.mark.parametrize(
    ("candidate", "champion", "failed"),
    [
        (evaluation(0.70), evaluation(0.70), []),  # equal
        (evaluation(0.75), evaluation(0.70), []),  # better
        (evaluation(0.685), evaluation(0.70), []),  # a little worse, within interval and allowed drop
        (evaluation(0.67), evaluation(0.70), ["auroc_drop"]),  # within a wide interval, but a large drop
        (
            evaluation(0.685),
            evaluation(0.70, width=0.005),
            ["auroc_within_champion_interval"],
        ),  # champion known precisely
        (evaluation(0.63), evaluation(0.70), ["auroc_within_champion_interval", "auroc_drop"]),
        (evaluation(0.685), replace(evaluation(0.70), auroc=Estimate(0.70)), ["auroc_within_champion_interval"]),
        (evaluation(0.65), evaluation(None), []),  # a champion nobody could measure holds nobody up
        (evaluation(0.61), evaluation(0.55), ["auroc_floor"]),  # better than a bad champion is not enough
    ],
)
def test_the_champion_is_not_replaced_by_something_worse(
    candidate: Evaluation, champion: Evaluation, failed: list[str]
) -> None:
    decision = decide(candidate, champion, RULE)
    assert decision.promote is not bool(failed)
    assert [check.name for check in decision.checks if not check.passed] == failed


@pytest.mark.parametrize(
    ("candidate", "promoted"),
    [(evaluation(0.62), True), (evaluation(lift=1.2), True), (evaluation(ece=0.12), True), (evaluation(0.6199), False)],
)
def test_bounds_belong_to_what_is_allowed(candidate: Evaluation, promoted: bool) -> None:
    assert decide(candidate, None, RULE).promote is promoted


shares = st.floats(0.01, 0.99)
evaluations = st.builds(
    evaluation, auroc=st.floats(0.3, 0.95), width=st.floats(0.0, 0.2), lift=st.floats(0.5, 3.0),
    prevalence=st.floats(0.05, 0.33), ece=st.floats(0.0, 0.3),
)  # fmt: skip
rules = st.builds(
    Promotion, min_auroc=st.floats(0.4, 0.9), min_auprc_lift=st.floats(0.8, 2.0),
    max_calibration_error=st.floats(0.01, 0.3), max_auroc_drop=st.floats(0.0, 0.1),
)  # fmt: skip


@given(candidate=evaluations, champion=st.none() | evaluations, rule=rules, gain=st.floats(0.0, 0.3), data=st.data())
def test_a_better_metric_never_turns_a_promotion_into_a_refusal(
    candidate: Evaluation, champion: Evaluation | None, rule: Promotion, gain: float, data: st.DataObject
) -> None:
    better = data.draw(
        st.sampled_from(
            [
                replace(candidate, auroc=_moved(candidate.auroc, gain)),
                replace(candidate, auroc=replace(candidate.auroc, lower=(candidate.auroc.lower or 0) + gain / 10)),
                replace(candidate, auprc=_moved(candidate.auprc, gain)),
                replace(candidate, ece=_moved(candidate.ece, -min(gain, candidate.ece.value or 0))),
                replace(candidate, brier=_moved(candidate.brier, -gain / 10)),
            ]
        )
    )
    before, after = decide(candidate, champion, rule), decide(better, champion, rule)
    assert after.promote or not before.promote
    for old, new in zip(before.checks, after.checks, strict=True):
        assert new.passed or not old.passed


@given(candidate=evaluations, champion=evaluations, rule=rules)
def test_a_champion_only_adds_conditions(candidate: Evaluation, champion: Evaluation, rule: Promotion) -> None:
    if decide(candidate, champion, rule).promote:
        assert decide(candidate, None, rule).promote


@given(candidate=evaluations, champion=st.none() | evaluations, rule=rules)
def test_the_decision_is_the_sum_of_its_checks_and_survives_storage(
    candidate: Evaluation, champion: Evaluation | None, rule: Promotion
) -> None:
    import json

    decision = decide(candidate, champion, rule)
    assert decision.promote is all(check.passed for check in decision.checks)
    assert decision.reasons
    assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision


def _moved(estimate: Estimate, by: float) -> Estimate:
    def add(value: float | None) -> float | None:
        return None if value is None else value + by

    return Estimate(add(estimate.value), add(estimate.lower), add(estimate.upper))


@pytest.mark.parametrize("trial", available_trials())
def test_no_profile_lets_a_model_without_skill_through(trial: str) -> None:
    rule: Any = load_trial(trial).promotion
    assert not decide(evaluation(0.5, lift=1.0), None, rule).promote
