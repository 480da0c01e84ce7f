"""Config, version, providers, plugins, import errors and warnings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clinical_orchestration import __version__
from clinical_orchestration.airflow.control import Control
from clinical_orchestration.api.call import MAXIMUM_LIMIT, Call, show_time
from clinical_orchestration.api.problems import AIRFLOW_VERSION, Problem, not_found
from clinical_orchestration.platform.masking import MASK, is_sensitive

_WARNINGS = ("asset conflict", "non-existent pool")


class PlatformRoutes:
    """Handlers of what the deployment is, named by Airflow's operation ids.

    Args:
        control: the code locations.
        settings: returns what the deployment is configured with, section by section; secrets are masked here.
    """

    def __init__(self, control: Control, settings: Callable[[], Mapping[str, Mapping[str, str]]]) -> None:
        self.control = control
        self._settings = settings

    def get_config(self, call: Call) -> Any:
        """``GET /config``: JSON, or text as in a configuration file."""
        sections = self._sections()
        section = call.text("section")
        if section is not None:
            if section not in sections:
                raise not_found("section not found.", f"section={section} not found.")
            sections = {section: sections[section]}
        return _as_asked(call, sections)

    def get_value(self, call: Call) -> Any:
        """``GET /config/section/{section}/option/{option}``."""
        section, option = call.path["section"], call.path["option"]
        value = self._sections().get(section, {}).get(option)
        if value is None:
            raise not_found("Config not found.", f"The option [{section}/{option}] is not found in config.")
        return _as_asked(call, {section: {option: value}})

    def get_version(self, call: Call) -> dict[str, Any]:
        """``GET /version``: the Airflow whose API this is; `git_version` says what answers."""
        return {"version": AIRFLOW_VERSION, "git_version": f"clinical-orchestration {__version__}"}

    def get_providers(self, call: Call) -> dict[str, Any]:
        """``GET /providers``: the libraries through which external systems are reached."""
        import importlib.metadata

        found = []
        for name in sorted(_PROVIDERS):
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            found.append({"package_name": name, "description": _PROVIDERS[name], "version": version})
        return {"providers": found, "total_entries": len(found)}

    def get_plugins(self, call: Call) -> dict[str, Any]:
        """``GET /plugins``: none; what the old ones did is in assets, sensors and clients."""
        call.page()
        return {"plugins": [], "total_entries": 0}

    def get_import_errors(self, call: Call) -> dict[str, Any]:
        """``GET /importErrors``: code locations that do not load."""
        limit, offset = call.page()
        order = call.order(("import_error_id", "timestamp", "filename", "stack_trace"), "import_error_id")
        found = self._import_errors()
        found.sort(key=lambda one: one[order.lstrip("-")], reverse=order.startswith("-"))
        return {"import_errors": found[offset : offset + limit], "total_entries": len(found)}

    def get_import_error(self, call: Call) -> dict[str, Any]:
        """``GET /importErrors/{import_error_id}``."""
        wanted = call.path["import_error_id"]
        for one in self._import_errors():
            if str(one["import_error_id"]) == wanted:
                return one
        raise not_found(
            "Import error not found", f"The ImportError with import_error_id: `{wanted}` was not found"
        )  # fmt: skip

    def get_dag_warnings(self, call: Call) -> dict[str, Any]:
        """``GET /dagWarnings``: pools that steps name and nobody gave slots."""
        limit, offset = call.page()
        order = call.order(("dag_id", "warning_type", "message", "timestamp"), "timestamp")
        kind = call.text("warning_type")
        if kind is not None and kind not in _WARNINGS:
            raise Problem(400, f"{kind!r} is not a valid DagWarningType")
        found = [one for one in self._warnings() if call.text("dag_id") in (None, one["dag_id"])]
        found = [one for one in found if kind in (None, one["warning_type"])]
        found.sort(key=lambda one: one[order.lstrip("-")], reverse=order.startswith("-"))
        return {"dag_warnings": found[offset : offset + limit], "total_entries": len(found)}

    def _import_errors(self) -> list[dict[str, Any]]:
        return [
            {"import_error_id": number, "timestamp": show_time(at), "filename": name, "stack_trace": text}
            for number, (name, text, at) in enumerate(self.control.catalog().import_errors, start=1)
        ]

    def _warnings(self) -> list[dict[str, Any]]:
        from clinical_orchestration.airflow.catalog import DEFAULT_POOL
        from clinical_orchestration.instance import pool_slots

        known = {DEFAULT_POOL, *pool_slots(self.control.instance())}
        catalog = self.control.catalog()
        found = []
        for dag in catalog.dags.values():
            absent = sorted({task.pool for task in dag.tasks.values()} - known)
            if absent:
                found.append(
                    {
                        "dag_id": dag.dag_id,
                        "warning_type": "non-existent pool",
                        "message": f"Dag '{dag.dag_id}' references non-existent pools: {absent}",
                        "timestamp": show_time(catalog.loaded_at),
                    }
                )
        return found

    def _sections(self) -> dict[str, dict[str, str]]:
        fixed = {
            "api": {
                "auth_backends": "airflow.api.auth.backend.basic_auth,airflow.api.auth.backend.session",
                "maximum_page_limit": str(MAXIMUM_LIMIT),
                "fallback_page_limit": str(MAXIMUM_LIMIT),
            },
            "core": {
                "executor": "LocalExecutor",
                "load_examples": "False",
                "test_connection": "Disabled",
                "enable_xcom_pickling": "False",
                "default_timezone": "utc",
                "parallelism": "16",
                "max_active_runs_per_dag": "16",
            },
            "scheduler": {"catchup_by_default": "False"},
            "webserver": {"expose_config": "True"},
        }
        merged = {name: dict(options) for name, options in fixed.items()}
        for name, options in self._settings().items():
            merged.setdefault(name, {}).update(options)
        return {
            name: {
                option: MASK if is_sensitive(option) and value else value for option, value in options.items()
            }
            for name, options in merged.items()
        }  # fmt: skip


_PROVIDERS = {
    "dagster": "Orchestration",
    "dagster-postgres": "PostgreSQL storage of runs, events and schedules",
    "pyspark": "Apache Spark",
    "deltalake": "Delta Lake tables",
    "confluent-kafka": "Apache Kafka",
    "redis": "Redis",
    "minio": "S3",
    "mlflow": "MLflow tracking and model registry",
}


def _as_asked(call: Call, sections: Mapping[str, Mapping[str, str]]) -> Any:
    accept = call.accept or "*/*"
    if "application/json" in accept or "*/*" in accept:
        return {
            "sections": [
                {"name": name, "options": [{"key": key, "value": value} for key, value in options.items()]}
                for name, options in sections.items()
            ]
        }
    if "text/plain" in accept:
        lines = []
        for name, options in sections.items():
            lines += [f"[{name}]", *(f"{key} = {value}" for key, value in options.items()), ""]
        return "\n".join(lines)
    raise Problem(406)
