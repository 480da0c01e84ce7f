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

OWN: Mapping[str, str] = {LAUNCHER: "warm", COORDINATOR: "prompt", STORAGE: "pooled", COMPUTE_LOGS: "direct"}
"""The variables, with the value that stands for the platform's own part; ``default`` stands for Dagster's."""


_UNSET: Mapping[str, str] = {STORAGE: "pooled"}
"""What a variable that is not set stands for, where that is not Dagster's part; as the checkout's `dagster.yaml`."""


def own(variable: str) -> bool:
    """Return whether the platform's own part is wanted. Raises :class:`StackError` for a value that means nothing."""
    value = os.environ.get(variable, "").strip() or _UNSET.get(variable, "default")
    if value not in (OWN[variable], "default"):
        raise StackError(f"{variable}={value} means nothing", f"Use {OWN[variable]} or default.")
    return value != "default"


def meeting_folder(home: Path) -> Path:
    """Return where the run launcher and its warm parent meet."""
    return home / "run" / "launcher"


def dagster_yaml(text: str, home: Path) -> str:
    """Return the instance's settings with the parts that are wanted; the text itself when nothing differs.

    Args:
        text: the checkout's `dagster.yaml`.
        home: of the stack.
    """
    package = "clinical_orchestration.execution"
    sections: dict[str, Any] = {}
    if not own(STORAGE):
        sections["storage"] = {"postgres": {"postgres_url": {"env": "POSTGRES_URL"}}}
    if own(LAUNCHER):
        sections["run_launcher"] = {
            "module": f"{package}.launcher",
            "class": "WarmRunLauncher",
            "config": {"folder": str(meeting_folder(home))},
        }
    if own(COORDINATOR):
        sections["run_coordinator"] = {
            "module": f"{package}.coordinator",
            "class": "QueuedRunCoordinator",
            "config": {"dequeue_interval_seconds": 1},
        }
    if own(COMPUTE_LOGS):
        sections["compute_logs"] = {
            "module": f"{package}.compute_logs",
            "class": "DirectComputeLogManager",
            "config": {"base_dir": {"env": "CLINICAL_DAGSTER_STORAGE"}},
        }
    if not sections:
        return text
    import yaml

    head = "# Made from the checkout's dagster.yaml and the settings CLINICAL_RUN_* and CLINICAL_COMPUTE_LOGS.\n"
    return head + yaml.safe_dump({**yaml.safe_load(text), **sections}, sort_keys=False)
