"""The command line behind ``pipeline-manager.sh``.

Actions change something, one a call; information flags combine and are answered in the order given. Exit status:
0 success, 1 failure (a run that failed, a stack that is not healthy), 2 a wrong command line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from clinical_orchestration.stack.console import KINDS, Display, UserError, seconds
from clinical_orchestration.stack.model import LEVELS, MAX_LEVEL, Event, OnEvent, StackError, StackStatus

if TYPE_CHECKING:
    from clinical_orchestration.stack.report import Summary
    from clinical_orchestration.stack.runs import Runs, RunState, Step
    from clinical_orchestration.stack.settings import StackSettings

PIPELINE = "clinical_data_pipeline"
BACKFILL = "feature_backfill"
LOG_LINES = 40
_SIDE_BY_SIDE = ("-n", str(min(2, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder")
"""Two processes share the files of the default suite; each starts the services it needs, so that more need memory."""
FOLLOW_SECONDS = 0.5
_MORE_OF_THE_STACK = {
    "AWS_ALLOW_HTTP", "AWS_DEFAULT_REGION", "MLFLOW_S3_ENDPOINT_URL", "CLINICAL_DAGSTER_STORAGE",
    "CLINICAL_STORED_CONNECTIONS", "CLINICAL_CHECKOUT", "CLINICAL_HOME", "CLINICAL_LAUNCHER_FOLDER",
}  # fmt: skip
"""What ``--env`` exports besides the names of ClientSettings and Dagster's own."""

_FEATURE_FLAGS = {
    "compare_stores": "Offline and online features",
    "query_offline": "Offline features",
    "query_online": "Online features",
    "monitor": "Feature pipeline",
}
_TRAINING_TASKS = (
    "setup_mlflow_experiment", "train_model", "evaluate_model", "register_model", "deploy_model",
)  # fmt: skip

_EPILOG = """\
examples:
  ./pipeline-manager.sh --demo                     set up, start, run the pipeline on real trial data, show the result
  ./pipeline-manager.sh --start --level 4          start everything up to the ML pipeline
  ./pipeline-manager.sh -s -h -o                   summary, health and addresses
  ./pipeline-manager.sh --run clinical_data_pipeline --source /data/my-study
  ./pipeline-manager.sh -l kafka --follow          the log of one service, as it grows
  eval "$(./pipeline-manager.sh --env)"            point every client of this shell to the stack

subcommands, each with --help: cohort, kafka, features, spark, data, models, quality, audit
  clinical cohort build cdisc-pilot-eligibility    patients by inclusion and exclusion criteria
  clinical kafka lag                               how far each consumer group is behind
  clinical features compare                        online against offline features
  clinical audit verify                            whether somebody tampered with the audit trail
  clinical stack start                             the flags as words: stack start|stop|health|logs ..., run JOB

Note: -h is the health check; help is --help.
Each port has a setting, CLINICAL_PORT_<NAME>; all state is in CLINICAL_HOME (default: .clinical in the checkout).
"""


class Client(Protocol):
    """What the command line uses of :mod:`clinical_orchestration.stack.client`."""

    def start(self, settings: StackSettings, level: int = ..., on_event: OnEvent | None = ...) -> StackStatus:
        """Bring levels up."""
        ...

    def stop(self, settings: StackSettings, level: int | None = ..., on_event: OnEvent | None = ...) -> StackStatus:
        """Stop levels."""
        ...

    def status(self, settings: StackSettings) -> StackStatus:
        """Return what the supervisor last saw."""
        ...

    def health(self, settings: StackSettings, level: int = ...) -> StackStatus:
        """Ask every service."""
        ...

    def clean(self, settings: StackSettings) -> None:
        """Remove all data."""
        ...

    def install_jars(self, settings: StackSettings, on_event: OnEvent | None = ...) -> bool:
        """Download the jars."""
        ...


class Subcommands(Protocol):
    """Command lines that begin with a word instead of a flag."""

    def is_command(self, arguments: Sequence[str]) -> bool:
        """Return whether a command line is one of these."""
        ...

    def wants_json(self, arguments: Sequence[str]) -> bool:
        """Return whether its answer is to be JSON."""
        ...

    def run(self, arguments: Sequence[str], display: Display) -> tuple[dict[str, Any], int]:
        """Carry it out; return what JSON shows and the exit status. Raises UserError where it fails."""
        ...


class _Parser(argparse.ArgumentParser):
    """Turns argparse's errors into ours, with a hint at what was probably meant."""

    def error(self, message: str) -> NoReturn:
        why = message
        if match := re.search(r"unrecognized arguments: (.*)", message):
            unknown = match[1].split()
            why = f"unknown: {' '.join(unknown)}"
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0], known, n=2, cutoff=0.6)
            if near:
                hint = f"did you mean {' or '.join(near)}? --help lists all"
                raise UserError("the command line is not understood", why, hint, 2)
        raise UserError("the command line is not understood", why, "--help lists all flags", 2)


class _Information(argparse.Action):
    """Keeps the order in which information flags were given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("nargs", 0)
        super().__init__(*args, **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.dest == "logs":
            namespace.service = values or None
        if self.dest in _FEATURE_FLAGS:
            namespace.asked[self.dest] = values or None
        if self.dest not in namespace.information:
            namespace.information.append(self.dest)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="pipeline-manager.sh",
        description="Starts, watches and runs the clinical-trials ML platform on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    levels = ", ".join(f"{number} {name}" for number, name in enumerate(LEVELS))
    actions = parser.add_argument_group("actions, one a call").add_mutually_exclusive_group()
    add = actions.add_argument
    add("--demo", dest="action", action="store_const", const="demo", help="everything from nothing to a served model")
    add("--start", dest="action", action="store_const", const="start", help="start the stack; what runs is left alone")
    add("--stop", dest="action", action="store_const", const="stop", help="stop it; data stays")
    add("--restart-rebuild", dest="action", action="store_const", const="restart",
        help="stop, bring the environment up to date, start again")  # fmt: skip
    add("--clean", dest="action", action="store_const", const="clean", help="stop and remove the data; asks first")
    add("--run", metavar="JOB", help="run one pipeline and follow it; the exit status is the run's")
    add("--run-training", dest="action", action="store_const", const="training",
        help="train, evaluate, register and deploy on the features that there are")  # fmt: skip
    add("--env", dest="action", action="store_const", const="env", help="export lines for eval, for any client")
    add("--test", dest="action", action="store_const", const="test", help="run the tests; what follows goes to pytest")
    add("--fetch-jars", dest="action", action="store_const", const="jars", help="download the jars of Kafka and Spark")
    info = parser.add_argument_group("information, combinable, in the order given").add_argument
    info("-h", "--health-check", dest="health", action=_Information, help="ask every service; fails if one is not well")
    info("-s", "--summary", dest="summary", action=_Information, help="tables, model with metrics, runs, addresses")
    info("-o", "--open", dest="open", action=_Information, help="addresses; opens the page where there is a desktop")
    info("-v", "--visualize", dest="visualize", action=_Information, help="picture of the data flow with live states")
    info("-d", "--stats", dest="stats", action=_Information, help="cpu, memory, disk, runs, rows")
    info("-l", "--logs", dest="logs", action=_Information, nargs="?", metavar="SERVICE", help="end of the logs")
    info("--compare-stores", dest="compare_stores", action=_Information, nargs="?", metavar="DATE",
         help="newest features of each patient, offline against online; of one day only")  # fmt: skip
    info("--query-offline-features", dest="query_offline", action=_Information, nargs="?", metavar="DATE",
         help="feature rows of a day (default: the newest)")  # fmt: skip
    info("--query-online-features", dest="query_online", action=_Information, nargs="?", metavar="PATIENT",
         help="online features of a patient (default: how many there are)")  # fmt: skip
    info("--monitor-feature-pipeline", dest="monitor", action=_Information, nargs="?", metavar="DATE",
         help="rows a day, freshness, offline against online; fails if something is wrong")  # fmt: skip
    more = parser.add_argument_group("options").add_argument
    more("--level", type=_level, metavar="N", help=f"levels 0 to N ({levels}); with --stop and --clean N and above")
    more("--yes", action="store_true", help="do not ask")
    more("--json", action="store_true", help="one JSON object on standard output")
    more("--conf", type=_json_object, metavar="JSON", help="with --run: object given to the pipeline")
    more("--trial", metavar="NAME", help="with --run and --demo: trial profile (default: the deployment's)")
    more("--source", metavar="FOLDER", help="with --run and --demo: folder of SDTM .xpt, .csv or .parquet files")
    more("-f", "--follow", action="store_true", help="with --logs: go on as the log grows")
    more("-n", "--lines", type=int, default=LOG_LINES, metavar="N", help="with --logs: lines a service (%(default)s)")
    more("--version", action="store_true", help="version of the platform")
    more("--help", action="store_true", help="this text")
    parser.set_defaults(action=None, information=[], service=None, asked={})
    return parser


def _level(text: str) -> int:
    if not text.isdigit() or int(text) > MAX_LEVEL:
        raise argparse.ArgumentTypeError(f"{text!r} is no level; use 0 to {MAX_LEVEL}")
    return int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('it must be a JSON object, such as {"force_training": true}')
    return value


@dataclass
class Options:
    """What the user asked for."""

    action: str | None
    information: list[str]
    level: int | None = None
    yes: bool = False
    json: bool = False
    job: str | None = None
    conf: dict[str, Any] = field(default_factory=dict)
    trial: str | None = None
    source: str | None = None
    service: str | None = None
    follow: bool = False
    lines: int = LOG_LINES
    pytest_arguments: list[str] = field(default_factory=list)
    asked: dict[str, str | None] = field(default_factory=dict)
    """What each feature flag is asked about: a date or a patient."""


def parse(arguments: Sequence[str]) -> Options:
    """Turn a command line into options.

    Raises:
        UserError: with status 2, where it is wrong.
    """
    own, pytest_arguments = list(arguments), []
    if "--test" in own:  # all that follows is pytest's, dashes or not
        at = own.index("--test")
        own, pytest_arguments = own[: at + 1], own[at + 1 :]
    values = build_parser().parse_args(own)
    action = values.action
    if values.help or not own:
        action = "help"
    elif values.version:
        action = "version"
    elif values.run:
        action = "run"
    for name, allowed in (("conf", ("run",)), ("trial", ("run", "demo")), ("source", ("run", "demo"))):
        also = {"conf": action == "training", "trial": action == "training" or values.asked}
        if getattr(values, name) is not None and action not in allowed and not also.get(name):
            raise UserError(
                "the command line is not understood", f"--{name} belongs to {' and '.join('--' + a for a in allowed)}",
                "--help lists all flags", 2,
            )  # fmt: skip
    if values.follow and "logs" not in values.information:
        raise UserError("the command line is not understood", "--follow belongs to --logs", "use -l [SERVICE] -f", 2)
    if values.follow and values.json:
        raise UserError(
            "the command line is not understood", "--follow never ends, --json is one object", "drop one", 2
        )
    if action is None and not values.information:
        raise UserError("nothing to do", "there is neither an action nor an information flag", "--help lists all", 2)
    source = None
    if values.source is not None:
        folder = Path(values.source).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(f"the source folder {folder} does not exist", "--source takes a folder of SDTM files",
                            "give an existing folder", 2)  # fmt: skip
        source = str(folder)
    return Options(
        action=action,
        information=values.information,
        level=values.level,
        yes=values.yes,
        json=values.json,
        job=values.run,
        conf=values.conf or {},
        trial=values.trial,
        source=source,
        service=values.service,
        follow=values.follow,
        lines=max(0, values.lines),
        pytest_arguments=pytest_arguments,
        asked=values.asked,
    )


def checkout() -> Path:
    """Return the checkout that this command line belongs to."""
    return Path(os.environ.get("CLINICAL_CHECKOUT") or Path(__file__).resolve().parents[2])


class Commands:
    """Carries out options.

    Args:
        options: what is asked for.
        display: where to show it.
        client: the stack.
        settings: returns the stack's settings; read again after a start, which may have picked ports.
        runs: makes the client of the page's GraphQL endpoint.
    """

    def __init__(
        self,
        options: Options,
        display: Display,
        client: Client,
        settings: Callable[[], StackSettings],
        runs: Callable[[str], Runs] | None = None,
    ) -> None:
        self._options, self._display, self._client = options, display, client
        self._load_settings = settings
        self._make_runs = runs
        self.result: dict[str, Any] = {}

    @property
    def settings(self) -> StackSettings:
        """The stack's settings as they are now."""
        return self._load_settings()

    def execute(self) -> int:
        """Do it all; return the exit status."""
        status = 0
        if self._options.action:
            status = int(getattr(self, f"_do_{self._options.action}")())
            if status:
                return status
        for name in self._options.information:
            status = max(status, int(getattr(self, f"_show_{name}")()))
        return status

    # ------------------------------------------------------------------------------------------------- actions

    def _do_version(self) -> int:
        version = importlib.metadata.version("clinical-orchestration")
        self.result["version"] = version
        if not self._options.json:
            self._display.write(f"clinical-orchestration {version}")
        return 0

    def _do_help(self) -> int:
        self._display.write(build_parser().format_help().rstrip())
        return 0

    @contextlib.contextmanager
    def _events(self, text: str) -> Iterator[OnEvent]:
        """Yield a receiver of the stack's events, and show them."""
        began = time.monotonic()
        shown: dict[str, str] = {}

        def receive(event: Event) -> None:
            elapsed = f"{time.monotonic() - began:6.1f} s"
            if event.progress is not None and event.progress < 1:
                self._display.now(f"{event.message} ({100 * event.progress:.0f} %)")
                return
            if event.service and event.state:
                if shown.get(event.service) == event.state:
                    return
                shown[event.service] = event.state
                self._display.line(f"{elapsed}  {event.message[:300]}", KINDS.get(event.state, "idle"))
                waiting = [name for name, state in shown.items() if state == "starting"]
                self._display.now(f"{text}: {', '.join(waiting)}" if waiting else text)
            else:
                self._display.line(f"{elapsed}  {event.message}", "bad" if event.kind == "error" else "idle")

        with self._display.working(text):
            yield receive

    def _do_start(self) -> int:
        level = MAX_LEVEL if self._options.level is None else self._options.level
        status = self._start(level)
        self.result["start"] = status.as_dict()
        return 0 if status.healthy_up_to(level) else 1

    def _start(self, level: int) -> StackStatus:
        self._display.heading(f"Start, levels 0 to {level}")
        began = time.monotonic()
        with self._events("starting") as on_event:
            status = self._client.start(self.settings, level, on_event)
        bad = [service for service in status.services if service.level <= level and not service.ok]
        if bad:
            for service in bad:
                self._display.error(UserError(f"{service.name} is {service.state}", service.error or "",
                                              service.cure or f"--logs {service.name} shows more"))  # fmt: skip
        else:
            self._display.line(f"all healthy after {seconds(time.monotonic() - began)}", "good")
        for service in status.services:
            if service.state == "not_installed":
                why = service.error or service.note or ""
                self._display.line(
                    f"{service.title or service.name} is not installed: {why} {service.cure or ''}", "warn"
                )
        return status

    def _do_stop(self) -> int:
        level = self._options.level
        self._display.heading("Stop" if level is None else f"Stop, levels {level} to {MAX_LEVEL}")
        with self._events("stopping") as on_event:
            status = self._client.stop(self.settings, level, on_event)
        self.result["stop"] = status.as_dict()
        self._display.line("stopped; the data stays", "good")
        return 0

    def _do_restart(self) -> int:
        level = self._options.level or 0
        self._display.heading(f"Stop, levels {level} to {MAX_LEVEL}")
        with self._events("stopping") as on_event:
            self._client.stop(self.settings, level or None, on_event)
        self._rebuild()
        status = self._start(MAX_LEVEL)
        self.result["restart"] = status.as_dict()
        return 0 if status.healthy_up_to(MAX_LEVEL) else 1

    def _rebuild(self) -> None:
        """Bring the environment to what the lock file says, where this is a checkout."""
        bootstrap = Path(__file__).with_name("bootstrap.py")
        root = checkout()
        if not (root / "uv.lock").is_file():
            return
        self._display.heading("Environment")
        command = [sys.executable, "-I", "-S", str(bootstrap), "--root", str(root), "--venv", sys.prefix, "--again"]
        quiet = subprocess.DEVNULL if self._options.json else None
        if subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stderr=quiet).returncode:
            raise UserError(
                "the environment could not be brought up to date", "see above", "repeat, or --start without"
            )

    def _do_clean(self) -> int:
        settings, level = self.settings, self._options.level or 0
        what = (
            f"all data of {settings.home}"
            if level == 0
            else f"what levels {level} to {MAX_LEVEL} keep in {settings.home}"
        )
        if not self._options.yes:
            if not self._display.interactive:
                raise UserError(f"nothing was removed: {what}", "nobody can be asked here", "give --yes", 2)
            if not self._display.ask(f"Stop and remove {what}?"):
                raise UserError("nothing was removed", "it was not confirmed", "")
        self._display.heading("Clean")
        if level == 0:
            with self._display.working("stopping and removing"):
                self._client.clean(settings)
        else:
            # tables, models and runs lie in level 0; above it there are caches, spools and logs
            with self._events("stopping") as on_event:
                status = self._client.stop(settings, level, on_event)
            for service in status.services:
                if service.level >= level:
                    shutil.rmtree(settings.home / "data" / service.name, ignore_errors=True)
                    for log in (settings.home / "logs").glob(f"{service.name}.log*"):
                        log.unlink(missing_ok=True)
        self.result["clean"] = {"home": str(settings.home), "level": level}
        self._display.line(f"removed: {what}", "good")
        return 0

    def _do_env(self) -> int:
        settings = self.settings
        status = self._client.status(settings)
        if status.supervisor_pid is None:
            self._display.line("the stack is not running; these are the addresses it would have", "warn")
        if self._options.json:
            self.result["env"] = settings.environment()
        else:
            self._display.write(settings.export_lines())
        return 0

    def _do_jars(self) -> int:
        with self._events("fetching the jars of Kafka and Spark") as on_event:
            complete = self._client.install_jars(self.settings, on_event)
        self.result["jars"] = complete
        if complete:
            self._display.line("all jars are there", "good")
        return 0 if complete else 1

    def _do_test(self) -> int:
        from clinical_orchestration.settings import ClientSettings

        # the tests start services of their own; nothing may lead them to this stack
        ours = {str(field.alias) for field in ClientSettings.model_fields.values()} | _MORE_OF_THE_STACK
        environment = {
            name: value for name, value in os.environ.items() if name not in ours and not name.startswith("DAGSTER_")
        }
        arguments = self._options.pytest_arguments or ["-m", "not slow", *_SIDE_BY_SIDE]
        process = subprocess.Popen([sys.executable, "-m", "pytest", *arguments], cwd=checkout(), env=environment)
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # pytest got it too and reports first

    # ---------------------------------------------------------------------------------------------------- runs

    def _do_run(self) -> int:
        state = self._run(self._options.job or PIPELINE)
        self.result["run"] = state.as_dict()
        return _exit_status(state)

    def _do_training(self) -> int:
        """Run the training steps of the pipeline, on the features that there are."""
        state = self._run(PIPELINE, _TRAINING_TASKS, self._options.conf or {"force_training": True})
        self.result["run"] = state.as_dict()
        return _exit_status(state)

    def _run(self, name: str, tasks: Sequence[str] = (), conf: Mapping[str, Any] | None = None) -> RunState:
        """Launch a job, or those `tasks` of it, and follow the run."""
        from clinical_orchestration.stack import runs as runs_module

        settings, options = self.settings, self._options
        conf = options.conf if conf is None else conf
        if name == BACKFILL:
            _check_range(conf)
        if options.trial:
            _check_trial(options.trial)
        if self._client.status(settings).supervisor_pid is None:
            raise UserError("the stack is not running", f"no supervisor holds {settings.home}",
                            "./pipeline-manager.sh --start, then repeat")  # fmt: skip
        token = settings.secrets().service_token.get_secret_value()
        client = (self._make_runs or partial(runs_module.Runs, token=token))(settings.url("page"))
        trial = options.trial or settings.environment().get("CLINICAL_TRIAL") or _default_trial()
        with self._display.working(f"looking for {name}"):
            job = client.find_job(name)
            config = runs_module.run_config(options.trial, options.source, conf)
            tags = {"clinical/trial": trial, "clinical/started_by": "pipeline-manager"}
            run_id = client.launch(job, config, tags, client.assets(job, tasks) if tasks else None)
        self._display.heading(f"Run {name}, trial {trial}")
        self._display.line(f"run {run_id}: {client.run_url(run_id)}", "idle")
        return self._follow(client, run_id, name)

    def _follow(self, client: Runs, run_id: str, name: str) -> RunState:
        """Show a run until it is finished; the first Ctrl-C cancels it, the second leaves."""
        state: RunState | None = None
        shown: set[tuple[str, int]] = set()
        cancelled = False
        with self._display.working(f"{name} waits in the queue"):
            while state is None or not state.finished:
                try:
                    for state in client.follow(run_id, name):
                        self._show_steps(state, shown)
                except KeyboardInterrupt:
                    if cancelled:
                        raise UserError(
                            "left while the run is being cancelled", "", client.run_url(run_id), 130
                        ) from None
                    cancelled = True
                    self._display.line("cancelling the run; once more Ctrl-C leaves without waiting", "warn")
                    client.terminate(run_id)
        took = seconds(state.seconds or 0.0)
        if state.status == "SUCCESS":
            self._display.line(f"{name} succeeded in {took}", "good")
        elif state.status == "CANCELED":
            self._display.line(f"{name} was cancelled after {took}", "warn")
        else:
            failed = [step for step in state.steps.values() if step.outcome == "failure"]
            what = f"{name} failed after {took}" + (f", in {', '.join(step.key for step in failed)}" if failed else "")
            why = "\n".join(f"{step.key}: {step.why}" for step in failed if step.why) or state.why
            self._display.error(UserError(what, why[:2000], f"the whole log is at {client.run_url(run_id)}"))
        return state

    def _show_steps(self, state: RunState, shown: set[tuple[str, int]]) -> None:
        for step in state.steps.values():
            mark = (step.key, step.attempts)
            if step.outcome != "running" and mark not in shown:
                shown.add(mark)
                kind = {"success": "good", "failure": "bad", "retry": "warn"}.get(step.outcome, "idle")
                self._display.line(_step_line(step), kind)
        running = state.running
        if running:
            self._display.now("  ".join(f"{step.key} {seconds(step.seconds)}" for step in running))
        elif state.status in ("QUEUED", "NOT_STARTED", "STARTING"):
            waited = time.time() - state.created if state.created else 0.0
            self._display.now(f"{state.job} {state.status.lower()}, {seconds(waited)}")

    def _do_demo(self) -> int:
        began = time.monotonic()
        if self._options.trial:
            _check_trial(self._options.trial)
        status = self._start(MAX_LEVEL)
        self.result["start"] = status.as_dict()
        if not status.healthy_up_to(MAX_LEVEL):
            return 1
        before = self._summary()
        state = self._run(PIPELINE)
        self.result["run"] = state.as_dict()
        if state.status != "SUCCESS":
            return _exit_status(state)
        after = self._summary()
        self.result["summary"] = after.as_dict()
        if not self._options.json:
            from clinical_orchestration.stack.report import show_summary

            show_summary(self._display, after)
            grown = {table.name: table.rows for table in before.tables} != {
                table.name: table.rows for table in after.tables
            }
            self._display.write()
            if not grown and before.models:
                self._display.write("  Nothing was new: every table has as many rows as before.")
            self._display.write(
                f"  Done in {seconds(time.monotonic() - began)}. The stack goes on running; --stop ends it.",
                "bold green",
            )
        return 1 if after.problems else 0

    # --------------------------------------------------------------------------------------------- information

    def _show_health(self) -> int:
        from clinical_orchestration.stack.report import show_health

        settings = self.settings
        level = self._options.level
        if level is None:
            wanted = self._client.status(settings).level
            level = wanted if wanted >= 0 else MAX_LEVEL
        status = self._client.health(settings, level)
        healthy = status.healthy_up_to(level)
        self.result["health"] = {"healthy": healthy, "level": level, **_up_to(status, level)}
        if not self._options.json:
            show_health(self._display, status, level)
        return 0 if healthy else 1

    def _summary(self) -> Summary:
        from clinical_orchestration.stack.report import read_summary

        settings = self.settings
        os.environ.update(settings.environment())  # the adapters read where the services are from there
        trial = self._options.trial or _default_trial()
        with self._display.working("reading tables, model and runs"):
            return read_summary(settings, trial, self._client.status(settings).level)

    def _show_summary(self) -> int:
        from clinical_orchestration.stack.report import show_summary

        running = self._client.status(self.settings).supervisor_pid is not None
        if not running:
            raise UserError("the stack is not running", "its tables and models are read through its services",
                            "./pipeline-manager.sh --start, then repeat")  # fmt: skip
        summary = self._summary()
        self.result["summary"] = summary.as_dict()
        if not self._options.json:
            show_summary(self._display, summary)
        return 1 if summary.problems else 0

    def _show_open(self) -> int:
        from clinical_orchestration.stack import report

        places = report.urls(self.settings)
        self.result["open"] = places
        if not self._options.json:
            report.show_urls(self._display, places)
            if self._display.interactive and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
                import webbrowser

                webbrowser.open(places["page"])
        return 0

    def _show_visualize(self) -> int:
        from clinical_orchestration.stack.report import picture

        status = self._client.status(self.settings)
        lines = picture(status)
        self.result["visualize"] = {
            "levels": {
                str(level): {service.name: str(service.state) for service in status.services if service.level == level}
                for level in range(len(LEVELS))
            },
            "picture": lines,
        }
        if not self._options.json:
            self._display.title("Platform")
            for line in lines:
                self._display.write(line)
        return 0

    def _show_stats(self) -> int:
        from clinical_orchestration.stack import report

        settings = self.settings
        status = self._client.status(settings)
        running = status.supervisor_pid is not None
        stats = report.read_stats(settings, status) if running else []
        summary = (
            self._summary() if running else report.Summary(_default_trial(), problems=["the stack is not running"])
        )
        self.result["stats"] = {
            "services": {
                item.name: {
                    "cpu_percent": item.cpu_percent,
                    "rss_mb": item.rss_mb,
                    "disk_mb": item.disk_mb,
                    "uptime_seconds": item.uptime_seconds,
                    "restarts": item.restarts,
                }
                for item in stats
            },
            "home": str(settings.home),
            "disk_mb": report.folder_megabytes(settings.home),
            "runs": summary.runs,
            "rows": {table.name: table.rows for table in summary.tables},
            "problems": summary.problems,
        }
        if not self._options.json:
            report.show_stats(self._display, stats, settings.home, summary)
        return 1 if summary.problems else 0

    def _show_compare_stores(self) -> int:
        return self._show_features("compare_stores", lambda found: bool(found["consistent"]))

    def _show_query_offline(self) -> int:
        return self._show_features("query_offline", lambda found: True)

    def _show_query_online(self) -> int:
        return self._show_features("query_online", lambda found: bool(found.get("found", True)))

    def _show_monitor(self) -> int:
        return self._show_features("monitor", lambda found: not found["problems"])

    def _show_features(self, kind: str, good: Callable[[dict[str, Any]], bool]) -> int:
        """Ask the feature store; the exit status is 1 where the answer is not `good`."""
        from clinical_orchestration.stack import feature_queries

        asked = self._options.asked.get(kind)
        about: Any = asked if kind == "query_online" or asked is None else _date(asked)
        trial = self._options.trial or _default_trial()
        _check_trial(trial)
        settings = self.settings
        if self._client.status(settings).supervisor_pid is None:
            raise UserError("the stack is not running", "the feature store is read through its services",
                            "./pipeline-manager.sh --start, then repeat")  # fmt: skip
        os.environ.update(settings.environment())  # the stores read where the services are from there
        with self._display.working("reading the feature store"):
            found = getattr(feature_queries, kind)(feature_queries.Stores.open(trial), about)
        self.result[kind] = found
        if not self._options.json:
            self._display.title(_FEATURE_FLAGS[kind] + f", {trial}")
            for line in feature_queries.lines(kind, found):
                self._display.write(line)
        return 0 if good(found) else 1

    def _show_logs(self) -> int:
        from clinical_orchestration.stack import report

        settings = self.settings
        status = self._client.status(settings)
        wanted = self._options.service
        files = {service.name: report.log_path(service, settings.home) for service in status.services}
        supervisor = settings.home / "logs" / "supervisor.log"
        if supervisor.exists():
            files["supervisor"] = supervisor
        if wanted and wanted not in files:
            near = difflib.get_close_matches(wanted, files, n=1)
            raise UserError(f"there is no service {wanted!r}", f"the services are: {', '.join(files)}",
                            f"did you mean {near[0]}?" if near else "name one of them", 2)  # fmt: skip
        if wanted:
            files = {wanted: files[wanted]}
        elif self._options.level is not None:
            allowed = {service.name for service in status.services if service.level <= self._options.level}
            files = {name: path for name, path in files.items() if name in allowed}
        lines = {name: report.tail(path, self._options.lines) for name, path in files.items()}
        self.result["logs"] = lines
        if self._options.json:
            return 0
        for name, end in lines.items():
            if end or wanted:
                self._display.title(f"{name} ({files[name]})")
                for line in end or ["  (empty)"]:
                    self._display.write(line)
        if self._options.follow:
            follow_files(files, self._display.write, len(files) > 1)
        return 0


def _check_range(conf: Mapping[str, Any]) -> None:
    from clinical_orchestration.stores.feature_backfill import days_of_conf

    try:
        days_of_conf(conf)
    except ValueError as error:
        raise UserError("the range of days is not understood", str(error),
                        '--conf \'{"start_date": "2013-01-01", "end_date": "2013-12-31"}\'', 2) from None  # fmt: skip


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no date", "a day is asked for", "write it as 2013-01-31", 2) from None


def follow_files(
    files: Mapping[str, Path], write: Callable[[str], None], label: bool, keep_on: Callable[[], bool] = lambda: True
) -> None:
    """Write what is added to files, until Ctrl-C; a file that is rotated is taken up from its start."""
    places: dict[str, tuple[int, int]] = {}
    for name, path in files.items():
        with contextlib.suppress(OSError):
            stat = path.stat()
            places[name] = (stat.st_ino, stat.st_size)
    rest: dict[str, bytes] = {}
    with contextlib.suppress(KeyboardInterrupt):
        while keep_on():
            for name, path in files.items():
                try:
                    stat = path.stat()
                    inode, position = places.get(name, (stat.st_ino, 0))
                    if stat.st_ino != inode or stat.st_size < position:
                        position = 0
                    if stat.st_size > position:
                        with path.open("rb") as stream:
                            stream.seek(position)
                            block = stream.read()
                        position += len(block)
                        *complete, rest[name] = (rest.get(name, b"") + block).split(b"\n")
                        for line in complete:
                            write(f"{name}: " * label + line.decode("utf-8", errors="replace"))
                    places[name] = (stat.st_ino, position)
                except OSError:
                    continue
            time.sleep(FOLLOW_SECONDS)


def _up_to(status: StackStatus, level: int) -> dict[str, Any]:
    data = status.as_dict()
    data["services"] = [service for service in data["services"] if service["level"] <= level]
    data["wanted_level"] = data.pop("level")
    return data


def _step_line(step: Step) -> str:
    from clinical_orchestration.stack.runs import outline

    text = f"{seconds(step.seconds):>9}  {step.key}"
    if step.outcome == "retry":
        text += "  will be tried again"
    if words := outline(step):
        text += "  " + ", ".join(words)
    failed = [name for name, passed in step.checks if not passed]
    if step.checks:
        text += f"  checks {len(step.checks) - len(failed)}/{len(step.checks)}"
    if failed:
        text += f" (not passed: {', '.join(failed)})"
    return text


def _exit_status(state: RunState) -> int:
    return {"SUCCESS": 0, "CANCELED": 130}.get(state.status, 1)


def _default_trial() -> str:
    from clinical_orchestration.settings import ClientSettings

    return ClientSettings().trial


def _check_trial(name: str) -> None:
    from clinical_orchestration.trials import load_trial

    try:
        load_trial(name)
    except ValueError as error:
        raise UserError(
            f"trial {name!r} cannot be used", str(error), "name one of them, or the path of a YAML file", 2
        ) from None


def _find_room_for_jars() -> None:
    """Keep the jars with the environment where the user has no folder of caches (an account without a home)."""
    from clinical_orchestration.stack.settings import default_home, default_jars

    if os.environ.get("CLINICAL_JARS"):
        return
    folder = default_jars()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        place = Path(sys.prefix) if os.access(sys.prefix, os.W_OK) else default_home()
        os.environ["CLINICAL_JARS"] = str(place / "jars")


def main(arguments: Sequence[str] | None = None, subcommands: Subcommands | None = None) -> int:
    """Run one command line; return its exit status.

    Args:
        arguments: default: those of the process.
        subcommands: answer the command lines that they claim, before the flags are looked at.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        # some starters (cron wrappers, su) leave it ignored, and no child could then be ended politely
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    as_json = "--json" in (given[: given.index("--test")] if "--test" in given else given)
    if subcommands is not None and not subcommands.is_command(given):
        subcommands = None
    if subcommands is not None:
        as_json = subcommands.wants_json(given)
    display = Display(quiet=as_json)
    commands: Commands | None = None
    answer: dict[str, Any] = {}
    problem: UserError | None = None
    status = 0
    try:
        if subcommands is not None:
            answer, status = subcommands.run(given, display)
        else:
            options = parse(given)
            from clinical_orchestration.stack import client
            from clinical_orchestration.stack.settings import StackSettings

            _find_room_for_jars()
            commands = Commands(options, display, client, StackSettings.load)
            status = commands.execute()
    except UserError as error:
        problem, status = error, error.status
    except StackError as error:
        problem, status = UserError(str(error.args[0]), "", error.cure), 1
    except KeyboardInterrupt:
        problem, status = UserError("interrupted", "", "what was started goes on; --health-check shows it"), 130
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that the flush at exit meets no closed pipe
        return 0
    except Exception as error:
        if os.environ.get("CLINICAL_DEBUG"):
            raise
        cure = "this is a defect of the platform; CLINICAL_DEBUG=1 before the command shows where"
        problem, status = UserError("unexpected error", f"{type(error).__name__}: {error}", cure), 1
    if as_json:
        result: dict[str, Any] = {"ok": status == 0, **(commands.result if commands else answer)}
        if problem:
            result["error"] = problem.as_dict()
        sys.stdout.write(json.dumps(result, default=str, indent=1) + "\n")
    elif problem:
        display.error(problem)
    return status


if __name__ == "__main__":
    sys.exit(main())
