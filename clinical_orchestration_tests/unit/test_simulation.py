"""The simulated trial: reproducible, ordered, and what it says about its messages is true."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from datetime import UTC, datetime
from itertools import islice

import numpy as np
import pytest

from clinical_orchestration.simulation import GroundTruth, simulate, simulation_id, subjects_for
from clinical_orchestration.simulation.faults import FAULTS, broken
from clinical_orchestration.simulation.physiology import VITALS, Cohort
from clinical_orchestration.transforms.decode import decode
from clinical_orchestration.transforms.messages import validate_message
from clinical_orchestration.trials import load_trial
from clinical_orchestration.trials.profile import Incident, SimulationSettings

SETTINGS = SimulationSettings(seed=3, sites=3, days=6, broken_rate=0.05, duplicate_rate=0.03, late_rate=0.03)
STUDY = "SIM01"


@pytest.fixture(scope="module")
def messages() -> list:  # type: ignore[type-arg]
    return list(simulate(SETTINGS, STUDY, messages=6_000))


def digest(stream) -> str:  # type: ignore[no-untyped-def]
    total = hashlib.sha256()
    for m in stream:
        total.update(repr((m.sequence, m.domain, m.key, m.value, m.arrival_ms, m.event_ms, m.kind, m.fault)).encode())
    return total.hexdigest()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(messages) -> None:  # type: ignore[no-untyped-def]
    assert digest(messages) == digest(simulate(SETTINGS, STUDY, messages=6_000))
    other = SETTINGS.model_copy(update={"seed": 4})
    assert digest(islice(simulate(other, STUDY, messages=6_000), 500)) != digest(messages[:500])


def test_the_number_of_messages_is_exact_and_they_are_numbered_by_arrival(messages) -> None:  # type: ignore[no-untyped-def]
    assert len(messages) == 6_000
    assert [m.sequence for m in messages] == list(range(6_000))
    arrivals = [m.arrival_ms for m in messages]
    assert arrivals == sorted(arrivals)
    assert len(list(simulate(SETTINGS, STUDY, messages=1))) == 1


def test_without_a_number_all_subjects_have_all_their_days() -> None:
    settings = SETTINGS.model_copy(update={"subjects": 5, "days": 2, "broken_rate": 0, "duplicate_rate": 0})
    found = list(simulate(settings, STUDY))
    vitals = Counter(m.key for m in found if m.domain == "patient_vitals")
    assert len(vitals) == 5
    assert all(36 <= count <= 48 for count in vitals.values())
    assert sum(m.domain == "subjects" for m in found) == 5


def test_the_contract_accepts_the_good_and_rejects_the_broken(messages) -> None:  # type: ignore[no-untyped-def]
    for m in messages:
        reasons = validate_message(m.domain, m.value or b"", now=m.arrival)
        assert bool(reasons) == (m.kind == "broken"), (m.domain, m.kind, m.fault, reasons)


def test_every_fault_of_every_domain_is_rejected(messages) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    good = {m.domain: m for m in messages if m.kind == "ok"}
    assert good.keys() == FAULTS.keys()
    for domain, faults in FAULTS.items():
        for fault in faults:
            for _ in range(10):
                value = broken(fault, good[domain].record, rng)
                assert validate_message(domain, value or b"", now=good[domain].arrival), (domain, fault, value)


def test_several_faults_are_all_named() -> None:
    settings = SETTINGS.model_copy(update={"broken_rate": 0.9, "duplicate_rate": 0, "late_rate": 0})
    several = next(m for m in simulate(settings, STUDY, messages=3_000) if m.fault == "several")
    assert len(validate_message(several.domain, several.value or b"", now=several.arrival)) >= 3


def test_rates_are_shares_of_all_messages() -> None:
    truth = GroundTruth()
    for m in simulate(SETTINGS, STUDY, messages=20_000):
        truth.add(m)
    assert truth.total == 20_000
    assert truth.of_kind("broken") / truth.total == pytest.approx(0.05, abs=0.006)
    assert truth.of_kind("duplicate") / truth.total == pytest.approx(0.03, abs=0.006)
    assert truth.of_kind("late") / truth.total == pytest.approx(0.03, abs=0.006)
    assert sum(sum(kinds.values()) for kinds in truth.as_dict().values()) == 20_000


def test_a_duplicate_repeats_an_earlier_good_message_to_the_byte(messages) -> None:  # type: ignore[no-untyped-def]
    good = set()
    for m in messages:
        if m.kind == "duplicate":
            assert (m.domain, m.key, m.value) in good
        elif m.kind == "ok":
            good.add((m.domain, m.key, m.value))


def test_a_late_message_arrives_hours_after_its_event(messages) -> None:  # type: ignore[no-untyped-def]
    late = [m for m in messages if m.kind == "late"]
    assert late
    assert all(m.arrival_ms - m.event_ms >= 6 * 3_600_000 for m in late)
    vitals = [m for m in messages if m.kind == "ok" and m.domain == "patient_vitals"]
    assert max(m.arrival_ms - m.event_ms for m in vitals) < 60_000


def test_no_two_good_messages_are_of_the_same_observation() -> None:
    profile = load_trial("simulated")
    keys: set[object] = set()
    for m in simulate(SETTINGS, STUDY, messages=5_000):
        if m.kind in ("ok", "late"):
            record = {
                "record_format": "message",
                "payload": (m.value or b"").decode(),
                "payload_encoding": "utf-8",
                "trial": "simulated",
                "received_at": m.arrival,
            }
            decoded = decode(m.domain, record, profile)
            assert not decoded.reasons
            key = (m.domain, decoded.rows[0]["record_key"])
            assert key not in keys
            keys.add(key)


def test_changing_a_rate_changes_no_measurement() -> None:
    def measured(rate: float) -> set[bytes]:
        settings = SETTINGS.model_copy(
            update={"broken_rate": rate, "duplicate_rate": 0, "late_rate": 0, "subjects": 4, "days": 1}
        )
        return {m.value for m in simulate(settings, STUDY) if m.kind == "ok"}

    assert measured(0.5) < measured(0.0)


def test_values_that_were_not_taken_are_absent_and_one_always_is_there() -> None:
    settings = SETTINGS.model_copy(update={"missing_rate": 0.6, "broken_rate": 0})
    taken = [
        sum(vital in m.record for vital in VITALS)
        for m in simulate(settings, STUDY, messages=2_000)
        if m.domain == "patient_vitals" and m.record is not None
    ]
    assert min(taken) >= 1
    assert np.mean(taken) == pytest.approx(5 * 0.4, rel=0.15)


@pytest.mark.parametrize(
    "change", [{"broken_rate": 1.2}, {"late_rate": -0.1}, {"broken_rate": 0.6, "late_rate": 0.5}, {"days": 0}]
)
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        next(simulate(SETTINGS.model_copy(update=change), STUDY))


def test_the_identity_tells_simulations_apart() -> None:
    identity = simulation_id(SETTINGS, STUDY)
    assert re.fullmatch(r"[0-9a-f]{16}", identity)
    assert identity == simulation_id(SETTINGS.model_copy(), STUDY)
    others = {
        simulation_id(SETTINGS.model_copy(update={"seed": 9}), STUDY),
        simulation_id(SETTINGS, "OTHER"),
        simulation_id(SETTINGS, STUDY, 100),
    }
    assert len(others | {identity}) == 4


def test_more_messages_are_more_subjects_and_not_more_days() -> None:
    assert subjects_for(SETTINGS, 100_000) > 9 * subjects_for(SETTINGS, 10_000)
    last = list(simulate(SETTINGS, STUDY, messages=10_000))[-1]
    start = datetime(2025, 1, 1, tzinfo=UTC)
    assert 0.8 * SETTINGS.days < (last.arrival - start).total_seconds() / 86_400 < 1.5 * SETTINGS.days


def test_deterioration_shows_in_the_vital_signs_and_raises_the_hazard() -> None:
    cohort = Cohort(400, 4, ("placebo", "drug"), 1.0, np.random.default_rng(1))
    sick_rate, well_rate, difference = [], [], []
    for hour in range(120):
        cohort.advance()
        values = cohort.vitals(hour % 24)
        sick, well = cohort.severity > 1, cohort.severity == 0
        if sick.any() and hour > 48:
            sick_rate.append(cohort.event_rate()[sick].mean())
            well_rate.append(cohort.event_rate()[well].mean())
            difference.append([values[vital][sick].mean() - values[vital][well].mean() for vital in VITALS])
    assert np.mean(sick_rate) > 5 * np.mean(well_rate)
    heart_rate, systolic, diastolic, temperature, spo2 = np.mean(difference, axis=0)
    assert heart_rate > 5
    assert temperature > 0.3
    assert max(systolic, diastolic, spo2) < -1


def test_adverse_events_can_be_predicted_but_not_perfectly() -> None:
    """The hazard itself, the best predictor there can be, ranks the next day's events with an AUROC of 0.8 to 0.93."""
    from sklearn.metrics import roc_auc_score

    scores = []
    for seed in (1, 2):
        cohort = Cohort(300, 4, ("placebo", "low", "high"), 1.0, np.random.default_rng(seed))
        rates, events = [], np.zeros((240, 300), dtype=bool)
        for hour in range(240):
            cohort.advance()
            rates.append(cohort.event_rate())
            events[hour, cohort.events()] = True
        times = range(24, 215, 6)
        labels = np.concatenate([events[t + 1 : t + 25].any(axis=0) for t in times])
        assert 0.04 < labels.mean() < 0.25
        scores.append(roc_auc_score(labels, np.concatenate([rates[t] for t in times])))
    assert 0.8 < np.mean(scores) < 0.93


def with_incidents(*incidents: Incident) -> list:  # type: ignore[type-arg]
    settings = SETTINGS.model_copy(update={"subjects": 60, "incidents": incidents})
    return list(simulate(settings, STUDY))


@pytest.fixture(scope="module")
def calm() -> list:  # type: ignore[type-arg]
    return with_incidents()


def day_of(message) -> float:  # type: ignore[no-untyped-def]
    start = datetime.fromisoformat(SETTINGS.start).timestamp() * 1000
    return (message.event_ms - start) / 86_400_000


def test_a_fahrenheit_thermometer_breaks_the_messages_of_its_site_from_its_day_on(calm) -> None:  # type: ignore[no-untyped-def]
    found = with_incidents(Incident(kind="fahrenheit", from_day=3, site=2))
    wrong = [m for m in found if m.fault == "fahrenheit"]
    assert {m.key.split(b"-")[1] for m in wrong} == {b"002"}
    assert min(day_of(m) for m in wrong) >= 3
    assert all(validate_message(m.domain, m.value, now=m.arrival) for m in wrong)
    others = [m.value for m in found if m.domain == "patient_vitals" and b"-002-" not in m.key]
    assert others == [m.value for m in calm if m.domain == "patient_vitals" and b"-002-" not in m.key]


def test_a_silent_lab_sends_nothing_more(calm) -> None:  # type: ignore[no-untyped-def]
    found = with_incidents(Incident(kind="silent_lab", from_day=3, site=1))

    def labs(messages, site: bytes) -> list:  # type: ignore[no-untyped-def,type-arg]
        return [m for m in messages if m.domain == "lab_results" and m.key.split(b"-")[1] == site]

    # blood is drawn within minutes of the incident's start at the latest
    assert max(day_of(m) for m in labs(found, b"001")) < 3.1
    assert max(day_of(m) for m in labs(calm, b"001")) > 5
    assert len(labs(found, b"002")) == len(labs(calm, b"002"))


def test_a_higher_event_rate_gives_more_events_after_its_day_only(calm) -> None:  # type: ignore[no-untyped-def]
    found = with_incidents(Incident(kind="event_rate", from_day=3, factor=3))

    def events(messages, after: bool) -> int:  # type: ignore[no-untyped-def]
        return sum(m.domain == "adverse_events" and (day_of(m) >= 3) == after for m in messages)

    assert events(found, after=False) == events(calm, after=False)
    assert events(found, after=True) > 2 * events(calm, after=True)


def test_a_simulation_without_incidents_keeps_its_identity() -> None:
    identity = simulation_id(load_trial("simulated").sources.simulation, "SIMULATED01")
    assert identity == "5c836c3fb08abdfd"
    stormy = SETTINGS.model_copy(update={"incidents": (Incident(kind="silent_lab", from_day=1),)})
    assert simulation_id(stormy, STUDY) != simulation_id(SETTINGS, STUDY)
