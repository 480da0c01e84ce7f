"""What the asset modules share: ownership, retry rule, metadata as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
