"""Three-valued logic, and what criteria say about a patient."""

from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration.cohorts.cohort import assemble
from clinical_orchestration.cohorts.criteria import (
    CohortDefinition,
    CriteriaError,
    Not,
    available_definitions,
    load_definition,
    walk,
)
from clinical_orchestration.cohorts.logic import Truth, at_least, every, some
from clinical_orchestration.cohorts.matching import PatientRecords, evaluate, match_patient

INDEX = datetime(2025, 3, 1, 8, tzinfo=UTC)
truths = st.sampled_from(list(Truth))


def criterion(**said: Any) -> Any:
    return load_definition({"name": "one", "inclusion": [said]}).inclusion[0]


def ask(records: PatientRecords, **said: Any) -> tuple[Truth, str]:
    found = evaluate(criterion(**said), records, INDEX)
    return found.truth, found.reason


def lab(value: float | None, days: float = -1, **changes: Any) -> dict[str, Any]:
    row = {"test_code": "ALT", "value": value, "unit": "U/L", "event_time": INDEX + timedelta(days=days)}
    return {**row, "text_value": None, "reference_low": 6.0, "reference_high": 40.0, **changes}


def event(term: str, days: float, **changes: Any) -> dict[str, Any]:
    row = {"event_type": term, "body_system": "CARDIAC DISORDERS", "severity": "grade_2", "serious": False}
    return {**row, "onset_precision": "minute", "event_time": INDEX + timedelta(days=days), **changes}


def drug(name: str, start: float | None, end: float | None = None, **changes: Any) -> dict[str, Any]:
    def at(days: float | None) -> datetime | None:
        return None if days is None else INDEX + timedelta(days=days)

    row = {"drug_name": name, "standardized_name": None, "drug_class": "NERVOUS SYSTEM", "indication": None}
    times = {"start_time": at(start), "end_time": at(end), "start_precision": "minute", "event_time": at(start)}
    return {**row, **times, "study_drug": False, **changes}


# --- logic -----------------------------------------------------------------------------------------------------------


@given(st.lists(truths))
def test_de_morgan(parts: list[Truth]) -> None:
    assert ~every(parts) is some(~part for part in parts)
    assert ~some(parts) is every(~part for part in parts)


@given(truths, truths, truths)
def test_operators_are_a_kleene_algebra(a: Truth, b: Truth, c: Truth) -> None:
    assert ~~a is a
    assert a & b is b & a
    assert a | b is b | a
    assert (a & b) & c is a & (b & c)
    assert a & (b | c) is (a & b) | (a & c)
    assert a & (a | b) is a
    assert (a & ~a) & (b | ~b) is a & ~a  # the law that tells Kleene's logic from a plain lattice


@given(st.lists(truths, max_size=6))
def test_unknown_stands_for_both_answers(parts: list[Truth]) -> None:
    """A result that is not unknown stays whatever the unknown parts turn out to be, and only such a result is known."""
    worlds: list[list[Truth]] = [[]]
    for part in parts:
        choices = [Truth.MET, Truth.NOT_MET] if part is Truth.UNKNOWN else [part]
        worlds = [[*world, choice] for world in worlds for choice in choices]
    for combine in (every, some, lambda found: at_least(found, 2)):
        possible = {combine(world) for world in worlds}
        assert combine(parts) is (possible.pop() if len(possible) == 1 else Truth.UNKNOWN)


# --- measurements ----------------------------------------------------------------------------------------------------


def test_a_value_in_the_window_decides_and_is_named() -> None:
    records = PatientRecords("p", labs=[lab(30, -2), lab(90, -40), lab(500, 3)])
    said = {"kind": "lab", "test": "alt", "unit": "U/L", "max": 40, "window": {"before": "30d"}}
    assert ask(records, **said) == (Truth.MET, "ALT 30 U/L on 2025-02-27 08:00")
    assert ask(records, **said, select="all")[0] is Truth.MET
    truth, reason = ask(records, **{**said, "window": {"before": "60d"}}, select="all")
    assert (truth, reason) == (Truth.NOT_MET, "ALT 90 U/L on 2025-01-20 08:00")
    assert ask(records, **{**said, "window": {}}, select="first")[0] is Truth.NOT_MET
    assert ask(records, **{**said, "max": None, "above": 80, "window": {}}, select="any")[0] is Truth.MET


def test_no_value_is_unknown_and_not_normal() -> None:
    said = {"kind": "lab", "test": "ALT", "max": 40, "window": {"before": "30d"}}
    assert ask(PatientRecords("p"), **said) == (Truth.UNKNOWN, "no ALT value within 30 days before the index")
    assert ask(PatientRecords("p", labs=[lab(None)]), **said)[0] is Truth.UNKNOWN
    assert ask(PatientRecords("p", labs=[lab(30, -31)]), **said)[0] is Truth.UNKNOWN
    assert ask(PatientRecords("p", labs=[lab(30, -30)]), **said)[0] is Truth.MET  # the window's ends belong to it


@pytest.mark.parametrize(
    ("text", "said", "expected"),
    [
        ("<5", {"max": 5}, Truth.MET),
        ("<5", {"below": 5}, Truth.MET),
        ("<=5", {"below": 5}, Truth.UNKNOWN),
        ("<5", {"min": 5}, Truth.NOT_MET),
        ("<5", {"min": 3}, Truth.UNKNOWN),
        (">100", {"above": 100}, Truth.MET),
        (">100", {"max": 100}, Truth.NOT_MET),
        (">=100", {"max": 100}, Truth.UNKNOWN),
        (">100", {"max": 150}, Truth.UNKNOWN),
        ("HAEMOLYSED", {"max": 150}, Truth.UNKNOWN),
    ],
)
def test_a_value_beyond_the_assay_decides_what_it_can(text: str, said: dict[str, float], expected: Truth) -> None:
    records = PatientRecords("p", labs=[lab(None, text_value=text)])
    assert ask(records, kind="lab", test="ALT", **said)[0] is expected


def test_units_are_converted_and_unknown_ones_decide_nothing() -> None:
    bilirubin = lab(17.1, test_code="BILI", unit="umol/L")
    said = {"kind": "lab", "test": "BILI", "unit": "mg/dL"}
    assert ask(PatientRecords("p", labs=[bilirubin]), **said, max=1.0)[0] is Truth.MET
    assert ask(PatientRecords("p", labs=[bilirubin]), **said, below=1.0)[0] is Truth.NOT_MET
    odd = {**bilirubin, "unit": "drops"}
    assert ask(PatientRecords("p", labs=[odd]), **said, max=1.0)[0] is Truth.UNKNOWN
    with pytest.raises(CriteriaError, match="BILI is not measured in mmHg"):
        criterion(kind="lab", test="BILI", unit="mmHg", max=1)


def test_limits_may_be_multiples_of_the_reference_limit() -> None:
    said = {"kind": "lab", "test": "ALT", "relative_to": "reference_high", "max": 2.5}
    assert ask(PatientRecords("p", labs=[lab(100)]), **said)[0] is Truth.MET
    assert ask(PatientRecords("p", labs=[lab(101)]), **said)[0] is Truth.NOT_MET
    assert ask(PatientRecords("p", labs=[lab(10, reference_high=None)]), **said)[0] is Truth.UNKNOWN


def test_latest_values_of_one_time_that_disagree_are_unknown() -> None:
    vital = {"test_code": "PULSE", "unit": "beats/min", "event_time": INDEX}
    rows = [{**vital, "value": 55, "body_position": "SUPINE"}, {**vital, "value": 104, "body_position": "STANDING"}]
    records = PatientRecords("p", vitals=rows)
    truth, reason = ask(records, kind="vital", test="PULSE", max=100)
    assert truth is Truth.UNKNOWN
    assert "disagree" in reason
    assert ask(records, kind="vital", test="PULSE", max=100, position="supine")[0] is Truth.MET


# --- events and medication -------------------------------------------------------------------------------------------


def test_adverse_events_by_term_grade_count_and_window() -> None:
    records = PatientRecords("p", adverse_events=[event("SYNCOPE", -10), event("Syncope vasovagal", -400)])
    said = {"kind": "adverse_event", "terms": ["syncope"]}
    assert ask(records, **said, at_least=2)[0] is Truth.MET
    assert ask(records, **said, at_least=2, window={"before": "30d"})[0] is Truth.NOT_MET
    assert ask(records, **said, min_grade=3)[0] is Truth.NOT_MET
    ungraded = PatientRecords("p", adverse_events=[event("SYNCOPE", -10, severity=None)])
    assert ask(ungraded, **said, min_grade=3)[0] is Truth.UNKNOWN
    assert ask(PatientRecords("p"), **said) == (Truth.NOT_MET, "no adverse event up to the index")
    assert ask(PatientRecords("p"), **said, absence="unknown")[0] is Truth.UNKNOWN
    assert ask(records, kind="adverse_event", terms=["cardiac"], serious=True)[0] is Truth.NOT_MET


@pytest.mark.parametrize(
    ("days", "precision", "expected"),
    [
        (-40, "month", Truth.UNKNOWN),
        (-29, "day", Truth.MET),
        (-10, "year", Truth.UNKNOWN),
        (-0.1, "day", Truth.UNKNOWN),
    ],
)
def test_a_partial_onset_that_may_lie_outside_is_unknown(days: float, precision: str, expected: Truth) -> None:
    records = PatientRecords("p", adverse_events=[event("RASH", days, onset_precision=precision)])
    assert ask(records, kind="adverse_event", terms=["rash"], window={"before": "30d"})[0] is expected


def test_a_diagnosis_that_nobody_mentions_is_unknown() -> None:
    said = {"kind": "diagnosis", "terms": ["epilep", "seizure"]}
    assert ask(PatientRecords("p"), **said)[0] is Truth.UNKNOWN
    assert ask(PatientRecords("p"), **said, absence="not met")[0] is Truth.NOT_MET
    treated = PatientRecords("p", medications=[drug("VALPROATE", -90, indication="Epilepsy")])
    assert ask(treated, **said)[0] is Truth.MET


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (drug("DONEPEZIL", -90, -31), Truth.NOT_MET),
        (drug("DONEPEZIL", -90, -30), Truth.MET),
        (drug("DONEPEZIL", -90), Truth.MET),
        (drug("DONEPEZIL", 2), Truth.NOT_MET),
        (drug("DONEPEZIL", -5, start_precision="month"), Truth.UNKNOWN),
        (drug("DONEPEZIL", None, event_time=INDEX - timedelta(days=1)), Truth.MET),
        (drug("DONEPEZIL", None, event_time=INDEX + timedelta(days=1)), Truth.UNKNOWN),
        (drug("XANOMELINE", -3), Truth.NOT_MET),
        (drug("DONEPEZIL", -3, study_drug=True), Truth.NOT_MET),
        (drug("XYZ", -3, standardized_name="Donepezil hydrochloride"), Truth.MET),
    ],
)
def test_medication_in_a_window(row: dict[str, Any], expected: Truth) -> None:
    records = PatientRecords("p", medications=[row])
    assert ask(records, kind="medication", names=["donepezil"], window={"before": "30d"})[0] is expected


def test_a_medication_without_a_class_may_be_of_any() -> None:
    said = {"kind": "medication", "classes": ["nervous"]}
    assert ask(PatientRecords("p", medications=[drug("A", -3)]), **said)[0] is Truth.MET
    assert ask(PatientRecords("p", medications=[drug("A", -3, drug_class=None)]), **said)[0] is Truth.UNKNOWN
    assert ask(PatientRecords("p", medications=[drug("A", 3, drug_class=None)]), **said)[0] is Truth.NOT_MET


def test_demographics() -> None:
    records = PatientRecords("p", subjects=[{"age_years": 50.0, "sex": "F", "arm": "Placebo", "site": "701"}])
    assert ask(records, kind="age", min=50) == (Truth.MET, "age 50 years")
    assert ask(records, kind="age", above=50)[0] is Truth.NOT_MET
    assert ask(records, kind="sex", values=["f"])[0] is Truth.MET
    assert ask(records, kind="arm", values=["placebo"])[0] is Truth.MET
    assert ask(records, kind="arm", values=["placebo"], actual=True)[0] is Truth.UNKNOWN
    assert ask(records, kind="subject", field="race", values=["WHITE"]) == (Truth.UNKNOWN, "no race is recorded")
    assert ask(records, kind="treated")[0] is Truth.UNKNOWN
    assert ask(PatientRecords("p", subjects=[{"screen_failure": True}]), kind="treated")[0] is Truth.NOT_MET


# --- groups, definitions, flow ---------------------------------------------------------------------------------------

simple = st.sampled_from(
    [
        {"kind": "age", "min": 60},
        {"kind": "sex", "values": ["F"]},
        {"kind": "lab", "test": "ALT", "max": 40},
        {"kind": "lab", "test": "ALT", "max": 40, "select": "any", "window": {"before": "10d"}},
        {"kind": "adverse_event", "terms": ["rash"], "min_grade": 2, "window": {"before": "30d"}},
        {"kind": "medication", "classes": ["nervous"], "window": {"before": "30d"}},
        {"kind": "diagnosis", "terms": ["rash"]},
    ]
)
groups = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.builds(lambda of: {"kind": "all", "of": of}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda of: {"kind": "any", "of": of}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda of: {"kind": "not", "of": of}, inner),
    ),
    max_leaves=6,
)
maybe = st.none() | st.floats(1, 200)
patients = st.builds(
    lambda name, age, sex, labs, events, drugs: PatientRecords(
        name,
        subjects=[{"age_years": age, "sex": sex, "treatment_start": None if name == "p0" else INDEX}],
        labs=[lab(value, -days) for value, days in labs],
        adverse_events=[event("RASH", -days, severity=grade) for grade, days in events],
        medications=[drug("A", -days, drug_class=group) for group, days in drugs],
    ),
    st.sampled_from([f"p{number}" for number in range(4)]),
    maybe,
    st.sampled_from([None, "F", "M"]),
    st.lists(st.tuples(maybe, st.floats(0, 60)), max_size=3),
    st.lists(st.tuples(st.sampled_from([None, "grade_1", "grade_3"]), st.floats(0, 60)), max_size=3),
    st.lists(st.tuples(st.sampled_from([None, "NERVOUS SYSTEM", "OTHER"]), st.floats(0, 60)), max_size=2),
)
definitions = st.builds(
    lambda inclusion, exclusion, unknown: load_definition(
        {"name": "drawn", "inclusion": inclusion, "exclusion": exclusion, "unknown": unknown}
    ),
    st.lists(groups, min_size=1, max_size=3),
    st.lists(groups, max_size=3),
    st.sampled_from(["exclude", "keep"]),
)


@settings(max_examples=40, deadline=None)
@given(patients, st.lists(groups, min_size=1, max_size=3))
def test_de_morgan_on_patients(records: PatientRecords, parts: list[dict[str, Any]]) -> None:
    def truth(said: dict[str, Any]) -> Truth:
        return evaluate(criterion(**said), records, INDEX).truth

    negated = [{"kind": "not", "of": part} for part in parts]
    assert truth({"kind": "not", "of": {"kind": "all", "of": parts}}) is truth({"kind": "any", "of": negated})
    assert truth({"kind": "not", "of": {"kind": "any", "of": parts}}) is truth({"kind": "all", "of": negated})


@settings(max_examples=40, deadline=None)
@given(definitions, st.lists(patients, max_size=8, unique_by=lambda records: records.patient_id))
def test_the_flow_only_ever_loses_patients_and_adds_up(
    definition: CohortDefinition, records: list[PatientRecords]
) -> None:
    cohort = assemble(definition, records)
    steps = cohort.attrition
    assert steps[0].entered == len(records)
    for before, after in itertools.pairwise(steps):
        assert after.entered == before.remaining >= after.remaining
    assert all(step.entered == step.remaining + step.removed + step.removed_unknown for step in steps)
    assert steps[-1].remaining == len(cohort.members)
    for item in cohort.screened:
        assert item.member is (item.removed_by is None)
        if item.match.status == "eligible":
            assert item.member
        if item.match.status == "ineligible":
            assert not item.member
        if item.match.status == "undetermined":
            assert item.member is (definition.unknown == "keep")


@settings(max_examples=40, deadline=None)
@given(definitions, groups, st.lists(patients, max_size=8, unique_by=lambda records: records.patient_id))
def test_one_more_criterion_never_adds_a_member(
    definition: CohortDefinition, more: dict[str, Any], records: list[PatientRecords]
) -> None:
    said = definition.model_dump(mode="json")
    stricter = load_definition({**said, "exclusion": [*said["exclusion"], more]})
    assert set(assemble(stricter, records).members) <= set(assemble(definition, records).members)


@settings(max_examples=40, deadline=None)
@given(definitions)
def test_an_exclusion_is_the_inclusion_of_its_opposite(definition: CohortDefinition) -> None:
    records = PatientRecords("p", subjects=[{"age_years": 61.0, "sex": "F", "treatment_start": INDEX}], labs=[lab(39)])
    said = definition.model_dump(mode="json")
    turned = [*said["inclusion"], *({"kind": "not", "of": item} for item in said["exclusion"])]
    other = load_definition({**said, "inclusion": turned, "exclusion": []})
    assert match_patient(definition, records).status == match_patient(other, records).status


@settings(max_examples=40, deadline=None)
@given(definitions)
def test_hash_follows_what_is_said_and_not_how_it_is_named(definition: CohortDefinition) -> None:
    said = definition.model_dump(mode="json")
    first = {**said["inclusion"][0], "id": "named", "text": "in the protocol's words"}
    renamed = load_definition({**said, "name": "other", "title": "T", "inclusion": [first, *said["inclusion"][1:]]})
    assert renamed.hash() == definition.hash()
    more = [*said["inclusion"], {"kind": "age", "max": 99}]
    assert load_definition({**said, "inclusion": more}).hash() != definition.hash()
    other = "keep" if definition.unknown == "exclude" else "exclude"
    assert load_definition({**said, "unknown": other}).hash() != definition.hash()


@pytest.mark.parametrize("name", available_definitions())
def test_shipped_definitions_are_read_and_hash_the_same_every_time(name: str) -> None:
    definition = load_definition(name)
    assert definition.name == name
    assert definition.hash() == load_definition(definition.model_dump(mode="json")).hash()
    assert all(part.kind for _, _, item in definition.criteria() for part in walk(item))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "name"),
        ({"name": "A b", "inclusion": [{"kind": "treated"}]}, "pattern"),
        ({"name": "a"}, "at least one criterion"),
        ({"name": "a", "inclusion": [{"kind": "age"}]}, "at least one of min"),
        ({"name": "a", "inclusion": [{"kind": "age", "min": 60, "max": 50}]}, "nothing is at least 60"),
        ({"name": "a", "inclusion": [{"kind": "blood"}]}, "blood"),
        ({"name": "a", "inclusion": [{"kind": "lab", "test": "ALT", "max": 1, "window": {"before": "soon"}}]}, "soon"),
        ({"name": "a", "inclusion": [{"kind": "treated", "id": "x"}, {"kind": "treated", "id": "x"}]}, "several"),
        ({"name": "a", "index": {"at": "time"}, "inclusion": [{"kind": "treated"}]}, "at: time"),
        ({"name": "a", "inclusion": [{"kind": "medication"}]}, "names or classes"),
    ],
)
def test_wrong_criteria_are_refused_with_the_place_and_the_reason(said: dict[str, Any], why: str) -> None:
    with pytest.raises(CriteriaError, match=why):
        load_definition(said)


def test_unknown_names_are_answered_with_those_there_are() -> None:
    with pytest.raises(CriteriaError, match="cdisc-pilot-eligibility"):
        load_definition("no-such-criteria")


def test_negation_is_kept_in_the_model() -> None:
    assert isinstance(criterion(kind="not", of={"kind": "treated"}), Not)


def test_the_example_of_the_docs_is_understood() -> None:
    import yaml

    text = (Path(__file__).resolve().parents[2] / "docs" / "plugins.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    definition = load_definition(yaml.safe_load(example))
    assert [name for _, name, _ in definition.criteria()] == ["age", "alt", "pressure", "syncope", "donepezil"]
