"""Launch a job on the running stack and follow it, through the Dagster GraphQL endpoint of the page.

The endpoint knows the loaded workspace already, so that a launch costs a request (about 50 ms) where an own Dagster
process would first import Dagster and load the code location (3 s). The run itself goes the usual way: queue, daemon,
launcher; it does not depend on the command that follows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clinical_orchestration.stack.console import UserError

if TYPE_CHECKING:
    import httpx

POLL_SECONDS = 0.4
PATIENCE_SECONDS = 45.0  # how long the page may be away (a restart) while a run is followed
EVENTS_A_PAGE = 500
FINISHED = ("SUCCESS", "FAILURE", "CANCELED")

_JOBS = """
query Jobs { workspaceOrError { __typename
  ... on PythonError { message }
  ... on Workspace { locationEntries { name loadStatus locationOrLoadError { __typename
    ... on PythonError { message className }
    ... on RepositoryLocation { repositories { name jobs { name } } } } } } } }
"""

_LAUNCH = """
mutation Launch($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on PythonError { message className }
  ... on RunConfigValidationInvalid { errors { message } }
  ... on Error { message } } }
"""

_EVENTS = """
query Events($run: ID!, $cursor: String, $limit: Int!) {
  runOrError(runId: $run) { __typename ... on Run { status jobName startTime endTime creationTime } }
  logsForRun(runId: $run, afterCursor: $cursor, limit: $limit) { __typename
    ... on PythonError { message }
    ... on EventConnection { cursor hasMore events { __typename
      ... on MessageEvent { message timestamp stepKey eventType level }
      ... on ExecutionStepFailureEvent { error { ...why } }
      ... on ExecutionStepUpForRetryEvent { error { ...why } secondsToWait }
      ... on RunFailureEvent { error { ...why } }
      ... on MaterializationEvent { assetKey { path } metadataEntries { ...what } }
      ... on AssetCheckEvaluationEvent { evaluation { checkName success severity assetKey { path } } } } } } }
fragment why on PythonError { message className causes { message className } }
fragment what on MetadataEntry { __typename label
  ... on IntMetadataEntry { intRepr } ... on FloatMetadataEntry { floatRepr } ... on TextMetadataEntry { text }
  ... on BoolMetadataEntry { boolValue } }
"""

_ASSETS = """
query Assets($job: PipelineSelector!) { assetNodes(pipeline: $job) { assetKey { path } opNames } }
"""

_TERMINATE = """
mutation Terminate($run: String!) { terminateRun(runId: $run) { __typename
  ... on TerminateRunFailure { message } ... on PythonError { message } ... on Error { message } } }
"""


@dataclass(frozen=True)
class Job:
    """A job as the GraphQL endpoint selects it."""

    name: str
    repository: str
    location: str


@dataclass
class Step:
    """One step of a run; times are seconds since the epoch."""

    key: str
    started: float
    finished: float | None = None
    outcome: str = "running"  # running, success, failure, skipped, retry
    attempts: int = 1
    assets: dict[str, dict[str, str]] = field(default_factory=dict)  # asset -> label -> short value
    checks: list[tuple[str, bool]] = field(default_factory=list)
    why: str = ""

    @property
    def seconds(self) -> float:
        """Duration so far."""
        return (self.finished or time.time()) - self.started

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "step": self.key,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 3),
            "attempts": self.attempts,
            "assets": self.assets,
            "checks": dict(self.checks),
            **({"why": self.why} if self.why else {}),
        }


@dataclass
class RunState:
    """A run as far as it is known."""

    run_id: str
    job: str
    status: str = "NOT_STARTED"
    created: float | None = None
    started: float | None = None
    ended: float | None = None
    steps: dict[str, Step] = field(default_factory=dict)
    why: str = ""

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in FINISHED

    @property
    def seconds(self) -> float | None:
        """Duration so far, None before the start."""
        return None if self.started is None else (self.ended or time.time()) - self.started

    @property
    def running(self) -> list[Step]:
        """Steps at work now."""
        return [step for step in self.steps.values() if step.outcome == "running"]

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "run_id": self.run_id,
            "job": self.job,
            "status": self.status,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "steps": [step.as_dict() for step in self.steps.values()],
            **({"why": self.why} if self.why else {}),
        }


class GraphqlError(Exception):
    """The endpoint answered with an error."""


class Runs:
    """Client of the page's GraphQL endpoint.

    Args:
        page_url: such as ``http://127.0.0.1:8085``.
        client: an ``httpx`` client, for tests.
        sleep: waits, for tests.
        token: the stack's own, by which the page knows it; where the environment names a user, it is that user who
            asks instead.
    """

    def __init__(
        self,
        page_url: str,
        client: httpx.Client | None = None,
        sleep: Callable[[float], None] = time.sleep,
        token: str = "",
    ) -> None:
        import httpx

        from clinical_orchestration.users.cli_identity import named_user

        self._page_url = page_url.rstrip("/")
        user = named_user()
        # loopback: a proxy of the environment must not see these requests
        self._client = client or httpx.Client(
            timeout=30.0,
            trust_env=False,
            auth=user,
            headers={} if user else {"Authorization": f"Bearer {token}"},
        )
        self._sleep = sleep

    def run_url(self, run_id: str) -> str:
        """Return the run's place in the Dagster UI."""
        return f"{self._page_url}/dagster/runs/{run_id}"

    def _ask(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request.

        Raises:
            httpx.HTTPError: the page does not answer, or not yet.
            GraphqlError: it does not understand.
        """
        answer = self._client.post(
            f"{self._page_url}/dagster/graphql", json={"query": query, "variables": dict(variables)}
        )
        if answer.status_code >= 500:
            answer.raise_for_status()
        if answer.status_code in (401, 403):
            raise UserError(
                "the page does not let this command in", f"HTTP {answer.status_code}: {answer.text[:300]}",
                "set CLINICAL_USER and CLINICAL_PASSWORD to a user who may, or unset both; after a change of "
                "secrets.json start the page again",
            )  # fmt: skip
        body: dict[str, Any] = answer.json()
        if body.get("errors"):
            raise GraphqlError("; ".join(str(error.get("message", error)) for error in body["errors"]))
        data: dict[str, Any] = body["data"]
        return data

    def _ask_patiently(self, query: str, variables: Mapping[str, Any], patience: float) -> dict[str, Any]:
        """Send a request, again and again while the page is away, for `patience` seconds."""
        import httpx

        deadline = time.monotonic() + patience
        while True:
            try:
                return self._ask(query, variables)
            except httpx.HTTPError as error:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"the page at {self._page_url} does not answer",
                        f"{type(error).__name__}: {str(error)[:200]}",
                        "./pipeline-manager.sh --start, then --health-check; a run that was started goes on without it",
                    ) from error
                self._sleep(1.0)

    def find_job(self, name: str, patience: float = PATIENCE_SECONDS) -> Job:
        """Return a job of the loaded code locations; waits while they are still loading.

        Raises:
            UserError: there is no such job (the message lists those there are), or the code does not load.
        """
        deadline = time.monotonic() + patience
        while True:
            answer = self._ask_patiently(_JOBS, {}, max(0.0, deadline - time.monotonic()))["workspaceOrError"]
            if answer["__typename"] != "Workspace":
                raise UserError("the workspace cannot be read", answer.get("message", ""), "see --logs page")
            jobs: list[Job] = []
            broken: list[tuple[str, str, str]] = []
            waiting = False
            for entry in answer["locationEntries"]:
                loaded = entry["locationOrLoadError"]
                if loaded is None or entry["loadStatus"] == "LOADING":
                    waiting = True
                elif loaded["__typename"] == "PythonError":
                    waiting = waiting or loaded.get("className") == "DagsterUserCodeUnreachableError"
                    broken.append((entry["name"], loaded.get("className") or "", loaded["message"]))
                else:
                    jobs += [
                        Job(job["name"], repository["name"], entry["name"])
                        for repository in loaded["repositories"]
                        for job in repository["jobs"]
                    ]
            for job in jobs:
                if job.name == name:
                    return job
            if waiting and time.monotonic() < deadline:
                self._sleep(0.5)
                continue
            if broken:
                location, kind, message = broken[0]
                raise UserError(
                    f"the code location {location} is not loaded, so that job {name} cannot be found",
                    f"{kind}: {message.strip()[:600]}",
                    "see --logs code_server and --logs page; --restart-rebuild --level 5 loads the code again",
                )
            known = ", ".join(sorted(job.name for job in jobs if not job.name.startswith("__"))) or "none"
            raise UserError(f"there is no job {name!r}", f"the loaded jobs are: {known}", "name one of them", status=2)

    def assets(self, job: Job, tasks: Sequence[str]) -> list[list[str]]:
        """Return the keys of the assets that these tasks of a job make.

        Raises:
            UserError: a task makes none, or is not in the job.
        """
        selector = {
            "repositoryLocationName": job.location, "repositoryName": job.repository, "pipelineName": job.name,
        }  # fmt: skip
        nodes = self._ask_patiently(_ASSETS, {"job": selector}, PATIENCE_SECONDS)["assetNodes"]
        missing = set(tasks) - {name for node in nodes for name in node["opNames"]}
        if missing:
            raise UserError(
                f"{job.name} has no task {', '.join(sorted(missing))}", "the loaded code is older or newer than this",
                "--restart-rebuild --level 5 loads the code again",
            )  # fmt: skip
        return [list(node["assetKey"]["path"]) for node in nodes if set(node["opNames"]) & set(tasks)]

    def launch(
        self,
        job: Job,
        run_config: Mapping[str, Any],
        tags: Mapping[str, str],
        assets: Sequence[Sequence[str]] | None = None,
    ) -> str:
        """Put a run into the queue and return its id; `assets` are the keys of those to make (None: all of the job).

        Raises:
            UserError: Dagster refuses the configuration or the run.
        """
        selection = {} if assets is None else {"assetSelection": [{"path": list(path)} for path in assets]}
        params = {
            "selector": {
                "repositoryLocationName": job.location,
                "repositoryName": job.repository,
                "jobName": job.name,
                **selection,
            },
            "runConfigData": dict(run_config),
            "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
        }
        # asked once only: after a broken connection nobody knows whether the run was started
        import httpx

        try:
            answer = self._ask(_LAUNCH, {"params": params})["launchRun"]
        except (httpx.HTTPError, GraphqlError) as error:
            raise UserError(
                f"{job.name} could not be started",
                f"{type(error).__name__}: {str(error)[:300]}",
                f"look at {self._page_url}/dagster/runs whether it was, then repeat",
            ) from error
        if answer["__typename"] == "LaunchRunSuccess":
            return str(answer["run"]["runId"])
        problems = [error["message"] for error in answer.get("errors", [])] or [answer.get("message", "")]
        raise UserError(
            f"{job.name} could not be started ({answer['__typename']})",
            "\n".join(problem.strip()[:600] for problem in problems),
            "correct --conf, --trial or --source; --help shows their form",
        )

    def terminate(self, run_id: str) -> None:
        """Ask Dagster to end a run.

        Raises:
            UserError: it cannot.
        """
        answer = self._ask_patiently(_TERMINATE, {"run": run_id}, PATIENCE_SECONDS)["terminateRun"]
        if answer["__typename"] != "TerminateRunSuccess":
            raise UserError("the run could not be cancelled", answer.get("message", ""), self.run_url(run_id))

    def follow(self, run_id: str, job: str = "") -> Iterator[RunState]:
        """Yield the run each time its log was read, and end when it is finished and all of its log is known.

        Raises:
            UserError: the page stays away, or there is no such run.
        """
        state = RunState(run_id, job)
        cursor: str | None = None
        while True:
            variables = {"run": run_id, "cursor": cursor, "limit": EVENTS_A_PAGE}
            answer = self._ask_patiently(_EVENTS, variables, PATIENCE_SECONDS)
            run, log = answer["runOrError"], answer["logsForRun"]
            if run["__typename"] != "Run" or log["__typename"] != "EventConnection":
                raise UserError(
                    f"there is no run {run_id}", log.get("message", ""), f"see {self._page_url}/dagster/runs"
                )
            for event in log["events"]:
                take_event(state, event)
            cursor = log["cursor"]
            state.job = run["jobName"]
            state.status = run["status"]
            state.created, state.started, state.ended = run["creationTime"], run["startTime"], run["endTime"]
            if state.finished and not log["hasMore"]:
                for step in state.running:  # ended with the run
                    step.finished, step.outcome = state.ended or time.time(), "stopped"
                yield state
                return
            yield state
            if not log["hasMore"]:
                self._sleep(POLL_SECONDS)


def take_event(state: RunState, event: Mapping[str, Any]) -> None:
    """Bring a run's state up to date with one event of its log."""
    kind = event["__typename"]
    key = event.get("stepKey")
    at = float(event["timestamp"]) / 1000 if event.get("timestamp") else time.time()
    if kind == "RunFailureEvent":
        state.why = state.why or _reason(event.get("error")) or str(event.get("message", ""))
        return
    if not key:
        return
    step = state.steps.get(key)
    if kind in ("ExecutionStepStartEvent", "ExecutionStepRestartEvent") or step is None:
        if step is not None:
            step.attempts += 1
            step.outcome, step.finished = "running", None
        elif kind in ("ExecutionStepStartEvent", "ExecutionStepSkippedEvent", "ExecutionStepFailureEvent"):
            step = state.steps[key] = Step(key, at)
        if step is None or kind.endswith(("StartEvent", "RestartEvent")):
            return
    if kind == "ExecutionStepSuccessEvent":
        step.finished, step.outcome = at, "success"
    elif kind == "ExecutionStepSkippedEvent":
        step.finished, step.outcome = at, "skipped"
    elif kind in ("ExecutionStepFailureEvent", "ExecutionStepUpForRetryEvent"):
        step.finished = at
        step.outcome = "failure" if kind == "ExecutionStepFailureEvent" else "retry"
        step.why = _reason(event.get("error")) or str(event.get("message", ""))
    elif kind == "MaterializationEvent":
        facts = step.assets.setdefault("/".join((event.get("assetKey") or {}).get("path", ())), {})
        for entry in event.get("metadataEntries", ()):
            if (fact := _fact(entry)) is not None:
                facts[entry["label"]] = fact
    elif kind == "AssetCheckEvaluationEvent":
        step.checks.append((event["evaluation"]["checkName"], bool(event["evaluation"]["success"])))


def outline(step: Step, most: int = 6) -> list[str]:
    """Return what a step produced, in a few words: counts first.

    Of several assets the rows of each are shown and the sums of what was done with the records.
    """
    if len(step.assets) == 1:
        facts = next(iter(step.assets.values()))
        counted = [name for name in facts if _is_number(facts[name]) and name != "delta_version"]
        others = [name for name in facts if name not in counted and name not in ("trial", "delta_version")]
        return [f"{name.removeprefix('dagster/')} {facts[name]}" for name in [*counted, *others][:most]]
    parts = [
        f"{name.rpartition('/')[2]} {facts['dagster/row_count']}"
        for name, facts in step.assets.items()
        if "dagster/row_count" in facts
    ]
    sums: dict[str, int] = {}
    for facts in step.assets.values():
        for name, value in facts.items():
            if name.startswith(("records_", "appended")) and value.isdigit():
                sums[name] = sums.get(name, 0) + int(value)
    return [*parts[:most], *(f"{name} {value}" for name, value in list(sums.items())[:most])]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).isdigit()


def _reason(error: Mapping[str, Any] | None) -> str:
    """Return the innermost cause: the outer ones only say that a step failed."""
    if not error:
        return ""
    chain = [error, *(error.get("causes") or ())]
    return str(chain[-1].get("message", "")).strip()


def _fact(entry: Mapping[str, Any]) -> str | None:
    """Return a short metadata value as text, None for what does not fit on a line."""
    for name in ("intRepr", "floatRepr", "text", "boolValue"):
        value = entry.get(name)
        if value is None:
            continue
        text = f"{float(value):.4g}" if name == "floatRepr" else str(value)
        return text if len(text) <= 40 and "\n" not in text else None
    return None


def run_config(trial: str | None, source: str | None, conf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run configuration that gives a run its trial, its source and its free-form `conf`.

    What is not given is left out, so that the deployment's defaults hold, as when the run is started elsewhere.
    """
    given = {"trial": trial, "source": source, "conf": dict(conf)}
    config = {name: value for name, value in given.items() if value}
    return {"resources": {"pipeline": {"config": config}}} if config else {}
