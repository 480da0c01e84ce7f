"""What a stack holds and how it is doing: rows of the tables, the champion model, resources used, a picture.

Everything here asks the running services through their own interfaces; what does not answer is reported as such and
keeps nothing else from being shown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_orchestration import tables
from clinical_orchestration.stack.console import KINDS, MARKS, Display, megabytes
from clinical_orchestration.stack.model import LEVELS, MAX_LEVEL, ServiceStatus, StackStatus

if TYPE_CHECKING:
    import httpx

    from clinical_orchestration.stack.settings import StackSettings

CHAMPION = "champion"
MODEL_LEVEL = LEVELS.index("ML pipeline")
METRICS = ("auroc", "auprc", "auprc_lift", "brier", "ece", "prevalence", "rows", "subjects", "events")
METRIC_TITLES = {
    "auroc": "AUROC", "auprc": "AUPRC", "auprc_lift": "AUPRC / prevalence", "brier": "Brier score",
    "ece": "calibration error",
}  # fmt: skip
TABLES: tuple[str, ...] = (
    *(tables.bronze(domain) for domain in tables.DOMAINS),
    *(tables.silver(domain) for domain in tables.DOMAINS),
    tables.QUARANTINE,
    tables.DUPLICATES,
    tables.FEATURES,
    tables.TRAINING_SET,
    tables.PREDICTIONS,
    tables.PREDICTION_OUTCOMES,
)


@dataclass
class TableRows:
    """Rows and Delta version of one table; both None where it does not exist yet."""

    name: str
    rows: int | None
    version: int | None


@dataclass
class Model:
    """The champion of a trial's model; `metrics` are those of its training run."""

    name: str
    version: str
    alias: str
    trial: str
    run_id: str
    candidate: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    def metric_lines(self) -> list[tuple[str, str]]:
        """Return (title, value with its interval) of the metrics that people look at first."""
        lines = []
        for name in ("auroc", "auprc", "auprc_lift", "brier", "ece"):
            if name in self.metrics:
                text = f"{self.metrics[name]:.3f}"
                lower, upper = self.metrics.get(f"{name}_lower"), self.metrics.get(f"{name}_upper")
                if lower is not None and upper is not None:
                    text += f"  (95 % interval {lower:.3f} to {upper:.3f})"
                lines.append((METRIC_TITLES[name], text))
        counts = (name for name in ("rows", "subjects", "events") if name in self.metrics)
        lines += [(f"evaluated {name}", f"{self.metrics[name]:,.0f}") for name in counts]
        return lines


@dataclass
class Summary:
    """What a running stack holds."""

    trial: str
    tables: list[TableRows] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    online_patients: int | None = None
    example_patient: str | None = None
    runs: dict[str, int] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "trial": self.trial,
            "tables": {table.name: {"rows": table.rows, "version": table.version} for table in self.tables},
            "models": [
                {
                    "name": model.name,
                    "version": model.version,
                    "alias": model.alias,
                    "trial": model.trial,
                    "run_id": model.run_id,
                    "candidate": model.candidate,
                    "metrics": {
                        name: value
                        for name, value in model.metrics.items()
                        if name.removesuffix("_lower").removesuffix("_upper") in METRICS
                    },
                }
                for model in self.models
            ],
            "online_patients": self.online_patients,
            "runs": self.runs,
            "urls": self.urls,
            "problems": self.problems,
        }


def read_tables() -> list[TableRows]:
    """Count the rows of every table of the contract, from Delta; a table that is not there has None."""
    from clinical_orchestration.stores.tables import DeltaTableStore

    store = DeltaTableStore.from_settings()

    def read(name: str) -> TableRows:
        version = store.version(name)
        return TableRows(name, None if version is None else store.row_count(name), version)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read, TABLES))


def read_models(mlflow_url: str, client: httpx.Client) -> list[Model]:
    """Read the champion of every trial profile's model from MLflow's REST API."""
    from clinical_orchestration.trials import available_trials, configured_trial

    found = []
    base = f"{mlflow_url.rstrip('/')}/api/2.0/mlflow"
    for name in sorted({configured_trial(trial).model_name for trial in available_trials()}):
        answer = client.get(f"{base}/registered-models/alias", params={"name": name, "alias": CHAMPION})
        if answer.status_code in (400, 404):  # no such model, or no champion yet
            continue
        answer.raise_for_status()
        version = answer.json()["model_version"]
        tags = {tag["key"]: tag["value"] for tag in version.get("tags", [])}
        model = Model(
            name=name,
            version=str(version["version"]),
            alias=CHAMPION,
            trial=tags.get("trial", ""),
            run_id=version.get("run_id", ""),
            candidate=tags.get("candidate", ""),
        )
        if model.run_id:
            run = client.get(f"{base}/runs/get", params={"run_id": model.run_id})
            if run.status_code == 200:
                data = run.json()["run"]["data"]
                model.metrics = {item["key"]: float(item["value"]) for item in data.get("metrics", [])}
                run_tags = {tag["key"]: tag["value"] for tag in data.get("tags", [])}
                model.candidate = model.candidate or run_tags.get("candidate", "")
        found.append(model)
    return found


def read_runs(postgres_url: str) -> dict[str, int]:
    """Count the runs by status in the instance's database."""
    import psycopg2

    connection = psycopg2.connect(postgres_url, connect_timeout=3, options="-c statement_timeout=5000")
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT to_regclass('runs') IS NOT NULL")
            row = cursor.fetchone()
            if row is None or not row[0]:
                return {}
            cursor.execute("SELECT status, count(*) FROM runs GROUP BY status ORDER BY status")
            return {str(status): int(count) for status, count in cursor.fetchall()}
    finally:
        connection.close()


def read_online(trial: str) -> tuple[int, str | None]:
    """Count the patients that have online features, and name one whose id may be shown.

    Ids are shown only where the trial's records are public or simulated.
    """
    import redis

    from clinical_orchestration.settings import ClientSettings, Variables
    from clinical_orchestration.stores.online import RedisOnlineStore

    url, prefix = ClientSettings().redis_url.get_secret_value(), Variables().feature_store_redis_prefix
    store = RedisOnlineStore(url, prefix, retries=0)  # somebody waits for the answer
    try:
        count = store.count()
    finally:
        store.close()
    example = None
    if count and _is_public(trial):
        with redis.Redis.from_url(url, decode_responses=True, socket_timeout=3, socket_connect_timeout=3) as client:
            for key in client.scan_iter(match=f"{prefix}*:features", count=200):
                if client.hget(key, "trial") == trial:
                    example = key.removeprefix(prefix).removesuffix(":features")
                    break
    return count, example


def _is_public(trial: str) -> bool:
    from clinical_orchestration.trials import load_trial

    sources = load_trial(trial).sources
    return bool(sources.simulation or (sources.files and sources.files.collection))


def urls(settings: StackSettings) -> dict[str, str]:
    """Return where people look."""
    page = settings.url("page")
    return {
        "page": f"{page}/",
        "dagster": f"{page}/dagster/",
        "health": f"{page}/health",
        "mlflow": settings.url("mlflow"),
        "serving": f"{settings.url('serving')}/docs",
        "gateway": f"{settings.url('gateway')}/docs",
        "s3": settings.url("s3"),
    }


URL_TITLES = {
    "page": "Platform page",
    "dagster": "Dagster UI",
    "health": "Health (JSON)",
    "mlflow": "MLflow",
    "serving": "Model serving",
    "gateway": "Ingestion gateway",
    "s3": "S3 endpoint",
}


def read_summary(settings: StackSettings, trial: str, level: int = MAX_LEVEL) -> Summary:
    """Read everything of :class:`Summary`; parts that do not answer become problems.

    What belongs to a level above `level` is not asked for.

    The environment must be that of the stack (:meth:`StackSettings.environment`).
    """
    import httpx

    summary = Summary(trial, urls=urls(settings))

    def part(name: str, read: Callable[[], Any], keep: Callable[[Any], None]) -> None:
        try:
            keep(read())
        except Exception as error:  # each part is another service, and any of them may be down
            summary.problems.append(f"{name}: {type(error).__name__}: {_first_line(error)}")

    def keep(attribute: str) -> Callable[[Any], None]:
        def store(value: Any) -> None:
            if attribute == "online":
                summary.online_patients, summary.example_patient = value
            else:
                setattr(summary, attribute, value)

        return store

    with httpx.Client(timeout=5.0, trust_env=False) as client:
        parts: tuple[tuple[str, Callable[[], Any], str], ...] = (
            ("tables (S3)", read_tables, "tables"),
            ("model (MLflow)", lambda: read_models(settings.url("mlflow"), client), "models"),
            ("online features (Redis)", lambda: read_online(trial), "online"),
            ("runs (PostgreSQL)", lambda: read_runs(settings.postgres_url()), "runs"),
        )
        asked = [item for item in parts if item[2] != "models" or level >= MODEL_LEVEL]
        with ThreadPoolExecutor(len(asked)) as pool:
            list(pool.map(lambda item: part(item[0], item[1], keep(item[2])), asked))
    return summary


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def show_summary(display: Display, summary: Summary) -> None:
    """Write a summary for people."""
    display.title("Tables (rows, Delta version)")
    existing = [table for table in summary.tables if table.rows is not None]
    if existing:
        display.table(
            ("table", "rows", "version"),
            [(table.name, f"{table.rows:,}", str(table.version)) for table in existing],
        )
    else:
        display.write("  none yet; ./pipeline-manager.sh --run clinical_data_pipeline fills them")
    if summary.online_patients is not None:
        display.write(f"  online features: {summary.online_patients:,} patients")
    display.title("Model")
    if not summary.models:
        display.write("  no champion yet")
    for model in summary.models:
        candidate = f", {model.candidate}" if model.candidate else ""
        trial = f", trial {model.trial}" if model.trial else ""
        display.write(f"  {model.name} version {model.version}, alias {model.alias}{candidate}{trial}")
        for title, value in model.metric_lines():
            display.write(f"    {title:<20} {value}")
    if summary.runs:
        display.title("Runs")
        display.write("  " + ", ".join(f"{count} {status.lower()}" for status, count in summary.runs.items()))
    show_urls(display, summary.urls)
    if summary.models:
        serving = summary.urls["serving"].removesuffix("/docs")
        body = f'{{"patient_id": "{summary.example_patient or "ID OF A PATIENT"}"}}'
        display.title("Try it")
        display.write(f"  curl -s {serving}/predict -H 'Content-Type: application/json' -d '{body}'")
        display.write(
            '  eval "$(./pipeline-manager.sh --env)"     # for any client: aws, mlflow, duckdb, redis, kafka, dagster'
        )
    for problem in summary.problems:
        display.write(f"  {MARKS['bad']} {problem}", "red")


def show_urls(display: Display, places: Mapping[str, str]) -> None:
    """Write the addresses."""
    display.title("Where to look")
    for name, url in places.items():
        display.write(f"  {URL_TITLES.get(name, name):<18} {url}")
    display.write("  The page's first user is admin with the password admin: clinical users password admin changes it.")


def show_health(display: Display, status: StackStatus, level: int) -> None:
    """Write the state of every service up to a level."""
    display.title(f"Health, levels 0 to {level}")
    rows, kinds = [], []
    for service in sorted(status.services, key=lambda item: item.level):
        if service.level > level:
            continue
        kind = KINDS.get(service.state, "idle")
        latency = f"{service.latency_ms:.0f} ms" if service.latency_ms is not None else ""
        note = "" if service.state == "healthy" else (service.error or service.note or "")
        rows.append(
            (str(service.level), service.title or service.name, f"{MARKS[kind]} {service.state}", latency, note)
        )
        kinds.append(kind)
    display.table(("level", "service", "state", "latency", ""), rows, kinds)
    for service in status.services:
        if service.level <= level and service.state != "healthy" and service.cure:
            display.write(f"  {service.name}: {service.cure}")
    if status.error:
        display.write(f"  {MARKS['bad']} {status.error}", "bold red")
        if status.cure:
            display.write(f"    {status.cure}")
    bad = [service.name for service in status.services if service.level <= level and not service.ok]
    display.write(f"  not healthy: {', '.join(bad)}" if bad else "  all healthy", "bold red" if bad else "green")


# ---------------------------------------------------------------------------------------------------------------- stats


@dataclass
class ServiceStats:
    """What one service uses: processor in percent of one core, resident memory, disk, seconds since its start."""

    name: str
    cpu_percent: float | None
    rss_mb: float | None
    disk_mb: float | None
    uptime_seconds: float | None
    restarts: int


def _tree(pid: int) -> list[Any]:
    import psutil

    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def read_stats(settings: StackSettings, status: StackStatus, sample_seconds: float = 0.5) -> list[ServiceStats]:
    """Measure every service's process tree over `sample_seconds`, and its folder."""
    import psutil

    def cpu(processes: Sequence[Any]) -> float:
        total = 0.0
        for process in processes:
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.Error:
                continue
        return total

    trees = {service.name: _tree(service.pid) if service.pid else [] for service in status.services}
    before, began = {name: cpu(processes) for name, processes in trees.items()}, time.monotonic()
    time.sleep(sample_seconds)
    elapsed = time.monotonic() - began
    stats = []
    for service in status.services:
        processes = trees[service.name]
        rss = 0
        for process in processes:
            try:
                rss += process.memory_info().rss
            except psutil.Error:
                continue
        folder = settings.home / "data" / service.name
        stats.append(
            ServiceStats(
                service.name,
                max(0.0, 100 * (cpu(processes) - before[service.name]) / elapsed) if processes else None,
                rss / 1024**2 if processes else None,
                folder_megabytes(folder) if folder.is_dir() else None,
                time.time() - service.started_at if service.started_at and processes else None,
                service.restarts,
            )
        )
    return stats


def folder_megabytes(folder: Path) -> float:
    """Return what the files below a folder take on disk, in MB; unreadable parts count as nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:
                continue
    return total / 1024**2


def show_stats(display: Display, stats: Sequence[ServiceStats], home: Path, summary: Summary) -> None:
    """Write what the stack uses and how much it holds."""
    from clinical_orchestration.stack.console import seconds

    display.title("Resources")
    display.table(
        ("service", "cpu %", "memory", "disk", "up", "restarts"),
        [
            (
                item.name,
                "" if item.cpu_percent is None else f"{item.cpu_percent:.0f}",
                megabytes(item.rss_mb),
                megabytes(item.disk_mb),
                "" if item.uptime_seconds is None else seconds(item.uptime_seconds),
                str(item.restarts),
            )
            for item in stats
        ],
    )
    memory = sum(item.rss_mb or 0 for item in stats)
    cpu = sum(item.cpu_percent or 0 for item in stats)
    display.write(f"  all services: {cpu:.0f} % of one core, {megabytes(memory)} resident")
    display.write(f"  {home}: {megabytes(folder_megabytes(home))} on disk")
    rows = sum(table.rows or 0 for table in summary.tables)
    display.write(f"  rows in all tables: {rows:,}; runs: {sum(summary.runs.values())}")
    for problem in summary.problems:
        display.write(f"  {MARKS['bad']} {problem}", "red")


# -------------------------------------------------------------------------------------------------------------- picture


def picture(status: StackStatus) -> list[str]:
    """Return the data flow and the levels as text, each service with the mark of its present state."""
    services = {service.name: service for service in status.services}

    def box(name: str, label: str) -> str:
        service = services.get(name)
        return f"[{MARKS[KINDS.get(service.state, 'idle')] if service else '?'} {label}]"

    lines = [
        "",
        "  trial files (.xpt .csv .parquet) ----------------------.",
        f"  devices -> {box('gateway', 'gateway')} -> {box('kafka', 'Kafka')} ------------------+",
        "                                                         v",
        f"  {box('spark', 'Spark Connect')}   bronze -> silver -> gold   Delta tables in {box('s3', 'S3')}",
        "                       |         |          |",
        "                       |         v          v",
        f"                       |     quarantine   features -> {box('redis', 'Redis')} online",
        "                       v                    |              |",
        "  accounting per record       train, evaluate, register   |",
        "                                            v              v",
        f"                                     {box('mlflow', 'MLflow')} -> {box('serving', 'serving')} -> predictions",
        "",
        f"  {box('code_server', 'code server')} {box('daemon', 'Dagster daemon')} {box('page', 'page :8085')}"
        f"  runs in {box('postgres', 'PostgreSQL')}",
        "",
    ]
    for level, name in enumerate(LEVELS):
        members = [service for service in status.services if service.level == level]
        shown = "  ".join(f"{MARKS[KINDS.get(service.state, 'idle')]} {service.name}" for service in members)
        lines.append(f"  level {level} {name:<20} {shown or '-'}")
    lines += ["", f"  {MARKS['good']} healthy  {MARKS['busy']} starting  {MARKS['bad']} unhealthy  "
              f"{MARKS['idle']} stopped  {MARKS['warn']} not installed"]  # fmt: skip
    return lines


# ----------------------------------------------------------------------------------------------------------------- logs


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines of a file without reading all of it; none where it cannot be read."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            position, block = stream.tell(), b""
            while position > 0 and block.count(b"\n") <= lines:
                step = min(65536, position)
                position -= step
                stream.seek(position)
                block = stream.read(step) + block
    except OSError:
        return []
    return block.decode("utf-8", errors="replace").splitlines()[-lines:] if lines > 0 else []


def log_path(service: ServiceStatus, home: Path) -> Path:
    """Return a service's log file."""
    return Path(service.log) if service.log else home / "logs" / f"{service.name}.log"
