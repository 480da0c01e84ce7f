"""Which days a backfill run is about.

A run says it in one of four ways, and the first that is there counts:

1. partition tags, as a Dagster backfill, ``dagster asset materialize --partition-range`` and the launch dialog set
   them: ``dagster/partition``, or ``dagster/asset_partition_range_start`` and ``..._end``;
2. ``start_date`` and ``end_date`` in the run's conf (both days included; either may be left out);
3. the days that an asset backfill targets, for steps that Dagster runs apart from the partitioned one;
4. nothing: all days of the trial.

So whoever launches the job ``feature_backfill`` (command line, API, schedule of one's own) passes conf and no tags; the
run adds the tags itself, so that Dagster knows which partitions it materialized.
"""

from datetime import UTC, date, datetime

import dagster as dg

from clinical_orchestration.defs.common import asset_key
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.feature_backfill import Days, FeatureBackfill, days_of_conf
from clinical_orchestration.trials import TrialProfile

FIRST_DAY = date(2012, 1, 1)
"""First partition; a trial with earlier records needs an earlier one."""

PARTITIONS = dg.DailyPartitionsDefinition(FIRST_DAY.isoformat(), timezone="UTC", end_offset=1)
"""One partition a UTC day, today included."""

PATIENT_FEATURES = "backfill/patient_features"

_DAY = "dagster/partition"
_START, _END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
_BACKFILL = "dagster/backfill"


def run_days(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, profile: TrialProfile, backfill: FeatureBackfill
) -> Days:
    """Return the days that this run is about, and see that the run is tagged with them.

    Raises:
        dagster.Failure: the conf gives no valid range.
    """
    tags = context.run.tags
    if _DAY in tags:
        day = date.fromisoformat(tags[_DAY])
        return Days(day, day)
    if _START in tags and _END in tags:
        return Days(date.fromisoformat(tags[_START]), date.fromisoformat(tags[_END]))
    days = _asked(context, pipeline, profile, backfill)
    if _BACKFILL not in tags:  # the runs of a backfill are counted by their tags
        added = {_START: days.first.isoformat(), _END: days.last.isoformat()}
        context.instance.add_run_tags(context.run.run_id, added)
        # steps in this process have read the run already; steps in others will read it with the tags
        if isinstance(tags, dict):
            tags.update(added)
    return days


def _asked(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, profile: TrialProfile, backfill: FeatureBackfill
) -> Days:
    today = datetime.now(UTC).date()
    try:
        first, last = days_of_conf(pipeline.conf)
    except ValueError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    if first is None and last is None and (targeted := _targeted(context)) is not None:
        return targeted
    if first is not None and first < FIRST_DAY:
        raise dg.Failure(
            f"start_date {first} is before {FIRST_DAY}, the first day that can be backfilled; give a later one",
            allow_retries=False,
        )
    if first is not None and first > today:
        raise dg.Failure(f"start_date {first} lies in the future; there is nothing to backfill", allow_retries=False)
    whole = backfill.span(profile) if first is None or last is None else None
    if first is None:
        first = max(FIRST_DAY, min(whole.first, last or whole.first)) if whole else last or today
    if last is None:
        last = max(first, whole.last) if whole else first
    if last > today:
        context.log.info(f"The range ends today, {today}: the days up to {last} lie ahead.")
        last = today
    return Days(min(first, last), last)


def _targeted(context: dg.AssetExecutionContext) -> Days | None:
    """Return the days that this run's asset backfill targets, from the first to the last."""
    backfill_id = context.run.tags.get(_BACKFILL)
    found = context.instance.get_backfill(backfill_id) if backfill_id else None
    if found is None or found.asset_backfill_data is None:
        return None
    subset = found.asset_backfill_data.target_subset
    key = asset_key(PATIENT_FEATURES)
    if key not in subset.partitions_subsets_by_asset_key:
        return None
    keys = sorted(subset.get_partitions_subset(key).get_partition_keys())
    return Days(date.fromisoformat(keys[0]), date.fromisoformat(keys[-1])) if keys else None
