"""Subcommands of ``clinical``: cohorts, Kafka, features, Spark jobs, data, models and the audit trail, from a shell.

They work on the deployment that the environment names (``eval "$(./pipeline-manager.sh --env)"``); where it names none,
on the embedded stack of this checkout. ``--json`` gives one JSON object on standard output.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from clinical_orchestration.stack.console import Display, UserError

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.cohorts.cohort import AttritionStep
    from clinical_orchestration.stores.spark_jobs import SparkJobs

GROUPS = ("cohort", "kafka", "features", "spark", "data", "models", "audit", "users")
"""First words of a command line that are answered here."""

SHOWN_ROWS = 50

Result = dict[str, Any]


def is_command(arguments: Sequence[str]) -> bool:
    """Return whether a command line begins with one of these subcommands."""
    return bool(arguments) and arguments[0] in GROUPS


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether the answer is to be JSON; what follows ``--`` belongs to a submitted application."""
    own = list(arguments)
    return "--json" in (own[: own.index("--")] if "--" in own else own)


def run(arguments: Sequence[str], display: Display) -> tuple[Result, int]:
    """Carry out a command line; return what ``--json`` shows, and the exit status.

    Raises:
        UserError: it is wrong (status 2), or it failed.
    """
    own, _, rest = _parted(arguments)
    values = build_parser().parse_args(own)
    values.rest = rest
    if rest and values.handler is not _spark_submit:
        raise UserError("the command line is not understood", "only `spark submit` takes arguments after --", "", 2)
    _use_stack()
    from pydantic import ValidationError

    from clinical_orchestration.cli.command import CommandError
    from clinical_orchestration.cli.permissions import permitted
    from clinical_orchestration.cli.recording import recorded
    from clinical_orchestration.clients import ClientError
    from clinical_orchestration.platform.crypto import SecretKeyError
    from clinical_orchestration.platform.database import StoreUnavailableError
    from clinical_orchestration.stores.kafka import KafkaUnavailableError
    from clinical_orchestration.stores.spark_jobs import SparkJobError

    try:
        words = (arguments[0], values.command)
        with recorded(words, values, permitted(words, values)) as ending:
            result, status = values.handler(values, display)
            if status:
                ending.failed = f"exit status {status}"
    except (
        ClientError, SparkJobError, KafkaUnavailableError, CommandError, SecretKeyError, StoreUnavailableError
    ) as error:  # fmt: skip
        raise UserError(f"{arguments[0]} {values.command} failed", str(error)) from None
    except (LookupError, TimeoutError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{arguments[0]} {values.command} failed", str(error)) from None
    except ValidationError as error:
        names = ", ".join(str(problem["loc"][0]) for problem in error.errors(include_input=False, include_url=False))
        raise UserError("the environment is not understood", f"wrong values: {names}", "", 2) from None
    return result, int(status)


def _parted(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    own = list(arguments)
    if "--" not in own:
        return own, "", []
    at = own.index("--")
    return own[:at], "--", own[at + 1 :]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("the command line is not understood", message, f"{self.prog} --help", 2)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommands."""
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on standard output")
    trial = _Parser(add_help=False)
    trial.add_argument("--trial", metavar="NAME", help="trial profile (default: the deployment's)")
    parser = _Parser(prog="clinical", description="Cohorts, Kafka, features, Spark jobs, data, models, audit trail.")
    groups = parser.add_subparsers(dest="group", required=True, parser_class=_Parser)

    def group(name: str, text: str) -> Callable[..., argparse.ArgumentParser]:
        commands = groups.add_parser(name, help=text, description=text).add_subparsers(
            dest="command", required=True, parser_class=_Parser
        )

        def add(command: str, handler: Any, about: str, *, of_trial: bool = True) -> argparse.ArgumentParser:
            parents = [common, trial] if of_trial else [common]
            made = commands.add_parser(command, help=about, description=about, parents=parents)
            made.set_defaults(handler=handler)
            return made

        return add

    add = group("cohort", "patients by inclusion and exclusion criteria")
    build = add("build", _cohort_build, "apply criteria to the trial's records and store the cohort")
    build.add_argument("criteria", help="a YAML file, or the name of criteria that ship (see: cohort criteria)")
    build.add_argument("--dry-run", action="store_true", help="count only, store nothing")
    show = add("show", _cohort_show, "attrition and members of a stored cohort")
    show.add_argument("name")
    show.add_argument("--members", action="store_true", help="list the members, with their reasons")
    add("list", _cohort_list, "cohorts that were built")
    add("criteria", _cohort_criteria, "criteria that ship with the platform", of_trial=False)

    add = group("kafka", "topics, consumer lag and messages")
    topics = add("topics", _kafka_topics, "partitions, lag of the tables and validity of each topic", of_trial=False)
    topics.add_argument("--sample", type=int, default=200, metavar="N", help="newest messages to check (default 200)")
    lag = add("lag", _kafka_lag, "how far each consumer group is behind", of_trial=False)
    lag.add_argument("--group", action="append", metavar="NAME", help="only this group; may be repeated")
    lag.add_argument("--above", type=int, metavar="N", help="fail when a group is more than so many messages behind")
    validate = add("validate", _kafka_validate, "check a file of messages; fails when one is invalid", of_trial=False)
    validate.add_argument("file", type=Path, help="one JSON object a line, or one JSON array")
    validate.add_argument("--domain", help="topic or table of the messages (default: told from the file's name)")

    add = group("features", "online and offline features")
    get = add("get", _features_get, "a patient's online features")
    get.add_argument("patient")
    offline = add("offline", _features_offline, "days with offline features, or the rows of some days")
    offline.add_argument("first", nargs="?", metavar="DATE", help="UTC day, such as 2014-01-02; none: list the days")
    offline.add_argument("last", nargs="?", metavar="LAST", help="last day of a span")
    offline.add_argument("--patient", help="only this patient")
    compare = add("compare", _features_compare, "online against offline features; fails where they differ")
    compare.add_argument("day", nargs="?", metavar="DATE", help="patients whose newest row is of this day; none: all")

    add = group("spark", "Spark batch jobs")
    submit = add("submit", _spark_submit, "start a PySpark script; what follows -- goes to it", of_trial=False)
    submit.add_argument("application", help="script (or with Spark Connect a module) with main(spark)")
    submit.add_argument("--name", help="shown in Spark's pages (default: the script's name)")
    submit.add_argument("--conf", action="append", default=[], metavar="NAME=VALUE", help="Spark property")
    submit.add_argument("--wait", action="store_true", help="wait for the end; the exit status is the job's")
    submit.add_argument("--timeout", type=float, metavar="SECONDS", help="with --wait: longest wait")
    status = add("status", _spark_status, "state of a job, or of all", of_trial=False)
    status.add_argument("job", nargs="?")
    status.add_argument("--wait", action="store_true", help="wait for the job's end; the exit status is the job's")
    status.add_argument("--timeout", type=float, metavar="SECONDS", help="with --wait: longest wait")
    logs = add("logs", _spark_logs, "what a job wrote", of_trial=False)
    logs.add_argument("job")
    logs.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="last lines (default 100)")
    kill = add("kill", _spark_kill, "end a job", of_trial=False)
    kill.add_argument("job")
    stream = add("stream", _spark_stream, "the streaming job: Kafka to silver in micro-batches", of_trial=False)
    stream.add_argument("action", choices=("start", "status", "stop"))
    stream.add_argument("--interval", metavar="TIME", help="with start: between micro-batches, such as 30s")
    stream.add_argument("--once", action="store_true", help="with start: take in what is there, then end")

    add = group("data", "the trial's tables")
    add("tables", _data_tables, "rows and versions of every table")
    add("quality", _data_quality, "rules and scores of the trial's tables; fails where a rule is broken")

    add = group("models", "models and predictions")
    add("list", _models_list, "versions of the trial's model")
    predict = add("predict", _models_predict, "a patient's risk, by the model server")
    predict.add_argument("patient")
    register = add("register", _models_register, "make the model of an MLflow run a version")
    register.add_argument("run")
    promote = add("promote", _models_promote, "make a version the champion, if the promotion rule allows it")
    promote.add_argument("version")
    experiment = add("experiment", _models_experiment, "make an MLflow experiment, or restore it", of_trial=False)
    experiment.add_argument("name")

    from clinical_orchestration.cli import audit
    from clinical_orchestration.cli.groups import users

    audit.add_commands(partial(group("audit", "the audit trail: who changed what"), of_trial=False))

    add = group("users", "users, their roles, passwords and tokens")
    for name, text, work, args in users.CLINICAL:
        made = add(name, partial(_users, work), text, of_trial=False)
        for arg in args:
            arg.add_to(made)
    return parser


def _use_stack() -> None:
    """Take the environment of the embedded stack for what the shell does not set, where that stack was set up."""
    from clinical_orchestration.stack import paths
    from clinical_orchestration.stack.settings import StackSettings, default_home

    home = default_home()
    if "AWS_ACCESS_KEY_ID" in os.environ or not paths.secrets_file(home).exists():
        return
    for name, value in StackSettings.load(home).environment().items():
        os.environ.setdefault(name, value)


# --- cohorts ---------------------------------------------------------------------------------------------------------


def _cohort_build(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import ClinicalData

    data = ClinicalData(values.trial)
    if values.dry_run:
        cohort = data.match(values.criteria)
        title = cohort.definition.title or cohort.definition.name
        result: Result = {
            "cohort": cohort.definition.name,
            "trial": data.trial,
            "definition_hash": cohort.definition.hash(),
            "screened": len(cohort.screened),
            "members": len(cohort.members),
            "statuses": cohort.statuses(),
            "attrition": [asdict(step) for step in cohort.attrition],
            "stored": False,
        }
        steps: Sequence[AttritionStep] = cohort.attrition
    else:
        report = data.build_cohort(values.criteria)
        title, steps, result = report.title, report.attrition, {**report.as_dict(), "stored": True}
    _show_flow(display, values, title, result, steps)
    return result, 0


def _cohort_show(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import ClinicalData

    data = ClinicalData(values.trial)
    report, rows = data.stored_cohort(values.name)
    result = report.as_dict()
    _show_flow(display, values, report.title, result, report.attrition)
    if values.members:
        members = rows.filter(rows["member"])
        result["patients"] = [
            {"patient_id": row["patient_id"], "index_time": row["index_time"].isoformat(), "reasons": row["reasons"]}
            for row in members.iter_rows(named=True)
        ]
        if not values.json:
            display.title("Members")
            for patient in result["patients"]:
                display.write(f"  {patient['patient_id']}  index {patient['index_time']}")
                for reason in patient["reasons"]:
                    display.write(f"      {reason}")
    return result, 0


def _show_flow(
    display: Display, values: argparse.Namespace, title: str, result: Result, steps: Iterable[AttritionStep]
) -> None:
    if values.json:
        return
    display.title(title)
    display.write(f"  {result['members']} of {result['screened']} patients, definition {result['definition_hash']}")
    display.write()
    display.table(
        ["step", "entered", "removed", "unknown", "remaining", "criterion"],
        [
            [
                step.criterion,
                str(step.entered),
                str(step.removed),
                str(step.removed_unknown),
                str(step.remaining),
                step.description,
            ]
            for step in steps
        ],
    )


def _cohort_list(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import ClinicalData

    columns = ["cohort", "trial", "screened", "members", "definition_hash", "built_at"]
    rows = ClinicalData(values.trial).cohorts().select(columns)
    return _rows(display, values, "cohorts", rows, "no cohort was built for this trial yet: clinical cohort build"), 0


def _cohort_criteria(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.cohorts.criteria import available_definitions, load_definition

    found = [load_definition(name) for name in available_definitions()]
    rows = [{"name": item.name, "trial": item.trial or "any", "title": item.title} for item in found]
    if not values.json:
        display.table(["name", "trial", "title"], [list(row.values()) for row in rows])
    return {"criteria": rows}, 0


# --- Kafka -----------------------------------------------------------------------------------------------------------


def _kafka_topics(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import ClinicalData
    from clinical_orchestration.ingestion.kafka import monitor_topics
    from clinical_orchestration.settings import Variables
    from clinical_orchestration.stores.kafka import topic_reader

    reader = topic_reader()
    try:
        report = monitor_topics(ClinicalData().tables, reader, Variables().topics(), sample=max(0, values.sample))
    finally:
        reader.close()
    if not values.json:
        display.table(
            ["topic", "partitions", "messages", "behind", "newest", "invalid in sample"],
            [
                [
                    state.topic,
                    str(len(state.partitions)) if state.exists else "no such topic",
                    str(state.messages),
                    str(state.lag),
                    "" if state.newest_age_seconds is None else f"{state.newest_age_seconds:.0f} s ago",
                    f"{state.invalid} of {state.sampled}" if state.sampled else "",
                ]
                for state in report.topics.values()
            ],
        )
    return {"topics": report.as_metadata(), "lag": report.lag}, 0


def _kafka_lag(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.ingestion.kafka_tools import consumer_lag
    from clinical_orchestration.stores.kafka import topic_admin

    found = consumer_lag(topic_admin(), groups=values.group)
    beyond = [item for item in found if values.above is not None and item.lag > values.above]
    if not values.json:
        if not found:
            display.write("no consumer group has offsets")
        display.table(
            ["group", "state", "topic", "behind"],
            [[item.group, item.state, item.topic, str(item.lag)] for item in found],
            ["bad" if item in beyond else "good" for item in found],
        )
    groups = [
        {"group": item.group, "state": item.state, "topic": item.topic, "lag": item.lag, "partitions": item.partitions}
        for item in found
    ]
    return {"groups": groups}, 1 if beyond else 0


def _kafka_validate(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.ingestion.kafka_tools import validate_file

    report = validate_file(values.file, values.domain)
    if not values.json:
        display.line(
            f"{report.valid} of {report.checked} messages of {report.domain} are valid",
            "bad" if report.invalid else "good",
        )
        display.table(["rule", "messages"], [[rule, str(count)] for rule, count in report.reasons.items()])
        for place, reasons in report.faults:
            display.write(f"  line {place}: {'; '.join(reasons)}")
        if report.invalid > len(report.faults):
            display.write(f"  and {report.invalid - len(report.faults)} more")
    return report.as_dict(), 1 if report.invalid else 0


# --- features --------------------------------------------------------------------------------------------------------


def _features_get(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import FeatureStore

    store = FeatureStore(values.trial)
    found = store.online(values.patient)
    result: Result = {
        "patient_id": found.patient_id,
        "trial": found.trial,
        "feature_time": found.feature_time.isoformat(),
        "loaded_at": None if found.loaded_at is None else found.loaded_at.isoformat(),
        "feature_set": found.feature_set,
        "features": found.features,
    }
    if not values.json:
        display.title(f"{found.patient_id}, {found.trial}, features at {result['feature_time']}")
        known = {name: value for name, value in found.features.items() if value is not None}
        display.table(["feature", "value"], [[name, f"{value:.6g}"] for name, value in known.items()])
        display.write(f"  {len(known)} of {len(store.names)} features have a value")
    return result, 0


def _features_offline(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    import polars as pl

    from clinical_orchestration.clients import FeatureStore

    store = FeatureStore(values.trial)
    if values.first is None:
        return _rows(display, values, "days", store.days(), "there are no offline features of this trial yet"), 0
    rows = store.offline((values.first, values.last or values.first))
    if values.patient:
        rows = rows.filter(pl.col("patient_id") == values.patient)
    filled = pl.sum_horizontal(pl.col(name).is_not_null().cast(pl.Int64) for name in store.names)
    shown = rows if values.json else rows.select("patient_id", "feature_time", filled.alias("features_with_value"))
    return _rows(display, values, "rows", shown, "there are no features of that time"), 0


def _features_compare(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import FeatureStore

    rows = FeatureStore(values.trial).compare(values.day)
    counts = dict.fromkeys(("equal", "missing", "older", "newer", "differing"), 0)
    counts |= dict(rows.group_by("status").len().iter_rows())
    different = rows.filter(rows["status"] != "equal")
    if not values.json:
        display.table(["status", "patients"], [[name, str(count)] for name, count in counts.items()])
        if different.height:
            display.title("Not equal")
    result = _rows(display, values, "not_equal", different, "")
    return {"patients": rows.height, **counts, **result}, 0 if rows.height == counts["equal"] else 1


# --- Spark -----------------------------------------------------------------------------------------------------------


def _jobs() -> SparkJobs:
    from clinical_orchestration.stack import java
    from clinical_orchestration.stack.model import StackError
    from clinical_orchestration.stores.spark_jobs import spark_jobs

    try:
        found, options = java.find_java(), java.SPARK_OPTIONS
    except StackError:  # only SparkSubmit on this machine needs it, and says so itself
        return spark_jobs()
    return spark_jobs(java=found, java_options=options)


def _spark_submit(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    properties = {}
    for item in values.conf:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UserError("the command line is not understood", f"--conf {item} is not NAME=VALUE", "", 2)
        properties[name] = value
    jobs = _jobs()
    status = jobs.submit(values.application, values.rest, name=values.name, properties=properties)
    if values.wait:
        return _followed(jobs, status.job_id, values, display)
    if not values.json:
        display.write(status.job_id)
    return status.as_dict(), 0


def _spark_status(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    jobs = _jobs()
    if values.job and values.wait:
        return _followed(jobs, values.job, values, display)
    found = [jobs.status(values.job)] if values.job else jobs.jobs()
    if not values.json:
        if not found:
            display.write("no job was submitted yet")
        display.table(
            ["job", "state", "started", "where", "why"],
            [
                [
                    item.job_id,
                    item.state.value,
                    f"{item.started_at:%Y-%m-%d %H:%M:%S}" if item.started_at else "",
                    item.where,
                    item.message,
                ]
                for item in found
            ],
        )
    return {"jobs": [item.as_dict() for item in found]}, 0


def _followed(jobs: SparkJobs, job: str, values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.stores.spark_jobs import JobState, wait

    with display.working(f"{job} runs"):
        status = wait(jobs, job, timeout_seconds=values.timeout)
    good = status.state is JobState.FINISHED
    if not values.json:
        why = f": {status.message}" if status.message else ""
        display.line(f"{job} {status.state.value}{why}", "good" if good else "bad")
    return status.as_dict(), 0 if good else 1


def _spark_logs(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    lines = _jobs().logs(values.job, values.lines)
    if not values.json:
        for line in lines:
            display.write(line)
    return {"job_id": values.job, "lines": lines}, 0


def _spark_kill(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    killed = _jobs().kill(values.job)
    if not values.json:
        display.write(f"{values.job} was ended" if killed else f"{values.job} had ended already")
    return {"job_id": values.job, "killed": killed}, 0


def _spark_stream(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    import contextlib
    import io

    from clinical_orchestration.ingestion import streaming
    from clinical_orchestration.ingestion.status_file import read_status
    from clinical_orchestration.settings import ClientSettings

    if values.action == "status":
        found = read_status(ClientSettings().home, streaming.NAME) or {"state": "not running", "running": False}
        if not values.json:
            display.table(["field", "value"], [[name, _cell(_plain(value))] for name, value in found.items()])
        return dict(found), 0 if found.get("running") else 1
    options = [*(["--interval", values.interval] if values.interval else []), *(["--once"] if values.once else [])]
    if options and values.action != "start":
        raise UserError("the command line is not understood", f"{options[0]} belongs to start", "", 2)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = streaming.main([values.action, *options])
    if status:
        raise UserError(f"spark stream {values.action} failed", said.getvalue())
    if not values.json:
        display.write(said.getvalue().strip())
    return {"said": said.getvalue().strip()}, status


# --- data and models -------------------------------------------------------------------------------------------------


def _data_tables(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import ClinicalData

    return _rows(display, values, "tables", ClinicalData(values.trial).catalog(), ""), 0


def _data_quality(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import ClinicalData

    rows = ClinicalData(values.trial).quality()
    return _rows(display, values, "tables", rows, ""), 0 if rows["passed"].all() else 1


def _models_list(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import Models

    models = Models(values.trial)
    result = _rows(display, values, "versions", models.versions(), f"{models.name} has no version yet")
    return {"model": models.name, **result}, 0


def _models_predict(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import Models

    answer = Models(values.trial).predict(values.patient)
    if not values.json:
        display.table(["field", "value"], [[name, str(value)] for name, value in answer.items()])
    return answer, 0


def _models_register(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import Models

    found = Models(values.trial).register(values.run)
    if not values.json:
        display.write(f"{found.name} version {found.version}")
    return {"model": found.name, "version": found.version, "run_id": found.run_id}, 0


def _models_promote(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import Models

    decision = Models(values.trial).promote(values.version)
    if not values.json:
        word, kind = ("promoted", "good") if decision.promote else ("refused", "bad")
        display.line(f"version {values.version} {word}: {'; '.join(decision.reasons)}", kind)
    return decision.to_dict(), 0 if decision.promote else 1


def _models_experiment(values: argparse.Namespace, display: Display) -> tuple[Result, int]:
    from clinical_orchestration.clients import Models

    found = Models().create_experiment(values.name)
    if not values.json:
        display.write(found)
    return {"experiment": values.name, "experiment_id": found}, 0


def _rows(display: Display, values: argparse.Namespace, name: str, rows: pl.DataFrame, nothing: str) -> Result:
    """Return a frame as JSON-ready rows, and show it."""
    data = [{column: _plain(value) for column, value in row.items()} for row in rows.iter_rows(named=True)]
    if not values.json:
        if not data and nothing:
            display.write(nothing)
        display.table(list(rows.columns), [[_cell(value) for value in row.values()] for row in data[:SHOWN_ROWS]])
        if len(data) > SHOWN_ROWS:
            display.write(f"  and {len(data) - SHOWN_ROWS} more; --json gives all")
    return {name: data}


def _users(
    work: Callable[[argparse.Namespace], str | list[dict[str, Any]]], values: argparse.Namespace, display: Display
) -> tuple[Result, int]:
    made = work(values)
    if isinstance(made, str):
        if not values.json:
            display.write(made)
        return {"result": made}, 0
    if not values.json and made:
        display.table(tuple(made[0]), [tuple(_cell(one) for one in row.values()) for row in made])
    return {"rows": made}, 0


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "yes" if value is True else "no" if value is False else str(value)
