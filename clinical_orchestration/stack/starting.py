"""Which parts of Dagster the platform's own take the place of: a setting each, and `dagster.yaml` made from them.

With all of them at ``default``, the deployment is stock Dagster.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clinical_orchestration.stack.model import StackError

LAUNCHER = "CLINICAL_RUN_LAUNCHER"
COORDINATOR = "CLINICAL_RUN_COORDINATOR"
STORAGE = "CLINICAL_RUN_STORAGE"
COMPUTE_LOGS = "CLINICAL_COMPUTE_LOGS"

LAUNCHER_FOLDER = "CLINICAL_LAUNCHER_FOLDER"
"""Where `dagster.yaml` finds :func:`meeting_folder`."""

OWN: Mapping[str, str] = {LAUNCHER: "warm", COORDINATOR: "prompt", STORAGE: "pooled", COMPUTE_LOGS: "direct"}
"""The variables, with the value that stands for the platform's own part, also when unset; ``default`` is Dagster's."""


def own(variable: str) -> bool:
    """Return whether the platform's own part is wanted. Raises :class:`StackError` for a value that means nothing."""
    value = os.environ.get(variable, "").strip() or OWN[variable]
    if value not in (OWN[variable], "default"):
        raise StackError(f"{variable}={value} means nothing", f"Use {OWN[variable]} or default.")
    return value != "default"


def meeting_folder(home: Path) -> Path:
    """Return where the run launcher and its warm parent meet."""
    return home / "run" / "launcher"


_STOCK: Mapping[str, tuple[str, Mapping[str, Any] | None]] = {
    LAUNCHER: ("run_launcher", None),
    COORDINATOR: ("run_coordinator", None),
    STORAGE: ("storage", {"postgres": {"postgres_url": {"env": "POSTGRES_URL"}}}),
    COMPUTE_LOGS: (
        "compute_logs",
        {
            "module": "dagster._core.storage.local_compute_log_manager",
            "class": "LocalComputeLogManager",
            "config": {"base_dir": {"env": "CLINICAL_DAGSTER_STORAGE"}},
        },
    ),
}
"""For each variable the section of `dagster.yaml` that names the platform's own part, and the one for Dagster's."""


def dagster_yaml(text: str) -> str:
    """Return the instance's settings with the parts that are wanted.

    Args:
        text: the checkout's `dagster.yaml`, which names all of the platform's own; it is returned as it is when none is
            turned off.
    """
    off = [variable for variable in OWN if not own(variable)]
    if not off:
        return text
    import yaml

    settings = yaml.safe_load(text)
    for section, stock in (_STOCK[variable] for variable in off):
        del settings[section]
        if stock is not None:
            settings[section] = dict(stock)
    head = "# Made from the checkout's dagster.yaml and the settings CLINICAL_RUN_* and CLINICAL_COMPUTE_LOGS.\n"
    return head + yaml.safe_dump(settings, sort_keys=False)
