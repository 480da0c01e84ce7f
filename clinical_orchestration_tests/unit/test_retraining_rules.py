"""The rules of retraining: conditions, held-out subjects, paired decision and the watch, with their monotony."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration.modeling.compare import Comparison, Gain, compare, newer_rows
from clinical_orchestration.modeling.evaluate import EvaluationError
from clinical_orchestration.modeling.holdout import held_out_subjects, is_held_out
from clinical_orchestration.modeling.promotion import Decision, decide_paired
from clinical_orchestration.modeling.results import Estimate, Evaluation
from clinical_orchestration.modeling.retraining import Bounds, Facts, decide_retraining
from clinical_orchestration.modeling.watch import LiveError, ServingSample, WatchBounds, judge, live_error
from clinical_orchestration.trials.profile import Promotion

BOUNDS = Bounds(interval_days=7, min_new_share=0.1)
QUIET = Facts(rows=1000, champion_version="3", champion_age_days=2.0, champion_rows=1000, performance="ok",
              data_drift="stable", concept_drift="none")  # fmt: skip
RULE = Promotion(min_auroc=0.62, min_auprc_lift=1.2, max_calibration_error=0.12, max_auroc_drop=0.02)
WATCH = WatchBounds()


# --------------------------------------------------------------------------------------------------------- conditions


def test_nothing_met_keeps_the_champion() -> None:
    decision = decide_retraining(QUIET, BOUNDS)
    assert not decision.retrain
    assert not any(condition.met for condition in decision.conditions)
    assert decision.to_dict()["reasons"] == ["no condition is met: the champion stays as it is"]


@pytest.mark.parametrize(
    ("change", "met"),
    [
        ({"forced": True}, ["forced"]),
        ({"requested": "model_performance_sensor: trend"}, ["requested"]),
        ({"champion_version": None, "champion_rows": None, "champion_age_days": None}, ["no_champion"]),
        ({"rows": 1100}, ["new_data"]),
        ({"rows": 1099}, []),
        ({"rows": 115, "champion_rows": 100}, []),  # a large share of few rows is still few
        ({"champion_age_days": 7.0}, ["age"]),
        ({"champion_age_days": 700.0, "rows_changed": False}, []),
        ({"data_drift": "drift", "drifted_share": 0.4}, ["data_drift"]),
        ({"data_drift": "insufficient_data"}, []),
        ({"concept_drift": "drift"}, ["concept_drift"]),
        ({"performance": "degraded", "performance_drop": 0.11}, ["performance"]),
        ({"performance": "insufficient_data"}, []),
    ],
)
def test_each_condition(change: dict[str, Any], met: list[str]) -> None:
    decision = decide_retraining(replace(QUIET, **change), BOUNDS)
    assert [condition.name for condition in decision.conditions if condition.met] == met
    assert decision.retrain is bool(met)
    assert len(decision.reasons) == max(1, len(met))


def test_without_rows_nothing_is_trained_even_by_force() -> None:
    decision = decide_retraining(replace(QUIET, rows=0, forced=True, champion_version=None), BOUNDS)
    assert not decision.retrain
    assert "clinical_data_pipeline" in decision.reasons[0]


facts = st.builds(
    Facts,
    rows=st.integers(1, 5000),
    champion_version=st.sampled_from([None, "1"]),
    champion_age_days=st.none() | st.floats(0, 100),
    champion_rows=st.none() | st.integers(0, 5000),
    rows_changed=st.booleans(),
    data_drift=st.sampled_from([None, "stable", "drift", "insufficient_data"]),
    concept_drift=st.sampled_from([None, "none", "drift"]),
    performance=st.sampled_from([None, "ok", "degraded"]),
    requested=st.sampled_from(["", "asked"]),
    forced=st.booleans(),
)
worse = st.fixed_dictionaries(
    {},
    optional={
        "rows": st.integers(0, 3000), "champion_age_days": st.floats(0, 100), "rows_changed": st.just(True),
        "data_drift": st.just("drift"), "concept_drift": st.just("drift"), "performance": st.just("degraded"),
        "requested": st.just("asked"), "forced": st.just(True),
    },
)  # fmt: skip


@given(facts, worse)
def test_more_reasons_never_stop_a_retraining(before: Facts, change: dict[str, Any]) -> None:
    more = dict(change)
    if "rows" in more:
        more["rows"] += before.rows
    if "champion_age_days" in more:
        more["champion_age_days"] += before.champion_age_days or 0.0
    after = replace(before, **more)
    assert decide_retraining(before, BOUNDS).retrain <= decide_retraining(after, BOUNDS).retrain


# ------------------------------------------------------------------------------------------------------ held-out set


@given(st.sets(st.text(min_size=1, max_size=8), max_size=30), st.sets(st.text(min_size=1, max_size=8), max_size=30),
       st.floats(0.05, 0.6), st.integers(0, 10))  # fmt: skip
def test_new_subjects_move_nobody_between_the_parts(old: set[str], new: set[str], share: float, seed: int) -> None:
    before = held_out_subjects("trial", old, share=share, seed=seed)
    after = held_out_subjects("trial", old | new, share=share, seed=seed)
    assert after & old == before
    assert before <= old


def test_the_share_is_kept_and_seeds_differ() -> None:
    people = [f"01-{number}" for number in range(4000)]
    sets = [held_out_subjects("trial", people, share=0.25, seed=seed) for seed in (1, 2)]
    assert all(0.22 < len(found) / 4000 < 0.28 for found in sets)
    assert len(sets[0] & sets[1]) < 0.1 * 4000
    assert {is_held_out("a", p, share=0.25, seed=1) for p in people} == {True, False}


# ------------------------------------------------------------------------------------------------- paired comparison


def population(seed: int, subjects: int = 80, visits: int = 6) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    subject = np.repeat(np.arange(subjects), visits)
    log_odds = rng.normal(size=len(subject)) * 1.5 + rng.normal(size=subjects)[subject] - 0.8
    truth = 1 / (1 + np.exp(-log_odds))
    return (rng.random(len(subject)) < truth).astype(int), truth, subject


def test_equal_models_gain_exactly_nothing() -> None:
    labels, truth, subjects = population(1)
    found = compare(labels, truth, truth, subjects, replicates=100)
    assert all(gain.gain == Estimate(0.0, 0.0, 0.0) for gain in found.gains.values())


def test_the_paired_interval_is_narrower_than_each_model_alone() -> None:
    labels, truth, subjects = population(2)
    rng = np.random.default_rng(0)
    noisy = np.clip(truth + rng.normal(scale=0.05, size=len(truth)), 0.01, 0.99)
    gain = compare(labels, noisy, truth, subjects, replicates=300).gains["auroc"]
    widths = [float(e.upper or 0) - float(e.lower or 0) for e in (gain.champion, gain.challenger, gain.gain)]
    assert widths[2] < 0.5 * min(widths[:2])


def test_gains_swap_sign_with_the_models_and_come_back_from_json() -> None:
    labels, truth, subjects = population(3)
    poor = np.full(len(truth), 0.4)
    better, worse_ = compare(labels, poor, truth, subjects), compare(labels, truth, poor, subjects)
    for name in ("auroc", "auprc", "brier"):
        assert (better.gains[name].gain.lower or -1) > 0
        assert better.gains[name].gain.value == pytest.approx(-(worse_.gains[name].gain.value or 0))
    assert Comparison.from_dict(better.to_dict()) == better
    assert better.metrics()["comparison/brier/gain"] > 0
    with pytest.raises(ValueError, match="no stored comparison"):
        Comparison.from_dict({"gains": {"auroc": 1}})


def test_newer_rows_decide_alone_once_there_are_enough_of_them() -> None:
    begin = datetime(2025, 1, 1, tzinfo=UTC)
    times = [begin + timedelta(days=day) for day in range(10) for _ in range(40)]
    subjects = [f"s{number}" for _ in range(10) for number in range(40)]
    labels = [int(number % 4 == 0) for number in range(400)]
    newer = newer_rows(times, begin + timedelta(days=6), labels, subjects)
    assert newer is not None
    assert newer.tolist() == [False] * 280 + [True] * 120
    assert newer_rows(times, None, labels, subjects) is None, "the champion's rows are not known"
    assert newer_rows(times, begin + timedelta(days=7), labels, subjects) is None, "too few rows"
    assert newer_rows(times, begin + timedelta(days=6), [0] * 400, subjects) is None, "no event"
    assert newer_rows(times, begin + timedelta(days=6), labels, ["s1", "s2"] * 200) is None, "too few subjects"
    assert newer_rows(times, begin + timedelta(days=20), labels, subjects) is None, "none at all"


def test_one_outcome_only_cannot_be_compared() -> None:
    with pytest.raises(EvaluationError):
        compare([0, 0, 0], [0.1] * 3, [0.2] * 3, ["a", "b", "c"])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_equally_good_models_are_rarely_told_apart_and_never_as_harm_and_benefit(seed: int) -> None:
    labels, truth, subjects = population(seed)
    rng = np.random.default_rng(seed)
    one, two = (np.clip(truth + rng.normal(scale=0.05, size=len(truth)), 0, 1) for _ in range(2))
    for gain in compare(labels, one, two, subjects, replicates=100).gains.values():
        assert gain.gain.lower is not None
        assert gain.gain.upper is not None
        assert gain.gain.lower <= (gain.gain.value or 0) <= gain.gain.upper


# --------------------------------------------------------------------------------------------------- paired decision


def good(auroc: float = 0.7, ece: float = 0.03) -> Evaluation:
    return Evaluation(
        rows=1900, subjects=240, events=475, prevalence=0.25, auroc=Estimate(auroc, auroc - 0.04, auroc + 0.04),
        auprc=Estimate(0.4), brier=Estimate(0.17), ece=Estimate(ece), calibration_slope=Estimate(1.0),
        calibration_intercept=Estimate(0.0), bins=(), operating_points=(), groups=(), seed=0, replicates=1000,
    )  # fmt: skip


def comparison(**gains: tuple[float | None, float | None, float | None]) -> Comparison:
    zero = (0.0, -0.01, 0.01)
    return Comparison(
        400, 60, 90,
        {name: Gain(Estimate(0.6), Estimate(0.6), Estimate(*gains.get(name, zero)))
         for name in ("auroc", "auprc", "brier")},
        False, "", 0, 100,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("candidate", "found", "outcome"),
    [
        (good(), None, "promote"),
        (good(0.55), None, "refuse"),
        (good(), comparison(), "challenger"),
        (good(), comparison(auroc=(0.03, 0.01, 0.05)), "promote"),
        (good(), comparison(brier=(0.01, 0.002, 0.02)), "promote"),
        (good(), comparison(auroc=(0.03, -0.001, 0.06)), "challenger"),  # better by luck, perhaps
        (good(), comparison(auroc=(-0.03, -0.05, -0.01)), "refuse"),
        (good(), comparison(auroc=(0.03, 0.01, 0.05), brier=(-0.01, -0.02, -0.001)), "refuse"),  # worse calibrated
        (good(), comparison(auroc=(-0.03, -0.08, 0.02)), "refuse"),  # far below, however wide the interval
        (good(), comparison(auroc=(None, None, None)), "refuse"),
        (good(ece=0.3), comparison(auroc=(0.1, 0.05, 0.2)), "refuse"),  # better than a bad champion is not enough
    ],
)
def test_paired_decision(candidate: Evaluation, found: Comparison | None, outcome: str) -> None:
    decision = decide_paired(candidate, found, RULE)
    assert decision.outcome == outcome
    assert decision.reasons
    assert Decision.from_dict(decision.to_dict()).outcome == outcome


def test_decisions_stored_before_challengers_existed_are_read() -> None:
    assert Decision.from_dict({"promote": True, "reasons": ["r"], "checks": []}).outcome == "promote"


shift = st.floats(0, 0.2)
interval = st.tuples(st.floats(-0.1, 0.1), st.floats(0, 0.1), st.floats(0, 0.1)).map(
    lambda t: (t[0], t[0] - t[1], t[0] + t[2])
)
RANK = {"refuse": 0, "challenger": 1, "promote": 2}


@given(interval, interval, interval, st.tuples(shift, shift, shift), st.floats(0.5, 0.9), st.floats(0, 0.09))
def test_a_better_challenger_is_never_treated_worse(
    auroc: Any, auprc: Any, brier: Any, shifts: tuple[float, float, float], area: float, better_by: float
) -> None:
    before = {"auroc": auroc, "auprc": auprc, "brier": brier}
    after = {name: tuple(v + by for v in values) for (name, values), by in zip(before.items(), shifts, strict=True)}
    was = decide_paired(good(area), comparison(**before), RULE).outcome
    now = decide_paired(good(area + better_by), comparison(**after), RULE).outcome
    assert RANK[now] >= RANK[was]


@pytest.mark.parametrize("seed", range(8))
def test_a_model_of_shuffled_labels_is_refused_even_if_its_own_evaluation_were_good(seed: int) -> None:
    """The comparison on held-out subjects alone keeps it back; the floors would do so too."""
    from sklearn.linear_model import LogisticRegression

    from clinical_orchestration_tests.modeling_frames import training_frame

    frame = training_frame(80, 8, seed=seed)
    held = np.array([is_held_out("t", p, share=0.3, seed=seed) for p in frame["patient_id"]])
    x, y = frame.select("risk", "noise_1", "noise_2").to_numpy(), frame["label"].to_numpy()
    shuffled = np.random.default_rng(seed).permutation(y[~held])
    champion = LogisticRegression().fit(x[~held], y[~held]).predict_proba(x[held])[:, 1]
    challenger = LogisticRegression().fit(x[~held], shuffled).predict_proba(x[held])[:, 1]
    found = compare(y[held], champion, challenger, frame["patient_id"].to_numpy()[held], replicates=200)
    assert decide_paired(good(0.9), found, RULE).outcome == "refuse"


# -------------------------------------------------------------------------------------------------------------- watch


def sample(answers: float = 1000, failures: float = 0, slow: float = 0, **changes: Any) -> ServingSample:
    latency = ((0.01, answers - slow), (0.1, answers - slow), (1.0, answers), (math.inf, answers))
    return replace(ServingSample("3", False, answers, failures, latency), **changes)


@pytest.mark.parametrize(
    ("seen", "live", "names"),
    [
        (sample(), None, []),
        (None, None, []),
        (sample(failures=49), None, []),
        (sample(failures=51), None, ["error_rate"]),
        (sample(answers=10, failures=10), None, []),  # too few to tell
        (sample(slow=60), None, []),  # 95th percentile within the bucket up to 1 s, below the bound
        (sample(slow=400), None, ["p95_seconds"]),
        (sample(failing=True), None, ["loads"]),
        (sample(), LiveError(500, auroc_upper=0.60, baseline_auroc=0.70), ["live_auroc"]),
        (sample(), LiveError(500, auroc_upper=0.66, baseline_auroc=0.70), []),
        (sample(), LiveError(99, auroc_upper=0.10, baseline_auroc=0.70), []),
        (sample(), LiveError(500, brier_lower=0.20, baseline_brier=0.17), ["live_brier"]),
        (sample(), LiveError(500, brier_lower=0.18, baseline_brier=0.17), []),
        (sample(failures=600), LiveError(500, auroc_upper=0.1, baseline_auroc=0.7), ["error_rate", "live_auroc"]),
    ],
)
def test_watch(seen: ServingSample | None, live: LiveError | None, names: list[str]) -> None:
    decision = judge(seen, live, WATCH)
    assert [check.name for check in decision.checks if not check.passed] == names
    assert decision.out_of_bounds is bool(names)
    assert len(decision.reasons) == len(names)
    assert decision.error_only is (bool(names) and set(names) <= {"live_auroc", "live_brier"})


def test_percentile_against_the_known_distribution() -> None:
    rng = np.random.default_rng(1)
    times = rng.exponential(0.05, size=20_000)
    bounds = [0.001 * 1.2**power for power in range(40)]
    buckets = (*((bound, float((times <= bound).sum())) for bound in bounds), (math.inf, 20_000.0))
    found = ServingSample("1", False, 20_000, 0, buckets).p95_seconds()
    assert found == pytest.approx(np.quantile(times, 0.95), rel=0.05)
    assert ServingSample("1", False, 5, 0, ((1.0, 0.0), (math.inf, 5.0))).p95_seconds() == math.inf
    assert ServingSample("1", False, 0, 0).p95_seconds() is None


def test_only_what_came_after_the_last_look_counts() -> None:
    early, late = sample(answers=100_000), sample(answers=100_200, failures=150)
    assert not judge(late, None, WATCH).out_of_bounds
    assert judge(late.since(early), None, WATCH).out_of_bounds
    assert late.since(replace(early, version="2")) == late  # another version's counts
    assert sample(answers=10).since(early) == sample(answers=10)  # the server started anew
    assert ServingSample.from_dict(late.to_dict()) == late
    with pytest.raises(ValueError, match="no stored sample"):
        ServingSample.from_dict({"version": "1"})


numbers = st.floats(0, 1)


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000), numbers, numbers, numbers, numbers,
       st.integers(0, 500), st.tuples(numbers, numbers))  # fmt: skip
def test_a_healthier_champion_is_never_rolled_back_instead(
    answers: int, failures: int, slow: int, auroc: float, brier: float, base_auroc: float, base_brier: float,
    fewer: int, less: tuple[float, float],
) -> None:  # fmt: skip
    failures, slow = min(failures, answers), min(slow, answers)
    live = LiveError(500, auroc, brier, base_auroc, base_brier)
    was = judge(sample(answers, failures, slow), live, WATCH)
    healthier = LiveError(500, min(1.0, auroc + less[0]), max(0.0, brier - less[1]), base_auroc, base_brier)
    now = judge(sample(answers, max(0, failures - fewer), max(0, slow - fewer)), healthier, WATCH)
    assert was.out_of_bounds or not now.out_of_bounds


def test_results_of_monitoring_about_another_version_or_too_few_say_nothing() -> None:
    result = {
        "status": "degraded", "rows": 300, "model_version": "3", "auroc": {"value": 0.55, "lower": 0.5, "upper": 0.6},
        "brier": None, "baseline": {"auroc": 0.7, "brier": 0.17},
    }  # fmt: skip
    assert live_error(result, "3") == LiveError(300, 0.6, None, 0.7, 0.17)
    assert live_error(result, "4") is None
    assert live_error({**result, "status": "insufficient_data"}, "3") is None
    assert live_error({**result, "auroc": "n/a", "baseline": None}, "3") == LiveError(300)
    assert live_error(None, "3") is None
