"""Prometheus metrics of the model server. No metric carries an identifier of a patient, a request or a prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from clinical_orchestration.serving.champions import ChampionManager
    from clinical_orchestration.serving.engine import Engine
    from clinical_orchestration.serving.prediction_log import PredictionLog

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServingMetrics:
    """What is counted while requests are answered; see :class:`StateCollector` for what is read when asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "clinical_serving_requests", "HTTP requests answered.", ["endpoint", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "clinical_serving_request_seconds",
            "Time to answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._predictions = Counter(
            "clinical_serving_predictions", "Predictions made.", ["trial", "risk_band"], registry=self.registry
        )
        self._stale = Counter(
            "clinical_serving_stale_predictions",
            "Predictions from features older than the trial allows.",
            ["trial"],
            registry=self.registry,
        )
        self._refused = Counter(
            "clinical_serving_refused_instances",
            "Instances answered with an error, by its code.",
            ["error"],
            registry=self.registry,
        )
        self._rounds = Histogram(
            "clinical_serving_model_call_rows", "Rows in one model call.", buckets=_ROWS, registry=self.registry
        )
        self._model_seconds = Histogram(
            "clinical_serving_model_call_seconds", "Time of one model call.", buckets=_SECONDS, registry=self.registry
        )
        self._version_answers = Counter(
            "clinical_serving_version_answers",
            "Instances that a model version was asked about, by outcome (ok or failed).",
            ["trial", "version", "outcome"],
            registry=self.registry,
        )
        self._version_seconds = Histogram(
            "clinical_serving_version_call_seconds",
            "Time of one call of a model version.",
            ["trial", "version"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._load_failures = Counter(
            "clinical_serving_model_load_failures",
            "Attempts to load a champion that failed.",
            ["trial"],
            registry=self.registry,
        )

    def predicted(self, trial: str, risk_band: str, stale: bool) -> None:
        """Count a prediction."""
        self._predictions.labels(trial, risk_band).inc()
        if stale:
            self._stale.labels(trial).inc()

    def refused(self, reason: str) -> None:
        """Count an instance that got an error."""
        self._refused.labels(reason).inc()

    def round_done(self, rows: int, seconds: float) -> None:
        """Count a model call."""
        self._rounds.observe(rows)
        self._model_seconds.observe(seconds)

    def asked(self, trial: str, version: str, answers: int, failures: int, seconds: float) -> None:
        """Count one call of a model version: how many instances it answered, and how many it failed on."""
        self._version_answers.labels(trial, version, "ok").inc(answers)
        self._version_answers.labels(trial, version, "failed").inc(failures)
        self._version_seconds.labels(trial, version).observe(seconds)

    def load_failed(self, trial: str) -> None:
        """Count a champion that could not be loaded."""
        self._load_failures.labels(trial).inc()

    def declare(self, profiles: Mapping[str, object]) -> None:
        """Make the series of each trial exist from the start, so that a rate over the first event is right."""
        for trial in profiles:
            for band in ("low", "medium", "high"):
                self._predictions.labels(trial, band)
            self._stale.labels(trial)
            self._load_failures.labels(trial)


class StateCollector(Collector):
    """Reads the state of models, stores and the prediction log at the moment the metrics are asked for."""

    def __init__(self, champions: ChampionManager, engine: Engine, log: PredictionLog) -> None:
        self._champions = champions
        self._engine = engine
        self._log = log

    def describe(self) -> list[Metric]:
        """Return nothing: the state is not read at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the present state."""
        info = GaugeMetricFamily(
            "clinical_serving_model_info",
            "1 for the model version that serves a trial.",
            labels=["trial", "model_name", "version"],
        )
        loaded = GaugeMetricFamily(
            "clinical_serving_model_loaded_timestamp_seconds", "When that version was loaded.", labels=["trial"]
        )
        failing = GaugeMetricFamily(
            "clinical_serving_model_failing",
            "1 while the newest champion cannot be loaded.",
            labels=["trial"],
        )
        for trial, state in self._champions.states().items():
            failing.add_metric([trial], float(state.failed_version is not None))
            if state.served is not None:
                info.add_metric([trial, state.model_name, state.served.version], 1.0)
                loaded.add_metric([trial], state.served.loaded_at.timestamp())
        yield from (info, loaded, failing)
        yield GaugeMetricFamily(
            "clinical_serving_registry_up",
            "1 when the model registry answered last.",
            value=float(self._champions.polled and self._champions.registry_error is None),
        )
        yield GaugeMetricFamily(
            "clinical_serving_online_store_up",
            "1 when the online feature store answered last.",
            value=float(bool(self._engine.online.up)),
        )
        yield GaugeMetricFamily(
            "clinical_serving_waiting_instances", "Instances at work.", value=float(self._engine.waiting)
        )
        log = self._log.state()
        yield GaugeMetricFamily(
            "clinical_serving_prediction_log_backlog",
            "Predictions not yet in gold/predictions.",
            value=float(log.backlog),
        )
        yield GaugeMetricFamily(
            "clinical_serving_prediction_log_memory",
            "Of the backlog, those in memory only, because the spool cannot be written.",
            value=float(log.in_memory),
        )
        yield GaugeMetricFamily(
            "clinical_serving_prediction_log_spool_bytes", "Size of the spool.", value=float(log.spool_bytes)
        )
        for name, text, value in (
            ("written", "Predictions appended to gold/predictions by this process.", log.written),
            ("dropped", "Predictions that could not be kept.", log.dropped),
            ("write_failures", "Failed appends to gold/predictions.", log.write_failures),
            ("spool_failures", "Failed writes to the spool.", log.spool_failures),
        ):
            yield CounterMetricFamily(f"clinical_serving_prediction_log_{name}", text, value=float(value))
