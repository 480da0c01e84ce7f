"""A trial in which things go wrong half-way, and what the platform does about it, without a hand.

    python examples/incident_scenario.py            # about half an hour on two busy cores

It starts a platform of its own (free ports, a folder of its own), plays a hospital (messages to Kafka, a prediction for
every patient every day) and the clock (each simulated day the pipelines whose schedule fires), and prints the timeline.
On day 18 of the trial three things begin: one site's thermometer reads Fahrenheit, another site's laboratory falls
silent, and adverse events become more frequent at the same state of health: thrice the hazard, by which twice as many
patients have one within a day. Everything after that is the platform's doing: quality findings, stale sources, drift,
alerts, and runs of ``scheduled_retraining`` that a sensor asks for. A new model that is not shown to be better on
held-out subjects waits as challenger; the sensor asks again while the drift persists, until there is evidence enough to
promote one. The play ends with that promotion.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

TRIAL = "simulated-live"
FIRST_MODEL_DAY = 16
"""Late enough that what counts over a week has been full for as long again: only then can such a count drift."""
CALM_DAYS = 18
DAILY_UNTIL = 20
"""From then on every second day is played."""
EVENT_FACTOR = 3.0
"""Of the hazard. Events of a bad episode come together, so that the share of patients with one in a day doubles."""
HOLDOUT_SHARE = 0.4
"""Of the subjects. A few days of outcomes of few people cannot tell two models apart."""
PAUSE_HOURS = 0.04
"""A simulated day passes in a minute or two: so is the pause before a sensor asks for retraining again."""
OUTCOMES = {"promoted": "promotion", "challenger": "challenger"}
STORY = ("quality", "freshness", "drift", "retraining", "promotion")
MODEL_ALERTS = ("data_drift:", "concept_drift:", "model_performance:")
FAHRENHEIT_SITE, SILENT_SITE = 3, 5


@dataclass
class Timeline:
    """What happened, when in the trial and when on the clock; printed as it happens."""

    started: float = field(default_factory=time.monotonic)
    entries: list[tuple[float, str, str]] = field(default_factory=list)

    def add(self, day: float, kind: str, text: str) -> None:
        self.entries.append((day, kind, text))
        print(f"{time.monotonic() - self.started:7.0f} s  day {day:5.1f}  {kind:<11} {text}", flush=True)

    def first(self, kind: str) -> int | None:
        """Return the place of the first entry of a kind."""
        return next((place for place, entry in enumerate(self.entries) if entry[1] == kind), None)


class Platform:
    """The running platform, through the addresses that everybody uses."""

    def __init__(self, environment: dict[str, str]) -> None:
        import httpx

        login = (os.environ.get("CLINICAL_USER", "admin"), os.environ.get("CLINICAL_PASSWORD", "admin"))
        self.api = httpx.Client(base_url=environment["AIRFLOW_URL"] + "/api/v1/", timeout=60, auth=login)
        self.page = httpx.Client(base_url=environment["AIRFLOW_URL"], timeout=60, auth=login)
        self.serving = httpx.Client(base_url=environment["SERVING_URL"], timeout=60)
        self.mlflow = httpx.Client(base_url=environment["MLFLOW_TRACKING_URI"], timeout=60)

    def run(self, pipeline: str, **conf: Any) -> dict[str, Any]:
        """Run a pipeline and return how it ended."""
        answer = self.api.post(f"dags/{pipeline}/dagRuns", json={"conf": {"trial": TRIAL, **conf}})
        answer.raise_for_status()
        return self.wait(pipeline, answer.json()["dag_run_id"])

    def wait(self, pipeline: str, run_id: str) -> dict[str, Any]:
        while True:
            run: dict[str, Any] = self.api.get(f"dags/{pipeline}/dagRuns/{run_id}").json()
            if run["state"] in ("success", "failed"):
                return run
            time.sleep(1)

    def result(self, pipeline: str, run_id: str, task: str, asset: str = "") -> dict[str, Any]:
        """Return what a task of a run returned; of a task with several assets, what the named one says."""
        path = f"dags/{pipeline}/dagRuns/{run_id}/taskInstances/{task}/xcomEntries/return_value"
        answer = self.api.get(path, params={"stringify": "false"})
        value: dict[str, Any] = answer.json()["value"] if answer.status_code == 200 else {}
        found: dict[str, Any] = value.get(asset, value)
        return found

    def runs(self, pipeline: str) -> list[dict[str, Any]]:
        """Return the runs of a pipeline, oldest first."""
        found: list[dict[str, Any]] = self.api.get(f"dags/{pipeline}/dagRuns").json()["dag_runs"]
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """Return the open alerts."""
        found: list[dict[str, Any]] = self.page.get("/alerts.json").json()["open"]
        return found

    def champion(self, model: str) -> str | None:
        """Return the version that MLflow's alias ``champion`` points to; None where there is none."""
        where = {"name": model, "alias": "champion"}
        answer = self.mlflow.get("/api/2.0/mlflow/registered-models/alias", params=where)
        return str(answer.json()["model_version"]["version"]) if answer.status_code == 200 else None

    def predict(self, patients: list[str]) -> int:
        """Ask for a prediction for each patient; return how many were answered."""
        answered = 0
        for start in range(0, len(patients), 500):
            body = {"instances": [{"patient_id": patient, "trial": TRIAL} for patient in patients[start : start + 500]]}
            answer = self.serving.post("/predict/batch", json=body)
            if answer.status_code == 200:
                answered += sum(1 for one in answer.json()["predictions"] if "probability" in one)
        return answered


class Hospital:
    """Sends the messages of the simulated trial to Kafka, up to a day."""

    def __init__(self, subjects: int, days: float, seed: int) -> None:
        from clinical_orchestration.settings import Variables
        from clinical_orchestration.simulation import simulate
        from clinical_orchestration.stores.kafka import producer, topic_admin
        from clinical_orchestration.trials import load_trial
        from clinical_orchestration.trials.profile import Incident, SimulationSettings

        settings = SimulationSettings(
            seed=seed,
            subjects=subjects,
            days=days,
            incidents=(
                Incident(kind="fahrenheit", from_day=CALM_DAYS, site=FAHRENHEIT_SITE),
                Incident(kind="silent_lab", from_day=CALM_DAYS, site=SILENT_SITE),
                Incident(kind="event_rate", from_day=CALM_DAYS, factor=EVENT_FACTOR),
            ),
        )
        self.start = datetime.fromisoformat(settings.start)
        self.topics = Variables().topics()
        self._producer = producer()
        admin = topic_admin()
        admin.ensure_topics(self.topics.values())
        admin.keep_forever(self.topics.values())  # the messages carry the times of the simulated trial
        self._messages: Iterator[Any] = simulate(settings, load_trial(TRIAL).study_id)
        self._next: Any = None
        self.patients: set[str] = set()

    def send_until(self, day: float) -> int:
        """Send what arrives up to a day of the trial; return the number of messages."""
        from clinical_orchestration.ingestion.simulate import stream_to_kafka

        return stream_to_kafka(self._producer, self._until(self.start + timedelta(days=day)), self.topics, trial=TRIAL)

    def _until(self, moment: datetime) -> Iterator[Any]:
        while True:
            message = self._next or next(self._messages, None)
            self._next = None
            if message is None:
                return
            if message.arrival > moment:
                self._next = message
                return
            if message.domain == "subjects" and message.kind == "ok":
                self.patients.add(message.key.decode())
            yield message


def play(platform: Platform, hospital: Hospital, days: int, timeline: Timeline, *, patience: float = 150) -> None:
    """Play the trial day by day, until a retrained model is promoted or the days are over.

    Args:
        platform: the platform.
        hospital: sends the messages.
        days: last day.
        timeline: gets what happens.
        patience: seconds to wait after the last day: the sensor looks every minute, and may have to pause first.
    """
    from clinical_orchestration.trials import load_trial

    model = load_trial(TRIAL).model_name
    champion: str | None = None
    known_alerts: set[str] = set()
    known_runs: set[str] = set()
    seen: set[str] = set()

    def look(day: float) -> None:
        """Note alerts and runs of retraining that were not there before."""
        for alert in platform.alerts():
            if alert["key"] not in known_alerts:
                known_alerts.add(alert["key"])
                timeline.add(day, "alert", f"{alert['key']} [{alert['severity']}] {alert['title']}")
        for run in platform.runs("scheduled_retraining"):
            if run["dag_run_id"] not in known_runs:
                known_runs.add(run["dag_run_id"])
                reason = run["conf"].get("reason", "no reason given")
                timeline.add(day, "retraining", f"asked for by a sensor: {reason}")
                decided(day, run["dag_run_id"])

    def decided(day: float, run_id: str) -> None:
        """Wait for a retraining and note what became of it: a promotion only where the champion is another one now."""
        nonlocal champion
        state = platform.wait("scheduled_retraining", run_id)["state"]
        decision = platform.result("scheduled_retraining", run_id, "deploy_new_model")
        compared = platform.result("scheduled_retraining", run_id, "compare_models")
        before, champion = champion, platform.champion(model)
        kind = OUTCOMES.get(decision.get("outcome", ""), "decision")
        if kind == "promotion" and (champion == before or champion != decision["version"]):
            kind = "decision"
        timeline.add(day, kind, f"run {state}: {_decision(decision, compared)}; champion is version {champion}")

    def note(day: float, kind: str, text: str) -> None:
        if text and f"{kind} {text}" not in seen:
            seen.add(f"{kind} {text}")
            timeline.add(day, kind, text)

    sent = hospital.send_until(FIRST_MODEL_DAY)
    timeline.add(FIRST_MODEL_DAY, "data", f"{sent:,} messages of {len(hospital.patients)} patients")
    run = platform.run("clinical_data_pipeline")
    if run["state"] != "success":
        raise SystemExit(f"the first run of clinical_data_pipeline is {run['state']}; the page shows why")
    trained = platform.result("clinical_data_pipeline", run["dag_run_id"], "evaluate_model")
    champion = platform.champion(model)
    timeline.add(FIRST_MODEL_DAY, "model", f"first champion, version {champion}; {_shown(trained)}")
    for day in (*range(FIRST_MODEL_DAY + 1, DAILY_UNTIL), *range(DAILY_UNTIL, days + 1, 2)):
        sent = hospital.send_until(day)
        ingest = platform.run("clinical_data_pipeline", keep_model=True)
        answered = platform.predict(sorted(hospital.patients))
        print(
            f"{'':10}  day {day:5.1f}  {sent:,} messages, ingest {ingest['state']}, {answered} predictions", flush=True
        )
        quality = platform.run("data_quality_monitoring")
        report = platform.result(
            "data_quality_monitoring", quality["dag_run_id"], "generate_quality_report", "quality/report"
        )
        if report.get("anomalies"):
            note(day, "quality", f"{report['anomalies']} anomalies found")
        for source in report.get("stale_sources") or ():
            note(day, "freshness", f"stale: {source}")
        monitoring = platform.run("model_monitoring")
        drift = platform.result("model_monitoring", monitoring["dag_run_id"], "detect_data_drift")
        concept = platform.result("model_monitoring", monitoring["dag_run_id"], "check_concept_drift")
        performance = platform.result(
            "model_monitoring", monitoring["dag_run_id"], "check_model_performance", "monitoring/performance"
        )
        if drift.get("status") == "drift":
            note(day, "drift", f"data: {len(drift['drifted_features'])} of {drift['features']} features")
        if concept.get("status") == "drift":
            note(day, "drift", "concept: the errors of the model grow")
        if performance.get("status") == "degraded":
            note(day, "drift", "performance below its interval")
        look(day)
        if timeline.first("promotion") is not None:
            return
    deadline = time.monotonic() + patience
    while timeline.first("promotion") is None and time.monotonic() < deadline:
        time.sleep(3)
        look(days)


def _decision(decision: dict[str, Any], compared: dict[str, Any]) -> str:
    """Return a decision in a line: outcome, reasons, and what the challenger gains on which rows."""
    comparison = compared.get("comparison") or {}
    gains = ", ".join(
        f"{name} {gain['gain']['value']:+.4f} ({gain['gain']['lower']:+.4f} to {gain['gain']['upper']:+.4f})"
        for name, gain in comparison.get("gains", {}).items()
    )
    what = f"version {decision.get('version')} {decision.get('outcome')}: {'; '.join(decision.get('reasons', ()))}"
    if not gains:
        return what
    rows = f"{comparison['rows']} held-out rows" + (f" since {comparison['since']}" if comparison["since"] else "")
    return f"{what}; gain on {rows}: {gains}"


def _shown(result: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in result.items() if isinstance(value, str | float | int))[:200]


def in_order(timeline: Timeline) -> list[str]:
    """Return what of the story is missing or comes too early; empty when it went as it should."""
    wrong = []
    places = {kind: timeline.first(kind) for kind in STORY}
    wrong += [f"no entry of the kind {kind}" for kind, place in places.items() if place is None]
    found = [(kind, place) for kind, place in places.items() if place is not None]
    wrong += [f"{after} came before {before}" for (before, one), (after, two) in itertools.pairwise(found) if one > two]
    drift, retraining = places["drift"], places["retraining"]
    if drift is not None and retraining is not None:
        between = [text for _, kind, text in timeline.entries[drift:retraining] if kind == "alert"]
        if not any(text.startswith(MODEL_ALERTS) for text in between):
            wrong.append("no alert about the model between drift and retraining")
    early = [entry for entry in timeline.entries if entry[0] <= CALM_DAYS and entry[1] in STORY]
    wrong += [f"false alarm on day {day}: {kind}, {text}" for day, kind, text in early]
    return wrong


def main() -> int:
    """Run the scenario; return 0 when everything followed in its order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--home", type=Path, help="folder of the platform; default: a temporary one, removed at the end"
    )
    parser.add_argument("--subjects", type=int, default=240)
    parser.add_argument("--days", type=int, default=32, help="longest play; it ends with the retrained model")
    parser.add_argument("--seed", type=int, default=20250101)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clinical-scenario-") as temporary:
        home = (options.home or Path(temporary)).absolute()
        os.environ |= {
            "CLINICAL_HOME": str(home),
            "CLINICAL_TRIAL": TRIAL,
            "CLINICAL_VAR_CLINICAL_DATA_MINIMUM_RECORDS": "100000000",  # the script is the clock of the data pipeline
            "CLINICAL_VAR_RETRAINING_PAUSE_HOURS": str(PAUSE_HOURS),
            "CLINICAL_VAR_RETRAINING_HOLDOUT_SHARE": str(HOLDOUT_SHARE),
        }
        # every patient has new records every day, so that all features are computed anew
        os.environ.setdefault("CLINICAL_SPARK_MEMORY_MB", "2048")
        from clinical_orchestration.stack import client
        from clinical_orchestration.stack.settings import INTERNAL_PORTS, PUBLIC_PORTS, StackSettings

        settings = StackSettings.load(home, ports=dict.fromkeys((*PUBLIC_PORTS, *INTERNAL_PORTS), 0))
        print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}  the platform starts in {home}", flush=True)
        client.start(settings)
        timeline = Timeline()
        try:
            os.environ |= settings.environment()
            print(f"{'':10}  the page: {settings.url('page')}", flush=True)
            hospital = Hospital(options.subjects, options.days, options.seed)
            play(Platform(settings.environment()), hospital, options.days, timeline)
        finally:
            client.stop(settings)
    print("\nTimeline")
    for day, kind, text in timeline.entries:
        print(f"  day {day:5.1f}  {kind:<11} {text}")
    wrong = in_order(timeline)
    for text in wrong:
        print(f"not as expected: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
