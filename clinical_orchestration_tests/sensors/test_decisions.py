"""What sensors decide, without Dagster."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.defs.sensors.decisions import (
    Ask,
    DomainRows,
    FeatureStoreState,
    Inflow,
    LandingFile,
    ModelState,
    OnlineRow,
    PartitionLag,
    Wait,
    clinical_data,
    feature_findings,
    feature_store,
    kafka_lag,
    landing_files,
    model_performance,
    model_reasons,
    trend,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
DOMAIN_OF = {"patient-vitals": "patient_vitals"}


# clinical data


def inflow(begin: int = 0, end: int = 0, rows: int = 0, *, behind: bool = False, quality: float | None = 1.0) -> Inflow:
    return Inflow(
        {"patient-vitals/0": PartitionLag(begin, end)}, {"patient_vitals": DomainRows(rows, behind)}, DOMAIN_OF, quality
    )


def asked(decision: Ask | Wait) -> Ask:
    assert isinstance(decision, Ask), decision
    return decision


def waited(decision: Ask | Wait) -> Wait:
    assert isinstance(decision, Wait), decision
    return decision


def test_new_messages_start_a_run_at_the_minimum() -> None:
    assert (
        "99 new records, a run needs 100"
        in waited(clinical_data(inflow(0, 99), {}, minimum=100, threshold=0.95)).reason
    )
    decision = asked(clinical_data(inflow(0, 100), {}, minimum=100, threshold=0.95))
    assert decision.position["offsets"] == {"patient-vitals/0": 100}
    assert "100 new records" in decision.reason


def test_the_same_messages_start_no_second_run() -> None:
    first = asked(clinical_data(inflow(0, 100), {}, minimum=100, threshold=0.95))
    waited(clinical_data(inflow(0, 150), first.position, minimum=100, threshold=0.95))  # the run failed
    asked(clinical_data(inflow(0, 200), first.position, minimum=100, threshold=0.95))
    waited(clinical_data(inflow(100, 150, 100), first.position, minimum=100, threshold=0.95))  # it succeeded


def test_messages_that_a_failed_run_left_in_the_raw_table_are_not_counted_again() -> None:
    first = asked(clinical_data(inflow(0, 100), {}, minimum=100, threshold=0.95))
    left = inflow(100, 100, rows=100, behind=True)
    assert waited(clinical_data(left, first.position, minimum=1, threshold=0.95)).reason.startswith("0 new")


def test_rows_that_others_brought_into_the_raw_table_count() -> None:
    settled = waited(clinical_data(inflow(100, 100, rows=100), {}, minimum=10, threshold=0.95))
    assert settled.position is not None
    more = inflow(100, 100, rows=115, behind=True)
    decision = asked(clinical_data(more, settled.position, minimum=10, threshold=0.95))
    assert "15 raw rows" in decision.reason
    waited(clinical_data(more, decision.position, minimum=10, threshold=0.95))


def test_a_topic_made_anew_counts_from_its_start() -> None:
    position = {"offsets": {"patient-vitals/0": 5000}, "rows": {}}
    asked(clinical_data(inflow(0, 120), position, minimum=100, threshold=0.95))


@pytest.mark.parametrize(("quality", "starts"), [(0.94, False), (0.95, True), (None, True)])
def test_bad_quality_starts_nothing(quality: float | None, starts: bool) -> None:
    decision = clinical_data(inflow(0, 500, quality=quality), {}, minimum=100, threshold=0.95)
    assert isinstance(decision, Ask) is starts
    if not starts:
        assert "0.940 is below data_quality_threshold 0.950" in decision.reason
        assert waited(decision).position is None, "the records stay news until quality is good again"


def test_without_a_broker_the_raw_tables_are_looked_at_and_the_reason_says_so() -> None:
    none = Inflow(None, {"patient_vitals": DomainRows(0, False)}, DOMAIN_OF, None)
    assert "no Kafka broker" in clinical_data(none, {}, minimum=1, threshold=0.95).reason


@given(
    st.lists(st.tuples(st.integers(0, 300), st.booleans(), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 200),
)
def test_each_message_starts_at_most_one_run(steps: list[tuple[int, bool, bool]], minimum: int) -> None:
    """Messages arrive; runs that were asked for ingest everything or fail before or after the raw table."""
    position: dict[str, Any] = {}
    end = begin = rows = 0
    behind = False
    counted = 0
    for arrived, ingests, refines in steps:
        end += arrived
        decision = clinical_data(inflow(begin, end, rows, behind=behind), position, minimum=minimum, threshold=0.5)
        if isinstance(decision, Ask):
            counted += int(decision.reason.split()[0].replace(",", ""))
            position = decision.position
            if ingests:
                rows += end - begin
                begin, behind = end, True
                if refines:
                    behind = False
        elif decision.position is not None:
            position = decision.position
    assert counted <= end


# landing files


def landing(*files: LandingFile, position: dict[str, Any] | None = None, memory: dict[str, Any] | None = None) -> Any:
    return landing_files(files, {"pilot": "/landing/pilot", "other": "/landing/other"}, position or {}, memory or {})


VS = LandingFile("pilot", "vs.csv", "100:1")
LB = LandingFile("pilot", "lb.csv", "50:1")


def test_a_file_counts_when_it_stays_the_same_for_two_looks() -> None:
    first = waited(landing(VS))
    assert "not known to be complete" in first.reason
    grown = replace(VS, identity="200:2")
    second = waited(landing(grown, memory=first.memory))
    third = asked(landing(grown, memory=second.memory))
    assert (third.trial, third.source) == ("pilot", "/landing/pilot")
    assert waited(landing(grown, position=third.position, memory=third.memory)).reason == "no new file"


def test_a_declared_file_counts_at_once() -> None:
    asked(landing(replace(VS, declared=True)))


def test_a_folder_waits_until_all_of_its_new_files_are_complete() -> None:
    memory = {"seen": {"pilot": {"vs.csv": VS.identity}}}
    waited(landing(VS, LB, memory=memory))
    decision = asked(landing(VS, LB, memory={"seen": {"pilot": {"vs.csv": VS.identity, "lb.csv": LB.identity}}}))
    assert "2 new files" in decision.reason
    assert decision.position == {"done": {"pilot": {"vs.csv": "100:1", "lb.csv": "50:1"}}}


def test_a_changed_file_is_a_new_one_and_a_removed_one_is_forgotten() -> None:
    position = {"done": {"pilot": {"vs.csv": "100:1", "gone.csv": "1:1"}}}
    changed = replace(VS, identity="101:2", declared=True)
    decision = asked(landing(changed, position=position))
    assert decision.position == {"done": {"pilot": {"vs.csv": "101:2"}}}


def test_trials_take_turns() -> None:
    files = (replace(VS, declared=True), LandingFile("other", "vs.csv", "7:7", declared=True))
    first = asked(landing(*files))
    second = asked(landing(*files, position=first.position))
    assert [first.trial, second.trial] == ["other", "pilot"]
    waited(landing(*files, position=second.position))


# feature store


def store(**changes: Any) -> FeatureStoreState:
    values: dict[str, Any] = {
        "trial": "pilot",
        "offline": {"a": NOW, "b": NOW},
        "newest_record": {"a": NOW, "b": NOW},
        "silver_moved": False,
        "online": {"a": OnlineRow(NOW, "set", 5), "b": OnlineRow(NOW, "set", 5)},
        "asked": frozenset({"a", "b"}),
        "now": NOW,
        "max_age": 24 * HOUR,
        "feature_set": "set",
    }
    return FeatureStoreState(**{**values, **changes})


def online(**changes: OnlineRow) -> dict[str, OnlineRow]:
    return {"a": OnlineRow(NOW, "set", 5), "b": OnlineRow(NOW, "set", 5), **changes}


@pytest.mark.parametrize(
    ("state", "counts"),
    [
        (store(), (0, 0, 0)),
        (store(online={}), (2, 0, 0)),
        (store(online=online(b=OnlineRow(NOW - HOUR, "set", 5))), (0, 1, 0)),
        (store(online=online(b=OnlineRow(NOW, "old set", 5))), (0, 0, 1)),
        (store(online=online(b=OnlineRow(NOW, "set", 0))), (0, 0, 1)),
        # a patient without any row offline is missing only while silver has news
        (store(offline={"a": NOW}, online={"a": OnlineRow(NOW, "set", 5)}), (0, 0, 0)),
        (store(offline={"a": NOW}, online={"a": OnlineRow(NOW, "set", 5)}, silver_moved=True), (1, 0, 0)),
    ],
)
def test_what_is_wrong_with_online_features(state: FeatureStoreState, counts: tuple[int, int, int]) -> None:
    found = feature_findings(state)
    assert (found.missing, found.stale, found.incomplete) == counts
    assert found.any is (sum(counts) > 0)


def test_old_features_are_stale_only_where_newer_records_wait() -> None:
    old = NOW - 48 * HOUR
    state = store(
        offline={"a": old, "b": old},
        online={"a": OnlineRow(old, "set", 5), "b": OnlineRow(old, "set", 5)},
        newest_record={"a": old, "b": NOW},
        silver_moved=True,
    )
    assert feature_findings(state).stale == 1
    assert feature_findings(replace(state, silver_moved=False)).stale == 0
    assert feature_findings(replace(state, max_age=72 * HOUR)).stale == 0


def test_the_same_problem_is_not_asked_for_again_at_once() -> None:
    lost = store(online={})
    first = asked(feature_store([lost], {}, NOW))
    assert (first.trial, dict(first.conf)) == ("pilot", {})
    assert "a run was asked for at 2026-03-01T12:00" in waited(feature_store([lost], first.position, NOW + HOUR)).reason
    asked(feature_store([lost], first.position, NOW + 6 * HOUR))
    other = store(online={"a": OnlineRow(NOW, "set", 5)})
    asked(feature_store([other], first.position, NOW + HOUR))


def test_missing_features_are_computed_anew_for_all() -> None:
    decision = asked(feature_store([store(online=online(b=OnlineRow(NOW, "old set", 5)))], {}, NOW))
    assert decision.conf == {"full_features": True}


def test_before_the_first_features_there_is_nothing_to_ask_for() -> None:
    assert "no trial has records" in waited(feature_store([], {}, NOW)).reason


def test_a_decision_names_no_patient() -> None:
    lost = store(offline={"SUBJ-77": NOW}, newest_record={}, online={}, asked=frozenset({"SUBJ-77"}))
    decision = asked(feature_store([lost], {}, NOW))
    assert "SUBJ-77" not in f"{decision.reason} {decision.position} {decision.conf}"


# model performance

GOOD = {"status": "ok", "auroc": {"value": 0.8}, "baseline": {"auroc": 0.8}, "drop": 0.0, "drop_lower": -0.05}


def model(**changes: Any) -> ModelState:
    values: dict[str, Any] = {
        "trial": "pilot",
        "performance": GOOD,
        "data_drift": {"status": "stable"},
        "concept_drift": {"status": "none"},
        "events": {"monitoring/performance": 1},
        "auroc_by_window": (),
        "min_auroc": 0.6,
    }
    return ModelState(**{**values, **changes})


FALLING = (0.82, 0.80, 0.79, 0.77, 0.75, 0.73)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (model(), []),
        (model(performance=None, data_drift=None, concept_drift=None), []),
        (model(performance={**GOOD, "status": "insufficient_data", "auroc": {"value": 0.1}}), []),
        (model(performance={**GOOD, "status": "degraded"}), ["performance is degraded"]),
        (model(performance={**GOOD, "auroc": {"value": 0.55}}), ["AUROC 0.550 is below 0.600"]),
        (model(performance={**GOOD, "drop": 0.06, "drop_lower": 0.01}), ["AUROC is 0.060 lower than at training"]),
        (model(performance={**GOOD, "drop": 0.06, "drop_lower": -0.01}), []),
        (model(performance={**GOOD, "drop": 0.03, "drop_lower": 0.01}), []),
        (model(auroc_by_window=FALLING), ["AUROC fell by 0.09"]),
        (model(auroc_by_window=FALLING[:5]), []),
        (model(auroc_by_window=tuple(reversed(FALLING))), []),
        (model(data_drift={"status": "drift", "drifted_features": ["x", "y"]}), ["data drift in 2 features"]),
        (model(concept_drift={"status": "drift"}), ["concept drift"]),
    ],
)
def test_reasons_to_train_again(state: ModelState, said: list[str]) -> None:
    reasons = model_reasons(state)
    assert len(reasons) == len(said)
    assert all(text in reason for text, reason in zip(said, reasons, strict=True))


def test_a_result_asks_once_and_its_repetition_after_the_pause() -> None:
    bad = {"status": "drift", "drifted_features": ["x"]}
    first = asked(model_performance([model(data_drift=bad)], {}, NOW, pause=24 * HOUR))
    assert first.trial == "pilot"
    assert first.conf == {"reason": "data drift in 1 features"}
    same = waited(model_performance([model(data_drift=bad)], first.position, NOW, pause=24 * HOUR))
    assert same.reason == "pilot: no new monitoring result"
    newer = model(data_drift=bad, events={"monitoring/performance": 2})
    soon = waited(model_performance([newer], first.position, NOW + 2 * HOUR, pause=24 * HOUR))
    assert "retraining was asked for" in soon.reason
    assert soon.position is not None
    newest = replace(newer, events={"monitoring/performance": 3})
    asked(model_performance([newest], soon.position, NOW + 25 * HOUR, pause=24 * HOUR))


def test_another_kind_of_reason_asks_within_the_pause() -> None:
    first = asked(model_performance([model(data_drift={"status": "drift"})], {}, NOW, pause=24 * HOUR))
    worse = model(concept_drift={"status": "drift"}, events={"monitoring/performance": 2})
    asked(model_performance([worse], first.position, NOW + HOUR, pause=24 * HOUR))


def test_without_results_the_sensor_says_what_makes_them() -> None:
    assert "model_monitoring makes them" in waited(model_performance([], {}, NOW, pause=HOUR)).reason


def test_trend_finds_a_fall_and_not_noise() -> None:
    fall, p = trend([0.8, 0.78, 0.76, 0.74, 0.72, 0.70])
    assert fall == pytest.approx(0.1)
    assert p == pytest.approx(0.0042, abs=0.001)  # S = -15, var = 170/6: z = -2.63
    assert trend([0.8, 0.7, 0.82, 0.71, 0.8, 0.72])[1] > 0.05
    assert trend([0.7] * 6) == (0.0, 1.0)
    assert trend([0.8, 0.7]) == (0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=20))
def test_trend_is_a_probability_and_never_a_rise(values: list[float]) -> None:
    fall, p = trend(values)
    assert fall >= 0
    assert 0 <= p <= 1


# lag


def test_lag_has_a_dead_zone_below_its_bound() -> None:
    verdict = kafka_lag({"a": 101, "b": 100, "c": 81, "d": 80, "e": 0}, 100)
    assert verdict.high == {"a": 101}
    assert verdict.low == ("d", "e")
