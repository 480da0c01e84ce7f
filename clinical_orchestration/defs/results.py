"""What a step leaves for the next one: a small JSON object in the metadata of its asset.

It is kept with the run in Dagster's event log, so steps may run in one process, in several or on several machines, and
the Airflow API can show it as the task's ``return_value``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

if TYPE_CHECKING:
    from datetime import datetime

RESULT = "result"
TRIAL = "trial"


def materialized(
    key: dg.AssetKey,
    trial: str,
    result: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    check_results: list[dg.AssetCheckResult] | None = None,
) -> dg.MaterializeResult[Any]:
    """Return a materialization that carries `result` for later steps, beside `metadata` for people."""
    return dg.MaterializeResult(
        asset_key=key,
        metadata={TRIAL: trial, **(metadata or {}), RESULT: dg.MetadataValue.json(dict(result))},
        check_results=check_results or [],
    )


def result_of(context: dg.AssetExecutionContext, key: dg.AssetKey, trial: str) -> dict[str, Any]:
    """Return what the asset left: in this run, else in the newest one for the same trial.

    Raises:
        dagster.Failure: the asset was never materialized for this trial.
    """
    found = find_result(context, key, trial)
    if found is None:
        raise dg.Failure(
            f"{key.to_user_string()} was never materialized for the trial {trial}; run the whole pipeline first",
            allow_retries=False,
        )
    return found


def find_result(context: dg.AssetExecutionContext, key: dg.AssetKey, trial: str) -> dict[str, Any] | None:
    """Return what the asset left, as :func:`result_of` does; None where it was never materialized for the trial."""
    here = context.instance.get_records_for_run(
        context.run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION, ascending=False
    ).records
    for record in here:
        materialization = record.event_log_entry.asset_materialization
        if materialization is not None and materialization.asset_key == key:
            return _result(materialization)
    for stored in context.instance.fetch_materializations(key, limit=100).records:
        materialization = stored.asset_materialization
        if materialization is not None and _text(materialization, TRIAL) == trial:
            return _result(materialization)
    return None


def newest_result(
    instance: dg.DagsterInstance, key: dg.AssetKey, trial: str, *, limit: int = 100
) -> tuple[dict[str, Any], datetime] | None:
    """Return what the asset left last for the trial, in whatever run, and when (UTC); None where it never did."""
    from datetime import UTC, datetime

    for stored in instance.fetch_materializations(key, limit=limit).records:
        materialization = stored.asset_materialization
        if materialization is not None and _text(materialization, TRIAL) == trial:
            return _result(materialization), datetime.fromtimestamp(stored.timestamp, UTC)
    return None


def _text(materialization: dg.AssetMaterialization, name: str) -> str | None:
    value = materialization.metadata.get(name)
    return None if value is None else str(value.value)


def _result(materialization: dg.AssetMaterialization) -> dict[str, Any]:
    value = materialization.metadata.get(RESULT)
    return dict(value.value) if value is not None and isinstance(value.value, dict) else {}
