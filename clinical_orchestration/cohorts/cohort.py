"""From criteria and a trial's silver rows to a cohort: who is in it, and how many each criterion took out.

The flow is that of a CONSORT diagram (Schulz et al. 2010, BMJ 340:c332): everybody who was screened, then one step a
criterion in the order of the definition, each with those it removed because they do not fit and because it cannot be
told, then the members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clinical_orchestration.cohorts.criteria import CohortDefinition, describe
from clinical_orchestration.cohorts.logic import Truth
from clinical_orchestration.cohorts.matching import PatientMatch, PatientRecords, match_patient

if TYPE_CHECKING:
    import polars as pl

Part = Literal["screened", "index", "inclusion", "exclusion", "cohort"]

RECORDS = {
    "subjects": "subjects",
    "patient_vitals": "vitals",
    "lab_results": "labs",
    "medications": "medications",
    "adverse_events": "adverse_events",
}
"""Domain -> attribute of :class:`PatientRecords`."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "subjects": (
        "patient_id", "event_time", "received_at", "source_position", "site", "arm", "actual_arm", "age_years", "sex",
        "race", "ethnicity", "country", "treatment_start", "screen_failure",
    ),
    "patient_vitals": ("patient_id", "event_time", "test_code", "value", "unit", "body_position"),
    "lab_results": (
        "patient_id", "event_time", "test_code", "value", "unit", "text_value", "reference_low", "reference_high",
    ),
    "medications": (
        "patient_id", "event_time", "drug_name", "standardized_name", "drug_class", "indication", "start_time",
        "start_precision", "end_time", "study_drug",
    ),
    "adverse_events": (
        "patient_id", "event_time", "event_type", "body_system", "severity", "serious", "onset_precision",
    ),
}  # fmt: skip
"""The silver columns that criteria look at."""


@dataclass(frozen=True)
class AttritionStep:
    """One step of the flow; `entered` = `remaining` + `removed` + `removed_unknown`.

    Attributes:
        part: ``screened``, ``index`` (has a time to count from), ``inclusion``, ``exclusion`` or ``cohort``.
        criterion: id of the criterion; the part's name for the other steps.
        description: what is asked, in words.
        entered: patients before the step.
        removed: of these, patients who do not fit.
        removed_unknown: of these, patients whose data does not tell.
        remaining: patients after the step.
        kept_unknown: of the remaining, patients whose data does not tell and whom the definition keeps.
    """

    part: Part
    criterion: str
    description: str
    entered: int
    removed: int
    removed_unknown: int
    remaining: int
    kept_unknown: int = 0


@dataclass(frozen=True)
class Member:
    """One screened patient.

    Attributes:
        member: whether the patient belongs to the cohort.
        removed_by: the first criterion that took the patient out (``index`` where there is no index time); None for
            members.
    """

    match: PatientMatch
    member: bool
    removed_by: str | None


@dataclass(frozen=True)
class Cohort:
    """Everybody who was screened, and the flow."""

    definition: CohortDefinition
    screened: tuple[Member, ...]
    attrition: tuple[AttritionStep, ...]

    @property
    def members(self) -> tuple[str, ...]:
        """The patients of the cohort, sorted."""
        return tuple(sorted(item.match.patient_id for item in self.screened if item.member))

    def statuses(self) -> dict[str, int]:
        """Return the number of patients by status, criteria of the removed ones included."""
        counts = {"eligible": 0, "ineligible": 0, "undetermined": 0, "no index": 0}
        for item in self.screened:
            counts[item.match.status] += 1
        return counts


def assemble(definition: CohortDefinition, patients: Iterable[PatientRecords]) -> Cohort:
    """Match every patient and count the flow."""
    matches = sorted((match_patient(definition, records) for records in patients), key=lambda item: item.patient_id)
    return Cohort(
        definition,
        tuple(_member(definition, match) for match in matches),
        tuple(_flow(definition, matches)),
    )


def assemble_from_frames(definition: CohortDefinition, frames: Mapping[str, pl.DataFrame]) -> Cohort:
    """Match every patient of a trial's silver frames (domain -> rows with :data:`COLUMNS`)."""
    return assemble(definition, patients_of(definition, frames))


def patients_of(definition: CohortDefinition, frames: Mapping[str, pl.DataFrame]) -> list[PatientRecords]:
    """Return each patient's rows; of vitals and labs only the tests that the definition looks at.

    Everybody with a row in any of the frames counts as screened.
    """
    import polars as pl

    wanted = definition.tests()
    everyone: set[str] = set()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for domain, attribute in RECORDS.items():
        frame = frames.get(domain)
        if frame is None or frame.is_empty():
            continue
        everyone |= set(frame["patient_id"].unique().to_list())
        columns = [name for name in COLUMNS[domain] if name in frame.columns]
        # the first and last record of a patient may be of any test
        if domain in wanted and definition.index.at not in ("first_record", "last_record"):
            frame = frame.filter(pl.col("test_code").str.to_uppercase().is_in(sorted(wanted[domain])))
        for row in frame.select(columns).iter_rows(named=True):
            rows.setdefault(row["patient_id"], {}).setdefault(attribute, []).append(row)
    return [PatientRecords(patient, **rows.get(patient, {})) for patient in sorted(everyone)]


def _removes(definition: CohortDefinition, truth: Truth) -> bool:
    return truth is Truth.NOT_MET or (truth is Truth.UNKNOWN and definition.unknown == "exclude")


def _member(definition: CohortDefinition, match: PatientMatch) -> Member:
    if match.index_time is None:
        return Member(match, member=False, removed_by="index")
    removed_by = next((item.criterion for item in match.results if _removes(definition, item.passed)), None)
    return Member(match, member=removed_by is None, removed_by=removed_by)


def _flow(definition: CohortDefinition, matches: Sequence[PatientMatch]) -> list[AttritionStep]:
    left = list(matches)
    steps = [AttritionStep("screened", "screened", "screened", len(left), 0, 0, len(left))]
    indexed = [match for match in left if match.index_time is not None]
    label = f"has an index time ({definition.index.at.replace('_', ' ')})"
    steps.append(AttritionStep("index", "index", label, len(left), len(left) - len(indexed), 0, len(indexed)))
    left = indexed
    for number, (part, name, criterion) in enumerate(definition.criteria()):
        truths = [match.results[number].passed for match in left]
        kept = [match for match, truth in zip(left, truths, strict=True) if not _removes(definition, truth)]
        unknown = truths.count(Truth.UNKNOWN)
        keeps = definition.unknown == "keep"
        steps.append(
            AttritionStep(
                part,
                name,
                describe(criterion),
                len(left),
                truths.count(Truth.NOT_MET),
                0 if keeps else unknown,
                len(kept),
                unknown if keeps else 0,
            )
        )
        left = kept
    steps.append(AttritionStep("cohort", "cohort", "cohort", len(left), 0, 0, len(left)))
    return steps
