"""What the asset modules share: ownership, retry rule, metadata as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from clinical_orchestration.contract import OWNER, RETRIES, RETRY_DELAY_SECONDS

OWNERS = [f"team:{OWNER}"]
RETRY = dg.RetryPolicy(max_retries=RETRIES, delay=RETRY_DELAY_SECONDS)
TRIAL_TAG = "clinical/trial"


def spec(
    key: str,
    description: str,
    *,
    group: str,
    kinds: set[str],
    deps: Iterable[str] = (),
    tags: Mapping[str, str] | None = None,
    code_version: str = "1",
    metadata: Mapping[str, Any] | None = None,
    skippable: bool = False,
) -> dg.AssetSpec:
    """Return an asset's spec from its ``layer/table`` key, with the project's owners.

    `deps` are keys written the same way. A step may leave a `skippable` asset out: what depends on it is then skipped.
    """
    return dg.AssetSpec(
        key=key.split("/"),
        description=description,
        group_name=group,
        kinds=kinds,
        owners=OWNERS,
        deps=[dg.AssetKey(dep.split("/")) for dep in deps],
        tags=dict(tags or {}),
        code_version=code_version,
        metadata=dict(metadata or {}),
        skippable=skippable,
    )


def step(
    *,
    specs: Sequence[dg.AssetSpec],
    pool: str,
    check_specs: Sequence[dg.AssetCheckSpec] = (),
    partitions_def: dg.PartitionsDefinition[Any] | None = None,
    backfill_policy: dg.BackfillPolicy | None = None,
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """Make a function a step of a pipeline: named as the function, in a pool of the contract, retried as it says."""

    def make(function: Callable[..., Any]) -> dg.AssetsDefinition:
        return dg.multi_asset(
            name=function.__name__,
            specs=specs,
            check_specs=check_specs,
            partitions_def=partitions_def,
            backfill_policy=backfill_policy,
            pool=pool,
            retry_policy=RETRY,
        )(function)

    return make


def asset_key(key: str) -> dg.AssetKey:
    """Return the asset key of ``layer/table``."""
    return dg.AssetKey(key.split("/"))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> dg.MetadataValue:
    """Return a table as Markdown metadata; figures are aligned right and grouped by thousands."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---" for _ in columns) + "|"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")
