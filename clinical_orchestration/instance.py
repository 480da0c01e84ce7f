"""What the platform needs of a Dagster instance beyond ``dagster.yaml``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clinical_orchestration.contract import POOLS

if TYPE_CHECKING:
    from dagster import DagsterInstance


def ensure_pools(instance: DagsterInstance) -> dict[str, int]:
    """Give each pool of the contract its slots, unless somebody has set a limit already.

    Returns:
        The pools that were set now, with their slots.
    """
    storage = instance.event_log_storage
    if not storage.supports_global_concurrency_limits:
        return {}
    known = {pool.name for pool in storage.get_pool_limits()}
    missing = {name: slots for name, slots in POOLS.items() if name not in known}
    for name, slots in missing.items():
        storage.set_concurrency_slots(name, slots)
    return missing
