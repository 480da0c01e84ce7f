"""What the platform needs of a Dagster instance beyond ``dagster.yaml``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clinical_orchestration.contract import POOLS

if TYPE_CHECKING:
    from dagster import DagsterInstance

DAEMON_HEARTBEAT_SECONDS = 100.0
"""Age (s) at which the latest heartbeat of Dagster's scheduler means that it hangs.

It wakes up each minute, and then leaves the heartbeat out if its last one is younger than 30 s: that makes 90 s.
"""


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


def pool_slots(instance: DagsterInstance) -> dict[str, int]:
    """Return the slots of every pool that has a limit, by name."""
    storage = instance.event_log_storage
    if not storage.supports_global_concurrency_limits:
        return {}
    return {pool.name: pool.limit for pool in storage.get_pool_limits()}


def set_pool(instance: DagsterInstance, name: str, slots: int) -> int:
    """Give a pool its slots; it is made where it is new.

    Args:
        instance: the Dagster instance.
        name: of the pool.
        slots: 0 stops its steps; -1 stands for no limit, which is the most that Dagster allows.

    Returns:
        The slots it has now.

    Raises:
        ValueError: less than -1, or more than Dagster allows.
    """
    from dagster._utils.concurrency import get_max_concurrency_limit_value

    most = int(get_max_concurrency_limit_value())
    if not -1 <= slots <= most:
        raise ValueError(f"Bad value for `slots`: {slots}; a pool has 0 to {most}, or -1 for no limit")
    wanted = most if slots == -1 else slots
    instance.event_log_storage.set_concurrency_slots(name, wanted)
    return wanted


def delete_pool(instance: DagsterInstance, name: str) -> bool:
    """Remove a pool's limit; return whether it had one. A pool of the contract comes back at the next start."""
    there = name in pool_slots(instance)
    if there:
        instance.event_log_storage.delete_concurrency_limit(name)
    return there
