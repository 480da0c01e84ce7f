"""Client of the model server, for those who deploy to it and want to see the answer."""

from __future__ import annotations

import time
from typing import Any

import httpx

from clinical_orchestration.modeling.watch import ServingSample


class ServingUnavailableError(ConnectionError):
    """The model server does not answer; the message says where it was expected."""


class ServingClient:
    """Asks a model server over HTTP.

    Args:
        url: Base URL, such as ``http://127.0.0.1:8000``.
        timeout_seconds: Of one request.
        retries: How often a request is sent again that did not get through.
        longest_pause_seconds: Between two tries; the first is one second, each next twice as long.
    """

    def __init__(
        self, url: str, *, timeout_seconds: float = 10.0, retries: int = 0, longest_pause_seconds: float = 10.0
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout_seconds
        self._retries = retries
        self._longest_pause = longest_pause_seconds

    def health(self) -> dict[str, Any]:
        """Return the server's own report.

        Raises:
            ServingUnavailableError: no answer, or no JSON.
        """
        return self._ask("GET", "/health")

    def predict(self, patient_id: str) -> dict[str, Any]:
        """Return the prediction for one patient from the online features.

        Raises:
            ServingUnavailableError: no answer, or an error that the server itself reports (with its advice).
        """
        return self._ask("POST", "/predict", {"patient_id": patient_id})

    def served_version(self, trial: str) -> str | None:
        """Return the model version that answers for a trial now; None while there is none."""
        model = self.health().get("models", {}).get(trial) or {}
        version = model.get("model_version")
        return None if version is None else str(version)

    def await_version(self, trial: str, version: str, *, timeout_seconds: float = 60.0) -> float | None:
        """Wait until the server answers with `version` and return the seconds it took; None when it never did.

        Raises:
            ServingUnavailableError: the server does not answer at all.
        """
        begin = time.monotonic()
        while True:
            if self.served_version(trial) == version:
                return time.monotonic() - begin
            if time.monotonic() - begin > timeout_seconds:
                return None
            time.sleep(0.25)

    def sample(self, trial: str) -> ServingSample:
        """Return what the server counted about the model that serves a trial, since the server started.

        Raises:
            ServingUnavailableError: no answer, or no metrics.
        """
        try:
            answer = httpx.get(f"{self.url}/metrics", timeout=self._timeout)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise ServingUnavailableError(
                f"the model server at {self.url} does not answer /metrics ({type(error).__name__})"
            ) from None
        try:
            return parse_sample(answer.text, trial)
        except ValueError as error:
            raise ServingUnavailableError(f"/metrics of {self.url} cannot be read: {error}") from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        for tried in range(self._retries):
            try:
                return httpx.request(method, self.url + path, json=body, timeout=self._timeout)
            except httpx.ConnectError:  # nobody has seen the request: sending it again does nothing twice
                time.sleep(min(2.0**tried, self._longest_pause))
        return httpx.request(method, self.url + path, json=body, timeout=self._timeout)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._send(method, path, body)
            content = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServingUnavailableError(
                f"the model server at {self.url} does not answer {path} ({type(error).__name__}); "
                "start level 4 of the stack, or set SERVING_URL"
            ) from None
        if answer.is_error:
            detail = {name: content.get(name) for name in ("error", "detail", "what_to_do") if content.get(name)}
            raise ServingUnavailableError(f"{path} answered {answer.status_code}: {detail or content}")
        return dict(content)


def answers_with(serving: ServingClient, trial: str, version: str | None) -> tuple[bool, dict[str, Any]]:
    """Wait until the server answers a trial with `version`; return whether it does, and how long it took or why not.

    Never raises: a server that is down is the answer.
    """
    if version is None:
        return False, {"why": "there is no champion: no version has passed the promotion rule yet"}
    try:
        seconds = serving.await_version(trial, version)
    except ServingUnavailableError as error:
        return False, {"why": str(error)}
    if seconds is None:
        return False, {"why": f"the model server did not load version {version} in time; its /health says why"}
    return True, {"version": version, "seconds_until_served": seconds}


def parse_sample(text: str, trial: str) -> ServingSample:
    """Return a trial's sample from metrics in Prometheus' text format.

    Raises:
        ValueError: the text is in another format.
    """
    from prometheus_client.parser import text_string_to_metric_families

    version: str | None = None
    failing = False
    answers: dict[tuple[str, str], float] = {}
    latency: dict[tuple[str, float], float] = {}
    for family in text_string_to_metric_families(text):
        for item in family.samples:
            if item.labels.get("trial") != trial:
                continue
            if item.name == "clinical_serving_model_info" and item.value == 1.0:
                version = item.labels["version"]
            elif item.name == "clinical_serving_model_failing":
                failing = item.value == 1.0
            elif item.name == "clinical_serving_version_answers_total":
                answers[item.labels["version"], item.labels["outcome"]] = item.value
            elif item.name == "clinical_serving_version_call_seconds_bucket":
                latency[item.labels["version"], float(item.labels["le"])] = item.value
    own = version or ""
    good, failed = answers.get((own, "ok"), 0.0), answers.get((own, "failed"), 0.0)
    return ServingSample(
        version=version,
        failing=failing,
        answers=good + failed,
        failures=failed,
        latency=tuple(sorted((bound, count) for (name, bound), count in latency.items() if name == own)),
    )
