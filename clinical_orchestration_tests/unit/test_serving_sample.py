"""The watch reads what the model server writes."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily

from clinical_orchestration.serving.metrics import ServingMetrics
from clinical_orchestration.stores.serving import ServingClient, ServingUnavailableError, answers_with, parse_sample


def metrics(version: str | None = "4", failing: float = 0.0) -> str:
    own = ServingMetrics()
    own.asked("pilot", "3", 500, 500, 3.0)
    for _ in range(10):
        own.asked("pilot", "4", 9, 1, 0.02)
    own.asked("other", "4", 0, 70, 9.0)

    class State:
        def collect(self) -> list[GaugeMetricFamily]:
            info = GaugeMetricFamily("clinical_serving_model_info", "i", labels=["trial", "model_name", "version"])
            if version is not None:
                info.add_metric(["pilot", "m", version], 1.0)
            failed = GaugeMetricFamily("clinical_serving_model_failing", "f", labels=["trial"])
            failed.add_metric(["pilot"], failing)
            return [info, failed]

    own.registry.register(State())  # type: ignore[arg-type]
    return generate_latest(own.registry).decode()


def test_a_sample_counts_the_served_version_of_its_trial_only() -> None:
    sample = parse_sample(metrics(), "pilot")
    assert (sample.version, sample.failing) == ("4", False)
    assert (sample.answers, sample.failures, sample.error_rate()) == (100.0, 10.0, 0.1)
    seconds = sample.p95_seconds()
    assert seconds is not None
    assert 0.01 < seconds <= 0.025
    assert parse_sample(metrics(failing=1.0), "pilot").failing


def test_without_a_model_nothing_is_counted() -> None:
    for sample in (parse_sample(metrics(None), "pilot"), parse_sample(metrics(), "unknown"), parse_sample("", "pilot")):
        assert (sample.version, sample.answers, sample.error_rate(), sample.p95_seconds()) == (None, 0.0, None, None)


def test_a_server_that_is_down_is_told_as_such() -> None:
    client = ServingClient("http://127.0.0.1:9", timeout_seconds=1)
    with pytest.raises(ServingUnavailableError, match="/metrics"):
        client.sample("pilot")
    served, why = answers_with(client, "pilot", "1")
    assert not served
    assert "does not answer" in why["why"]
    assert answers_with(client, "pilot", None)[0] is False
