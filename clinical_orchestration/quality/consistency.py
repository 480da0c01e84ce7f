"""Rules across the domains of a trial: who is a patient, what cannot be at that time, what contradicts itself.

Each function takes the frames of one trial (:data:`COLUMNS`) and returns one :class:`RuleResult`. Days are compared
and not times, because SDTM dates often have no time of day, and only dates that are known to the day.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from clinical_orchestration.quality.results import SAMPLE, RuleResult

if TYPE_CHECKING:
    import polars as pl

COLUMNS: dict[str, tuple[str, ...]] = {
    "subjects": (
        "patient_id", "event_time", "received_at", "site", "arm", "age_years", "sex", "treatment_start",
        "treatment_end", "death_time", "screen_failure", "source", "source_position",
    ),
    "patient_vitals": ("patient_id", "event_time", "received_at", "test_code", "unit", "site", "arm",
                       "source_position"),
    "lab_results": ("patient_id", "event_time", "received_at", "test_code", "unit", "value", "source_position"),
    "medications": ("patient_id", "event_time", "received_at", "start_time", "start_precision", "end_time",
                    "study_drug", "source_position"),
    "adverse_events": ("patient_id", "event_time", "received_at", "event_type", "severity", "onset_precision",
                       "end_time", "source_position"),
}  # fmt: skip
"""Columns that the rules need of each silver table."""

FOLLOW_UP = timedelta(days=90)
"""How long after the end of treatment records may still come: follow-up visits and the safety reporting period."""

SCREENING = timedelta(days=60)
"""How long before its demographics a subject of SDTM files may have been measured: where a file has no date of consent,
the subject's time is that of the collection of demographics, and screening may begin before."""

DAILY = ("day", "hour", "minute", "second")
"""Precisions of a partial date that know the day."""

MALE_ONLY = r"PROSTAT|TESTIC|EPIDIDYM|ERECTILE|PENI[SL]|SCROT"
FEMALE_ONLY = r"PREGNAN|OVARI|UTERIN|MENSTR|VAGIN|MENORRH|CERVICITIS|ENDOMETRI|LACTATION DISORDER"
MALE_TESTS = ("PSA", "FREEPSA")
FEMALE_TESTS = ("HCG", "PREG", "BHCG")

Frames = Mapping[str, "pl.DataFrame"]
_MEASURED = ("patient_vitals", "lab_results")


def check_consistency(frames: Frames) -> list[RuleResult]:
    """Apply every rule across domains; a trial without subjects gives none, because nothing can be compared."""
    if frames["subjects"].is_empty():
        return []
    return [result for rule in RULES for result in rule(frames)]


def _result(
    rule: str,
    table: str,
    name: str,
    description: str,
    rows: pl.DataFrame,
    wrong: pl.Expr,
    *,
    tolerance: float = 0.0,
    blocking: bool = False,
    group: str | None = None,
) -> RuleResult:
    """Count the rows for which `wrong` is true; null is not wrong."""
    import polars as pl

    failing = rows.filter(wrong.fill_null(False))
    groups: dict[str, int] = {}
    if group is not None and failing.height:
        counted = failing.group_by(pl.col(group).fill_null("(none)")).len().sort("len", descending=True)
        groups = {str(key): int(count) for key, count in counted.iter_rows()}
    positions = failing.get_column("source_position").drop_nulls().unique(maintain_order=True)
    return RuleResult(
        name,
        description,
        blocking=blocking,
        checked=rows.height,
        failed=failing.height,
        tolerance=tolerance,
        rule=rule,
        table=table,
        positions=tuple(positions.head(SAMPLE).to_list()),
        groups=groups,
    )


def _with_subjects(frames: Frames, table: str) -> pl.DataFrame:
    """Return a table's rows of known subjects, beside what is known of these (prefix ``subject_``)."""
    import polars as pl

    known = frames["subjects"].select(
        "patient_id",
        *(
            pl.col(name).alias(f"subject_{name}")
            for name in (
                "event_time", "site", "arm", "sex", "treatment_start", "treatment_end", "death_time", "screen_failure",
                "source",
            )
        ),
    )  # fmt: skip
    return frames[table].join(known.unique("patient_id"), on="patient_id", how="inner")


def _day(column: str) -> pl.Expr:
    import polars as pl

    return pl.col(column).dt.truncate("1d")


def unknown_subjects(frames: Frames) -> list[RuleResult]:
    """Records belong to subjects of the trial (DQ-XD-01; SDTM: SD0064, CG0029)."""
    import polars as pl

    known = frames["subjects"].select("patient_id").unique().with_columns(known=pl.lit(True))
    return [
        _result(
            "DQ-XD-01",
            table,
            "subjects_are_known",
            "Records belong to subjects of the trial",
            frames[table].join(known, on="patient_id", how="left"),
            pl.col("known").is_null(),
            tolerance=0.02,
        )
        for table in frames
        if table != "subjects"
    ]


def before_consent(frames: Frames) -> list[RuleResult]:
    """Nothing was measured or reported before consent or enrolment (DQ-XD-02)."""
    import polars as pl

    results = []
    for table in (*_MEASURED, "adverse_events"):
        rows = _with_subjects(frames, table)
        if table == "adverse_events":
            early = (_day("event_time") < _day("subject_event_time")) & pl.col("onset_precision").is_in(DAILY)
        else:
            margin = pl.when(pl.col("subject_source").str.starts_with("file:")).then(SCREENING).otherwise(timedelta(0))
            early = _day("event_time") < _day("subject_event_time") - margin
        results.append(
            _result(
                "DQ-XD-02",
                table,
                "records_follow_consent",
                "No measurement or adverse event lies before the subject's consent or enrolment",
                rows,
                early,
                tolerance=0.01,
                group="subject_site",
            )
        )
    return results


def after_death(frames: Frames) -> list[RuleResult]:
    """Nothing is measured, given or happens after a subject's death (DQ-XD-03)."""
    import polars as pl

    results = []
    for table in frames:
        if table == "subjects":
            continue
        rows = _with_subjects(frames, table).filter(pl.col("subject_death_time").is_not_null())
        late = _day("event_time") > _day("subject_death_time")
        results.append(
            _result(
                "DQ-XD-03",
                table,
                "nothing_after_death",
                "No record lies after the subject's death",
                rows,
                late,
                blocking=True,
                group="subject_site",
            )
        )
    return results


def after_participation(frames: Frames) -> list[RuleResult]:
    """Nothing is measured later than the follow-up after the end of treatment or withdrawal (DQ-XD-04)."""
    import polars as pl

    results = []
    for table in (*_MEASURED, "adverse_events"):
        rows = _with_subjects(frames, table).filter(pl.col("subject_treatment_end").is_not_null())
        results.append(
            _result(
                "DQ-XD-04",
                table,
                "records_end_with_follow_up",
                f"No record lies more than {FOLLOW_UP.days} days after the end of treatment or withdrawal",
                rows,
                pl.col("event_time") > pl.col("subject_treatment_end") + FOLLOW_UP,
                tolerance=0.01,
                group="subject_site",
            )
        )
    return results


def date_order(frames: Frames) -> list[RuleResult]:
    """Dates of one record are in a possible order (DQ-XD-05; SDTM: SD0013, SD1002)."""
    import polars as pl

    day = pl.duration(days=1)
    results = []
    for table, rows in frames.items():
        wrong = pl.col("received_at") + day < pl.col("event_time")
        if table == "medications":
            wrong = wrong.fill_null(False) | (pl.col("end_time") < pl.col("start_time")).fill_null(False)
        elif table == "adverse_events":
            wrong = wrong.fill_null(False) | (pl.col("end_time") < pl.col("event_time")).fill_null(False)
        elif table == "subjects":
            wrong = (
                wrong.fill_null(False)
                | (pl.col("treatment_end") < pl.col("treatment_start")).fill_null(False)
                | (_day("death_time") < _day("event_time")).fill_null(False)
                | (_day("death_time") < _day("treatment_start")).fill_null(False)
            )
        results.append(
            _result(
                "DQ-XD-05",
                table,
                "dates_are_in_order",
                "What ends began before, nothing is known before it happened, nobody is treated after death",
                rows,
                wrong,
                blocking=True,
                tolerance=0.005,
            )
        )
    return results


def units_differ(frames: Frames) -> list[RuleResult]:
    """The results of one test share one unit (DQ-XD-06; SDTM: SD0007)."""
    import polars as pl

    results = []
    for table in _MEASURED:
        rows = frames[table].filter(pl.col("unit").is_not_null())
        usual = pl.col("unit").mode().sort().first().over("test_code")
        results.append(
            _result(
                "DQ-XD-06",
                table,
                "tests_have_one_unit",
                "All results of a test are in one unit",
                rows,
                pl.col("unit") != usual,
                tolerance=0.001,
                group="test_code",
            )
        )
    return results


def sex_contradictions(frames: Frames) -> list[RuleResult]:
    """No test or event that the subject's sex excludes (DQ-XD-07)."""
    import polars as pl

    sex = pl.col("subject_sex")
    term = pl.col("event_type").str.to_uppercase()
    events = (sex.eq("F") & term.str.contains(MALE_ONLY)) | (sex.eq("M") & term.str.contains(FEMALE_ONLY))
    code = pl.col("test_code")
    labs = (sex.eq("F") & code.is_in(MALE_TESTS)) | (sex.eq("M") & code.is_in(FEMALE_TESTS))
    text = "No test or adverse event contradicts the subject's sex"
    return [
        _result("DQ-XD-07", table, "sex_is_consistent", text, _with_subjects(frames, table), wrong, group=group)
        for table, wrong, group in (("adverse_events", events, "subject_site"), ("lab_results", labs, "test_code"))
    ]


def impossible_ages(frames: Frames) -> list[RuleResult]:
    """Ages are those of adults or children that can take part, and known where the sex is (DQ-XD-08)."""
    import polars as pl

    rows = frames["subjects"].filter(~pl.col("screen_failure").fill_null(False))
    wrong = ~pl.col("age_years").is_between(0, 110, closed="right")
    return [
        _result(
            "DQ-XD-08", "subjects", "ages_are_plausible", "Ages lie above 0 and up to 110 years", rows, wrong,
            group="site",
        )
    ]  # fmt: skip


def drug_outside_treatment(frames: Frames) -> list[RuleResult]:
    """Study drug is given between start and end of treatment, and to nobody who failed screening (DQ-XD-09, DQ-XD-10).

    DQ-XD-10 is SDTM's SD0079.
    """
    import polars as pl

    rows = _with_subjects(frames, "medications").filter(pl.col("study_drug").fill_null(False))
    known = rows.filter(pl.col("start_precision").is_in(DAILY))
    day = pl.duration(days=1)
    outside = (_day("start_time") < _day("subject_treatment_start")).fill_null(False) | (
        _day("start_time") > _day("subject_treatment_end") + day
    ).fill_null(False)
    return [
        _result(
            "DQ-XD-09",
            "medications",
            "study_drug_within_treatment",
            "Study drug starts between the start and the end of the subject's treatment",
            known,
            outside,
            tolerance=0.01,
            group="subject_site",
        ),
        _result(
            "DQ-XD-10",
            "medications",
            "no_study_drug_after_screen_failure",
            "Subjects who failed screening have no study drug",
            rows,
            pl.col("subject_screen_failure"),
            blocking=True,
            group="subject_site",
        ),
    ]


def sites_and_arms_agree(frames: Frames) -> list[RuleResult]:
    """Vital signs say the site and arm of their subject (DQ-XD-11)."""
    import polars as pl

    rows = _with_subjects(frames, "patient_vitals")
    wrong = (pl.col("site") != pl.col("subject_site")).fill_null(False) | (
        pl.col("arm") != pl.col("subject_arm")
    ).fill_null(False)
    return [
        _result(
            "DQ-XD-11",
            "patient_vitals",
            "sites_and_arms_agree",
            "Vital signs name the site and the arm of their subject",
            rows,
            wrong,
            tolerance=0.001,
            group="site",
        )
    ]


def deaths_agree(frames: Frames) -> list[RuleResult]:
    """A fatal adverse event and a date of death go together (DQ-XD-12)."""
    import polars as pl

    fatal = _with_subjects(frames, "adverse_events").filter(pl.col("severity") == "grade_5")
    return [
        _result(
            "DQ-XD-12",
            "adverse_events",
            "fatal_events_have_a_death",
            "Subjects with a fatal adverse event have a date of death",
            fatal,
            pl.col("subject_death_time").is_null(),
            group="subject_site",
        )
    ]


def untreated_subjects(frames: Frames) -> list[RuleResult]:
    """Where a trial records its study drug, every treated subject has some (DQ-XD-13; SDTM: SD0070)."""
    import polars as pl

    drug = frames["medications"].filter(pl.col("study_drug").fill_null(False)).select("patient_id").unique()
    if drug.is_empty():
        return []
    treated = frames["subjects"].filter(
        ~pl.col("screen_failure").fill_null(False) & pl.col("treatment_start").is_not_null()
    )
    rows = treated.join(drug.with_columns(given=pl.lit(True)), on="patient_id", how="left")
    return [
        _result(
            "DQ-XD-13",
            "subjects",
            "treated_subjects_have_study_drug",
            "Treated subjects have at least one record of study drug",
            rows,
            pl.col("given").is_null(),
            tolerance=0.01,
            group="site",
        )
    ]


RULES: tuple[Callable[[Frames], list[RuleResult]], ...] = (
    unknown_subjects,
    before_consent,
    after_death,
    after_participation,
    date_order,
    units_differ,
    sex_contradictions,
    impossible_ages,
    drug_outside_treatment,
    sites_and_arms_agree,
    deaths_agree,
    untreated_subjects,
)
