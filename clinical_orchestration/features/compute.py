"""Feature rows from silver tables, point in time correct, in Spark: frames in, frames out.

The plan is one long table and one pivot. Each family joins its records to the feature times, keeps what was known
at the time, aggregates to one row a (patient, time, group), and hands on an array of doubles. The arrays are
united, collected into one map a (patient, time), and read out of it into columns by plain projections. So there is no
aggregation with hundreds of expressions, which Spark could not compile.

What was known: ``known_at`` of a record is the later of ``event_time`` and ``received_at``; a feature at t uses
records with ``known_at <= t``. Facts that a record gets later are not used before their own time:

- an end date counts at t only where it is not after t and not after the day on which its record was received. Trials
  copy end dates back into earlier reports, so an end after the record's receipt was written later;
- the start of treatment is unknown before it happens, and with it all that hangs on it (arm, baseline by first dose);
- the end of treatment and the arm that was taken in the end are not used at all.

All time arithmetic is on microseconds since 1970, so results do not depend on the session's time zone.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import reduce
from typing import TYPE_CHECKING

from clinical_orchestration.features import definitions as defs
from clinical_orchestration.tables import FEATURE_KEY_COLUMNS

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from clinical_orchestration.trials import TrialProfile

_DAY_US = 86_400_000_000
_SECOND_US = 1_000_000
_ROW = ("patient_id", "feature_time")

_CONTEXT = ("age_years", "sex_male", "site_number", "arm_placebo", "arm_dose_rank", "on_treatment", "day_in_trial",
            "days_since_enrolment")  # fmt: skip
_MEDICATIONS = ("med_polypharmacy", "med_high_risk_count", "med_started_count", "med_stopped_count", "med_drugs_ever",
                "med_classes_active")  # fmt: skip
_STUDY_DRUG = ("study_dose_current", "study_dose_max", "study_dose_change", "study_dose_days", "study_dose_records")
_AE_COUNTS = ("ae_count_ever", "ae_count_on_treatment", "ae_count_lookback", "ae_reported_lookback", "ae_ongoing_count",
              "ae_distinct_types", "ae_related_count", "ae_onset_days", "ae_max_grade_ever",
              "ae_max_grade_lookback")  # fmt: skip
_ZERO_WHEN_UNKNOWN = (*_MEDICATIONS, "study_dose_records", *_AE_COUNTS, "ae_rate_on_treatment", "on_treatment",
                      *(f"ae_{name}_count" for name in defs.BODY_SYSTEMS))  # fmt: skip


def _us(column: Column) -> Column:
    """Return a timestamp as microseconds since 1970."""
    from pyspark.sql import functions as F  # noqa: N812

    return F.unix_micros(column)


def _length(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1)


def _floor(value: Column, step: int) -> Column:
    """Return how many whole steps a whole number holds, rounded down, exactly (no division of doubles is rounded)."""
    from pyspark.sql import functions as F  # noqa: N812

    return ((value - F.pmod(value, F.lit(step))) / F.lit(step)).cast("long")


def feature_times(vitals: DataFrame, profile: TrialProfile) -> DataFrame:
    """Return when features are due: one row a (patient_id, feature_time), timestamps in UTC.

    Kind ``visit``: the last second of each UTC day with a vital sign. Kind ``interval``: each point of the grid
    (aligned to midnight UTC) that is not after the patient's last vital sign and whose interval just ended holds one.
    Only vital signs received by the feature time make a row, so a row never depends on what came later.

    Args:
        vitals: rows of ``silver/patient_vitals``; other trials' rows are left out.
        profile: the trial.
    """
    from pyspark.sql import functions as F  # noqa: N812

    times = profile.features.times
    events = vitals.where(F.col("trial") == profile.name).select(
        "patient_id", _us(F.col("event_time")).alias("event"), _us(F.col("received_at")).alias("received")
    )
    if times.kind == "visit":
        due = (_floor(F.col("event"), _DAY_US) + 1) * _DAY_US - _SECOND_US
        rows = events.withColumn("due", due).where(F.col("received") <= F.col("due"))
    else:
        if times.every is None:
            raise ValueError(f"trial {profile.name}: feature times of kind interval need 'every'")
        every = _length(times.every)
        due = -_floor(-F.col("event"), every) * every
        last = events.groupBy("patient_id").agg(F.max("event").alias("last"))
        rows = (
            events.withColumn("due", due)
            .where(F.col("received") <= F.col("due"))
            .select("patient_id", "due")
            .distinct()
            .join(last, "patient_id")
            .where(F.col("due") <= F.col("last"))
        )
    return rows.select("patient_id", F.timestamp_micros(F.col("due").cast("long")).alias("feature_time")).distinct()


def compute_features(silver: Mapping[str, DataFrame], times: DataFrame, profile: TrialProfile) -> DataFrame:
    """Return one row a feature time: the key columns, then the profile's features as nullable doubles.

    Args:
        silver: the silver tables by domain (``patient_vitals``, ``lab_results``, ``medications``,
            ``adverse_events``, ``subjects``); other trials' rows are left out.
        times: patient_id and feature_time of the rows wanted, see :func:`feature_times`. Every one gives a row.
        profile: the trial.
    """
    from pyspark.sql import functions as F  # noqa: N812

    records = {domain: _known(frame, profile) for domain, frame in silver.items()}
    facts = _subject_facts(records["subjects"])
    moments = times.select("patient_id", _us(F.col("feature_time")).alias("t")).distinct()
    moments = moments.join(F.broadcast(facts), "patient_id", "left").withColumn(
        # the first dose, unless it lies ahead or had not been recorded
        "treated_from",
        F.when(F.greatest("treatment_start", "treatment_start_known_at") <= F.col("t"), F.col("treatment_start")),
    )
    slim = moments.select("patient_id", "t", "treated_from")
    parts = [
        _context_part(moments),
        *_vital_parts(records["patient_vitals"], slim, profile),
        _lab_part(records["lab_results"], slim, profile),
        *_medication_parts(records["medications"], slim, profile),
        _adverse_event_part(records["adverse_events"], slim, profile),
    ]
    collected = (
        reduce(lambda left, right: left.unionByName(right), parts)
        .groupBy("patient_id", "t")
        .agg(F.map_from_entries(F.collect_list(F.struct("grp", "numbers"))).alias("m"))
    )
    return _columns(collected, profile)


def _known(frame: DataFrame, profile: TrialProfile) -> DataFrame:
    """Return the trial's records with ``event``, ``received`` and ``known_at`` in microseconds."""
    from pyspark.sql import functions as F  # noqa: N812

    received = F.coalesce(_us(F.col("received_at")), _us(F.col("event_time")))
    return (
        frame.where((F.col("trial") == profile.name) & F.col("event_time").isNotNull())
        .withColumn("event", _us(F.col("event_time")))
        .withColumn("received", received)
        .withColumn("known_at", F.greatest("event", "received"))
    )


def _numbers(group: str | Column, values: list[Column]) -> list[Column]:
    """Return the two columns of a part: the group's name and its values as an array of doubles."""
    from pyspark.sql import functions as F  # noqa: N812

    name = F.lit(group) if isinstance(group, str) else group
    return [name.alias("grp"), F.array(*(value.cast("double") for value in values)).alias("numbers")]


def _days(microseconds: Column) -> Column:
    from pyspark.sql import functions as F  # noqa: N812

    return microseconds / F.lit(float(_DAY_US))


# --- context ----------------------------------------------------------------------------------------------------------


def _subject_facts(subjects: DataFrame) -> DataFrame:
    """Return one row a patient: each fact as the first record that states it says, and when it was known.

    The first statement, not the last, so that a later correction never changes earlier feature rows.
    """
    from pyspark.sql import functions as F  # noqa: N812

    fields = {
        "age_years": F.col("age_years"),
        "sex": F.upper("sex"),
        "site": F.col("site"),
        "arm": F.lower("arm"),
        "treatment_start": _us(F.col("treatment_start")),
        "enrolled": F.col("event"),
    }
    order = F.struct("known_at", "source_position")
    aggregates = []
    for name, value in fields.items():
        stated = value.isNotNull()
        aggregates.append(F.min_by(value, F.when(stated, order)).alias(name))
        aggregates.append(F.min(F.when(stated, F.col("known_at"))).alias(f"{name}_known_at"))
    return subjects.groupBy("patient_id").agg(*aggregates)


def _context_part(moments: DataFrame) -> DataFrame:
    from pyspark.sql import functions as F  # noqa: N812

    t = F.col("t")

    def known(name: str) -> Column:
        return F.when(F.col(f"{name}_known_at") <= t, F.col(name))

    sex = known("sex")
    # Arms are read for what all trials mean by their names; an arm is assigned, and known, with the first dose.
    arm = F.when(F.col("treated_from").isNotNull(), known("arm"))
    placebo = arm.rlike("placebo|control|sham|vehicle|standard of care")
    rank = (
        F.when(placebo, 0)
        .when(arm.contains("low"), 1)
        .when(arm.rlike("medium|mid|intermediate"), 2)
        .when(arm.contains("high"), 3)
    )
    values = [
        known("age_years"),
        F.when(sex.isin("M", "MALE"), 1).when(sex.isin("F", "FEMALE"), 0),
        F.regexp_replace(known("site"), "[^0-9]", "").try_cast("double"),
        placebo.cast("int"),
        rank,
        F.col("treated_from").isNotNull().cast("int"),
        _days(t - F.col("treated_from")),
        _days(t - known("enrolled")),
    ]
    return moments.select("patient_id", "t", *_numbers("context", values))


# --- vital signs ------------------------------------------------------------------------------------------------------


def _vital_parts(vitals: DataFrame, moments: DataFrame, profile: TrialProfile) -> list[DataFrame]:
    """Return window statistics of each vital and code, and of the days with vitals.

    The join is by (patient, stretch of time as long as the longest window): a window reaches into its own stretch and
    the one before, so a long trial costs no more a row than a short one.
    """
    from pyspark.sql import functions as F  # noqa: N812

    settings = profile.features
    windows = defs.window_names(profile)
    reach = _length(settings.windows[windows[-1]])
    groups = {
        code: f"v:{vital}:{rank}"
        for vital, definition in settings.vitals.items()
        for rank, code in enumerate(definition.codes)
    }
    group = F.create_map(*(F.lit(text) for pair in groups.items() for text in pair))
    readings = vitals.where(F.col("test_code").isin(*groups) & F.col("value").isNotNull()).select(
        "patient_id",
        F.try_element_at(group, F.col("test_code")).alias("grp"),
        "event",
        "received",
        "known_at",
        "source_position",
        "value",
        _floor(F.col("event"), reach).alias("stretch"),
    )
    own = _floor(F.col("t"), reach)
    wanted = moments.select("patient_id", "t", F.explode(F.array(own, own - 1)).alias("stretch"))
    age = F.col("t") - F.col("event")
    seen = (
        readings.join(wanted, ["patient_id", "stretch"])
        .where((F.col("known_at") <= F.col("t")) & (age < reach))
        .select("patient_id", "t", "grp", "event", "received", "source_position", "value", age.alias("age"))
    )
    statistics = []
    for window in windows:
        inside = F.when(F.col("age") < _length(settings.windows[window]), F.col("value"))
        statistics += [
            F.avg(inside),
            F.stddev_samp(inside),
            F.min(inside),
            F.max(inside),
            # x in days before t: the slope is per day, and numbers stay small
            F.regr_slope(inside, -_days(F.col("age"))),
        ]
    statistics += [F.max_by("value", F.struct("event", "received", "source_position")), F.count("value")]
    per_vital = (
        seen.groupBy("patient_id", "t", "grp")
        .agg(*(statistic.alias(f"s{number}") for number, statistic in enumerate(statistics)))
        .select("patient_id", "t", *_numbers(F.col("grp"), [F.col(f"s{n}") for n in range(len(statistics))]))
    )
    # days with a vital sign: first one row a day, so that few rows meet the feature times
    days = vitals.groupBy("patient_id", _floor(F.col("event"), _DAY_US).alias("day")).agg(
        F.min("known_at").alias("known_at"), F.min("event").alias("event")
    )
    today = _floor(F.col("t") - 1, _DAY_US)  # midnight ends the day before
    per_day = (
        days.withColumn("stretch", _floor(F.col("event"), reach))
        .join(wanted, ["patient_id", "stretch"])
        .where((F.col("known_at") <= F.col("t")) & (age < reach))
        .groupBy("patient_id", "t")
        .agg(
            F.count("day").alias("days"),
            (F.first(today) - F.max(F.when(F.col("day") < today, F.col("day")))).alias("gap"),
        )
        .select("patient_id", "t", *_numbers("days", [F.col("days"), F.col("gap")]))
    )
    return [per_vital, per_day]


# --- labs -------------------------------------------------------------------------------------------------------------


def _lab_part(labs: DataFrame, moments: DataFrame, profile: TrialProfile) -> DataFrame:
    """Return statistics of each lab test.

    The baseline is the result flagged as such; else, after the first dose, the last result not after it; else the
    first result. Flags, too, count only from the first dose on: they are set in hindsight.
    """
    from pyspark.sql import functions as F  # noqa: N812

    settings = profile.features
    window = _length(settings.lab_trend_window)
    results = labs.where(F.col("test_code").isin(*settings.labs) & F.col("value").isNotNull()).select(
        "patient_id",
        "test_code",
        "event",
        "known_at",
        "value",
        F.coalesce("baseline_flag", F.lit(False)).alias("flagged"),
        (
            F.coalesce(F.col("reference_indicator").isin("LOW", "HIGH", "ABNORMAL"), F.lit(False))
            | F.coalesce(F.col("value") < F.col("reference_low"), F.lit(False))
            | F.coalesce(F.col("value") > F.col("reference_high"), F.lit(False))
        ).alias("out"),
        F.struct("event", "received", "source_position").alias("place"),
    )
    seen = results.join(moments, "patient_id").where(F.col("known_at") <= F.col("t"))
    age = F.col("t") - F.col("event")
    recent = age < window
    inside = F.when(recent, F.col("value"))
    place, value, treated_from = F.col("place"), F.col("value"), F.col("treated_from")
    flagged = F.col("flagged") & treated_from.isNotNull()
    return (
        seen.groupBy("patient_id", "t", "test_code")
        .agg(
            F.max_by(value, place).alias("latest"),
            F.avg(inside).alias("mean"),
            F.regr_slope(inside, -_days(age)).alias("trend"),
            F.coalesce(
                F.max_by(value, F.when(flagged, place)),
                F.max_by(value, F.when(F.col("event") <= treated_from, place)),
                F.min_by(value, place),
            ).alias("baseline"),
            F.count_if(recent & F.col("out")).alias("out"),
            _days(F.min(age)).alias("since"),
        )
        .select(
            "patient_id",
            "t",
            *_numbers(
                F.concat(F.lit("l:"), F.col("test_code")),
                [
                    F.col("latest"),
                    F.col("mean"),
                    F.col("trend"),
                    F.col("latest") - F.col("baseline"),
                    F.col("out"),
                    F.col("since"),
                ],
            ),
        )
    )


# --- medications ------------------------------------------------------------------------------------------------------


def _medication_parts(medications: DataFrame, moments: DataFrame, profile: TrialProfile) -> list[DataFrame]:
    """Return counts of the drugs taken, and the study drug's dosing."""
    from pyspark.sql import functions as F  # noqa: N812

    settings = profile.features
    lookback = _length(settings.adverse_event_lookback)
    start = F.coalesce(_us(F.col("start_time")), F.col("event"))
    text = F.upper(F.concat_ws(" ", "drug_name", "standardized_name", "drug_class"))
    risky = reduce(
        lambda left, right: left | right,
        (text.contains(drug.upper()) for drug in settings.high_risk_drugs),
        F.lit(False),
    )
    known = medications.select(
        "patient_id",
        F.upper(F.trim("drug_name")).alias("drug"),
        F.upper("drug_class").alias("drug_class"),
        "dose",
        "received",
        "known_at",
        "source_position",
        start.alias("start"),
        F.coalesce(F.col("start_precision").isin("day", "minute", "second"), F.lit(True)).alias("start_exact"),
        _us(F.col("end_time")).alias("end"),
        F.coalesce("study_drug", F.lit(False)).alias("study_drug"),
        risky.alias("risky"),
    )
    t = F.col("t")
    seen = known.join(moments, "patient_id").where((F.col("known_at") <= t) & (F.col("start") <= t))
    same_second = _floor(F.col("end"), _SECOND_US) * _SECOND_US  # an end "on the day" is its last microsecond
    ended = (same_second <= t) & (_floor(F.col("end"), _DAY_US) <= _floor(F.col("received"), _DAY_US))
    seen = seen.withColumn("ended", F.coalesce(ended, F.lit(False)))

    courses = (  # lists repeat a medication at each visit: one course is one drug and start
        seen.where(~F.col("study_drug"))
        .groupBy("patient_id", "t", "drug", "start")
        .agg(
            F.bool_or("ended").alias("ended"),
            F.bool_or("risky").alias("risky"),
            F.bool_or("start_exact").alias("start_exact"),
            F.max("drug_class").alias("drug_class"),
        )
    )
    active = ~F.col("ended")
    started = F.col("start_exact") & (t - F.col("start") < lookback)
    drugs = (
        courses.groupBy("patient_id", "t")
        .agg(
            F.count_distinct(F.when(active, F.col("drug"))).alias("polypharmacy"),
            F.count_distinct(F.when(active & F.col("risky"), F.col("drug"))).alias("risky"),
            F.count_distinct(F.when(started, F.col("drug"))).alias("started"),
            F.count_if("ended").alias("stopped"),
            F.count_distinct("drug").alias("ever"),
            F.count_distinct(F.when(active, F.col("drug_class"))).alias("classes"),
        )
        .select(
            "patient_id",
            "t",
            *_numbers("drugs", [F.col(n) for n in ("polypharmacy", "risky", "started", "stopped", "ever", "classes")]),
        )
    )
    order = F.struct("start", "received", "source_position")
    study = (
        seen.where(F.col("study_drug"))
        .groupBy("patient_id", "t")
        .agg(
            F.max_by(F.when(F.col("ended"), 0.0).otherwise(F.col("dose")), order).alias("current"),
            F.max("dose").alias("highest"),
            F.min_by("dose", order).alias("first"),
            _days(F.first("t") - F.max("start")).alias("days"),
            F.count_distinct("start").alias("records"),
        )
        .select(
            "patient_id",
            "t",
            *_numbers(
                "study_drug",
                [
                    F.col("current"),
                    F.col("highest"),
                    F.col("current") - F.col("first"),
                    F.col("days"),
                    F.col("records"),
                ],
            ),
        )
    )
    return [drugs, study]


# --- adverse events ---------------------------------------------------------------------------------------------------


def _adverse_event_part(events: DataFrame, moments: DataFrame, profile: TrialProfile) -> DataFrame:
    """Return the history of adverse events as it was known."""
    from pyspark.sql import functions as F  # noqa: N812

    lookback = _length(profile.features.adverse_event_lookback)
    t = F.col("t")
    seen = events.select(
        "patient_id",
        "event",
        "received",
        "known_at",
        F.upper("event_type").alias("event_type"),
        F.lower("body_system").alias("body_system"),
        F.upper("causality").alias("causality"),
        F.regexp_extract("severity", "([0-9]+)", 1).try_cast("int").alias("grade"),
        F.coalesce(F.col("onset_precision").isin("year", "month", "missing"), F.lit(False)).alias("vague"),
        _us(F.col("end_time")).alias("end"),
    )
    seen = seen.join(moments, "patient_id").where(F.col("known_at") <= t)
    same_second = _floor(F.col("end"), _SECOND_US) * _SECOND_US
    ended = (same_second <= t) & (_floor(F.col("end"), _DAY_US) <= _floor(F.col("received"), _DAY_US))
    distinct = seen.groupBy("patient_id", "t", "event_type", "event").agg(  # reports repeat an event
        F.first("treated_from").alias("treated_from"),
        F.bool_or(F.coalesce(ended, F.lit(False))).alias("ended"),
        F.bool_or(F.coalesce(F.col("causality").rlike("POSSIBLE|PROBABLE|DEFINITE|RELATED|CERTAIN"), F.lit(False))
                  & ~F.coalesce(F.col("causality").rlike("NOT|UN|IMPROBABLE"), F.lit(False))).alias("related"),
        F.max("grade").alias("grade"),
        F.min("received").alias("reported"),
        F.bool_or("vague").alias("vague"),
        F.max("body_system").alias("body_system"),
    )  # fmt: skip
    exact = ~F.col("vague")
    recent = exact & (t - F.col("event") < lookback)
    treated = F.coalesce(exact & (F.col("event") >= F.col("treated_from")), F.lit(False))
    days_treated = _days(F.first("t") - F.first("treated_from"))
    aggregates = [
        F.count(F.lit(1)),
        F.count_if(treated),
        F.count_if(recent),
        F.count_if(t - F.col("reported") < lookback),
        F.count_if(~F.col("ended")),
        F.count_distinct("event_type"),
        F.count_if("related"),
        F.count_distinct(F.when(exact, _floor(F.col("event"), _DAY_US))),
        F.coalesce(F.max("grade"), F.lit(0)),
        F.coalesce(F.max(F.when(recent, F.col("grade"))), F.lit(0)),
        _days(F.first("t") - F.max(F.when(exact, F.col("event")))),
        # within the first days a rate would be noise: at least a week counts as the denominator
        F.count_if(treated) * 30.0 / F.greatest(days_treated, F.lit(7.0)),
        *(F.count_if(F.col("body_system").contains(part)) for part in defs.BODY_SYSTEMS.values()),
    ]
    return (
        distinct.groupBy("patient_id", "t")
        .agg(*(aggregate.alias(f"a{number}") for number, aggregate in enumerate(aggregates)))
        .select("patient_id", "t", *_numbers("ae", [F.col(f"a{n}") for n in range(len(aggregates))]))
    )


# --- columns ----------------------------------------------------------------------------------------------------------


def _columns(collected: DataFrame, profile: TrialProfile) -> DataFrame:
    """Read the map of arrays into columns, add what follows from them, and put all in the documented order."""
    from pyspark.sql import functions as F  # noqa: N812

    settings = profile.features
    windows = defs.window_names(profile)
    statistics = [f"{statistic}_{window}" for window in windows for statistic in defs.WINDOW_STATISTICS]
    vital_columns = [*statistics, "latest", f"count_{windows[-1]}"]
    layout: dict[str, tuple[str, ...]] = {
        "context": _CONTEXT,
        "days": (f"vital_days_{windows[-1]}", "days_since_previous_vitals"),
        "drugs": _MEDICATIONS,
        "study_drug": _STUDY_DRUG,
        "ae": (*_AE_COUNTS, "ae_days_since_last", "ae_rate_on_treatment",
               *(f"ae_{name}_count" for name in defs.BODY_SYSTEMS)),
    }  # fmt: skip
    found = F.col("m")
    arrays = {name: F.try_element_at(found, F.lit(name)) for name in layout}
    for vital, definition in settings.vitals.items():
        ranks = range(len(definition.codes))
        arrays[vital] = F.coalesce(*(F.try_element_at(found, F.lit(f"v:{vital}:{rank}")) for rank in ranks))
        layout[vital] = tuple(f"{vital}_{name}" for name in vital_columns)
    lab_columns = (*defs.LAB_STATISTICS, "days_since")
    for test in settings.labs:
        arrays[f"l:{test}"] = F.try_element_at(found, F.lit(f"l:{test}"))
        layout[f"l:{test}"] = tuple(defs.lab_name(test, statistic) for statistic in lab_columns)

    # Two projections, arrays and then everything else: each one more costs planning and compiling on every run.
    stage = collected.select("patient_id", "t", *(array.alias(f"g{n}") for n, array in enumerate(arrays.values())))
    counts = {*_ZERO_WHEN_UNKNOWN, f"vital_days_{windows[-1]}"}
    counts |= {f"{vital}_count_{windows[-1]}" for vital in settings.vitals}
    counts |= {defs.lab_name(test, "out_of_range_count") for test in settings.labs}
    columns: dict[str, Column] = {}
    for n, group in enumerate(arrays):
        for position, name in enumerate(layout[group]):
            value = F.col(f"g{n}").getItem(position)
            columns[name] = F.coalesce(value, F.lit(0.0)) if name in counts else value
    columns |= _derived(columns, profile)
    columns |= _labs_overall(columns, profile)
    for name, (operator, left, right) in defs.interaction_terms(tuple(settings.vitals), settings.labs).items():
        columns[name] = columns[left] * columns[right] if operator == "*" else _ratio(columns[left], columns[right])
    keys = {
        "trial": F.lit(profile.name),
        "patient_id": F.col("patient_id"),
        "feature_time": F.timestamp_micros(F.col("t")),
        "feature_date": F.date_from_unix_date(_floor(F.col("t"), _DAY_US).cast("int")),
    }
    return stage.select(
        *(keys[name].alias(name) for name in FEATURE_KEY_COLUMNS),
        *(columns[name].alias(name) for name in defs.feature_names(profile)),
    )


def _ratio(left: Column, right: Column) -> Column:
    """Return left / right, null where right is 0."""
    from pyspark.sql import functions as F  # noqa: N812

    return F.when(right != 0, left / right)


def _labs_overall(columns: Mapping[str, Column], profile: TrialProfile) -> dict[str, Column]:
    """Return what follows from the columns of all lab tests of the same row."""
    from pyspark.sql import functions as F  # noqa: N812

    tests = profile.features.labs
    since = [columns[defs.lab_name(test, "days_since")] for test in tests]
    counts = [columns[defs.lab_name(test, "out_of_range_count")] for test in tests]
    null = F.lit(None).cast("double")
    return {
        "lab_out_of_range_total": reduce(lambda left, right: left + right, counts, F.lit(0.0)),
        "lab_days_since_latest": F.least(*since, null, null),  # at least two arguments, whatever the profile asks
    }


def _derived(columns: Mapping[str, Column], profile: TrialProfile) -> dict[str, Column]:
    """Return what follows from the vitals' columns of the same row."""
    vitals = profile.features.vitals
    windows = defs.window_names(profile)
    derived: dict[str, Column] = {}
    for vital in vitals:
        derived[f"{vital}_deviation"] = columns[f"{vital}_latest"] - columns[f"{vital}_mean_{windows[-1]}"]
    for suffix in defs.derived_suffixes(windows):
        if {"systolic_bp", "diastolic_bp"} <= set(vitals):
            systolic, diastolic = columns[f"systolic_bp_{suffix}"], columns[f"diastolic_bp_{suffix}"]
            derived[f"pulse_pressure_{suffix}"] = systolic - diastolic
            derived[f"mean_arterial_pressure_{suffix}"] = diastolic + (systolic - diastolic) / 3
        if {"systolic_bp", "heart_rate"} <= set(vitals):
            rate, systolic = columns[f"heart_rate_{suffix}"], columns[f"systolic_bp_{suffix}"]
            derived[f"shock_index_{suffix}"] = _ratio(rate, systolic)
    return derived
