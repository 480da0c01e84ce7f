"""The models on the page: champion, challenger, decisions, refusals and rollbacks, as MLflow and Dagster tell them.

MLflow is asked by its REST API: its own library would cost this process two seconds and a hundred megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from clinical_orchestration.trials import available_trials, configured_trial

if TYPE_CHECKING:
    from dagster import DagsterInstance

ASK_SECONDS = 2.0
METRICS = (("auroc", "AUROC"), ("auprc", "AUPRC"), ("brier", "Brier score"), ("ece", "calibration error"))
_REJECTED_SHOWN = 10
_OUTCOMES = {"promote": "promoted", "challenger": "waits as challenger", "refuse": "refused"}


@dataclass(frozen=True)
class VersionView:
    """One version of a model: `since` is when it got its place (UTC), `metrics` are (name, value with interval)."""

    version: str
    since: datetime | None
    created: datetime | None
    metrics: tuple[tuple[str, str], ...]
    candidate: str
    link: str


@dataclass(frozen=True)
class DecisionView:
    """The newest promotion decision."""

    version: str
    outcome: str
    reasons: str
    link: str


@dataclass(frozen=True)
class RejectedView:
    """A version that was refused or rolled back, when (UTC) and why."""

    version: str
    at: datetime | None
    reason: str
    link: str


@dataclass(frozen=True)
class ModelView:
    """The model of one trial; None and empty where there is nothing to tell."""

    trial: str
    title: str
    name: str
    champion: VersionView | None
    challenger: VersionView | None
    previous: VersionView | None
    decision: DecisionView | None
    refused: tuple[RejectedView, ...]
    rollbacks: tuple[RejectedView, ...]


@dataclass(frozen=True)
class RetrainingView:
    """The newest look at whether to retrain (UTC)."""

    at: datetime
    retrain: bool
    reasons: tuple[str, ...]


def read_models(mlflow_url: str) -> tuple[ModelView, ...]:
    """Return the models of all trials.

    Raises:
        httpx.HTTPError: MLflow does not answer, or with an error.
        ValueError: it answers something else.
    """
    import httpx

    found = []
    with httpx.Client(base_url=mlflow_url.rstrip("/"), timeout=ASK_SECONDS) as client:
        for name in available_trials():
            profile = configured_trial(name)
            model = _get(client, "registered-models/get", {"name": profile.model_name})
            versions: list[Mapping[str, Any]] = []
            if model is not None:
                where = {"filter": f"name = '{profile.model_name}'", "max_results": "200"}
                versions = (_get(client, "model-versions/search", where) or {}).get("model_versions", [])
            aliases = {
                item["alias"]: str(item["version"])
                for item in ((model or {}).get("registered_model") or {}).get("aliases", [])
            }
            found.append(model_view(profile.name, profile.title, profile.model_name, aliases, versions, mlflow_url))
    return tuple(found)


def why_unread(error: Exception) -> str:
    """Return what to say where the models cannot be read."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return f"MLflow answers with an error ({error.response.status_code})"
    if isinstance(error, (httpx.TransportError, TimeoutError)):
        return "MLflow does not answer"
    return f"The models cannot be read ({type(error).__name__}; the log of this page has more)"


def _get(client: Any, path: str, params: Mapping[str, str]) -> dict[str, Any] | None:
    """Return MLflow's answer; None where it says that there is no such thing."""
    answer = client.get(f"/api/2.0/mlflow/{path}", params=params)
    if answer.status_code == 404:
        return None
    answer.raise_for_status()
    content = answer.json()
    if not isinstance(content, dict):
        raise ValueError("MLflow answered something else than an object")
    return content


def model_view(
    trial: str, title: str, name: str, aliases: Mapping[str, str], versions: list[Mapping[str, Any]], mlflow_url: str
) -> ModelView:
    """Return the view of one model from what MLflow's REST API says of it."""
    base = f"{_bare(mlflow_url)}/#/models/{quote(name)}/versions"
    tags = {
        str(item["version"]): {tag["key"]: str(tag.get("value", "")) for tag in item.get("tags", [])}
        for item in versions
    }
    created = {str(item["version"]): _milliseconds(item.get("creation_timestamp")) for item in versions}

    def view(alias: str) -> VersionView | None:
        version = aliases.get(alias)
        if version is None:
            return None
        own = tags.get(version, {})
        return VersionView(
            version=version,
            since=_moment(own.get("promoted_at")) if alias == "champion" else created.get(version),
            created=created.get(version),
            metrics=tuple((label, own[key]) for key, label in METRICS if own.get(key)),
            candidate=own.get("candidate", "").replace("_", " "),
            link=f"{base}/{version}",
        )

    # decisions of before times were kept come first
    decided = max(
        (version for version, own in tags.items() if own.get("decision")),
        key=lambda version: (tags[version].get("decided_at", ""), int(version)),
        default=None,
    )
    decision = None
    if decided is not None:
        own = tags[decided]
        outcome = _OUTCOMES.get(own["decision"], own["decision"])
        if own.get("rolled_back_at"):
            outcome += ", later rolled back"
        decision = DecisionView(decided, outcome, own.get("decision_reasons", ""), f"{base}/{decided}")

    def rejected(those: Callable[[Mapping[str, str]], bool], at: str, why: str) -> tuple[RejectedView, ...]:
        found = [
            RejectedView(version, _moment(own.get(at)), own.get(why, ""), f"{base}/{version}")
            for version, own in tags.items()
            if those(own)
        ]
        found.sort(key=lambda item: item.at or datetime.min.replace(tzinfo=UTC), reverse=True)
        return tuple(found[:_REJECTED_SHOWN])

    return ModelView(
        trial, title, name, view("champion"), view("challenger"), view("previous_champion"), decision,
        rejected(lambda own: own.get("promotion") == "refused", "decided_at", "decision_reasons"),
        rejected(lambda own: bool(own.get("rolled_back_at")), "rolled_back_at", "rollback_reason"),
    )  # fmt: skip


def read_retraining(instance: DagsterInstance) -> dict[str, RetrainingView]:
    """Return the newest retraining decision of each trial, by the trial's name."""
    from dagster import AssetKey

    found: dict[str, RetrainingView] = {}
    for record in instance.fetch_materializations(AssetKey(["retraining", "decision"]), limit=50).records:
        materialization = record.asset_materialization
        if materialization is None or not {"trial", "result"} <= materialization.metadata.keys():
            continue
        trial, result = str(materialization.metadata["trial"].value), materialization.metadata["result"].value
        if trial not in found and isinstance(result, dict):
            found[trial] = RetrainingView(
                datetime.fromtimestamp(record.timestamp, UTC),
                bool(result.get("retrain")),
                tuple(str(reason) for reason in result.get("reasons", ())),
            )
    return found


def _moment(text: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _milliseconds(value: Any) -> datetime | None:
    return datetime.fromtimestamp(int(value) / 1000, UTC) if str(value or "").isdigit() else None


def _bare(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path.rstrip("/"), "", ""))
