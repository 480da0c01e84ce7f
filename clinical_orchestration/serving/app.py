"""The HTTP side of the model server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from clinical_orchestration.serving import errors
from clinical_orchestration.serving.champions import ChampionManager
from clinical_orchestration.serving.datamodels import (
    MAX_BODY_BYTES,
    MAX_INSTANCES,
    BatchAnswer,
    BatchBody,
    ErrorAnswer,
    HealthAnswer,
    InstanceBody,
    ModelsAnswer,
    PredictionAnswer,
)
from clinical_orchestration.serving.engine import Engine, Instance
from clinical_orchestration.serving.errors import Problem
from clinical_orchestration.serving.metrics import ServingMetrics, StateCollector
from clinical_orchestration.serving.ports import ChampionSource, FeatureReader, PredictionSink
from clinical_orchestration.serving.prediction_log import PredictionLog
from clinical_orchestration.trials import TrialProfile

_logger = logging.getLogger(__name__)

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_DESCRIPTION = f"""
Risk of an adverse event, from each trial's champion model.

- `POST /predict` with `patient_id` uses the newest features of the patient; with `features`, the values you send.
- Several at once: `{{"instances": [...]}}`, up to {MAX_INSTANCES:,}. Each is answered or refused by itself: a batch is
  200 with an error in the place of each refused instance, and 503 only where every instance failed for a reason that
  passes by itself (no model, a store out).
- **Read `stale`.** Age is measured against the clock. In a finished study all features are years old: the
  probability then holds for the feature time, and the answer says so.
- Every prediction is logged to the table `gold/predictions`.
- Every error is JSON with `error`, `detail` and `what_to_do`.
"""

_EXAMPLES = {
    "patient": {"summary": "A patient's online features", "value": {"patient_id": "01-701-1015"}},
    "features": {
        "summary": "Features of your own",
        "value": {
            "features": {"heart_rate_mean_7d": 71.5, "systolic_bp_latest": 132.0, "age_years": None},
            "trial": "cdisc-pilot",
            "feature_time": "2014-01-02T23:59:59Z",
        },
    },
    "batch": {
        "summary": "Several",
        "value": {"instances": [{"patient_id": "01-701-1015"}, {"patient_id": "01-701-1023"}]},
    },
}


class _RefusedError(Exception):
    """A request that ends with a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.error)
        self.problem = problem


def create_app(
    *,
    champions: Callable[[], ChampionSource],
    features: Callable[[], FeatureReader],
    predictions: Callable[[], PredictionSink],
    profiles: Sequence[TrialProfile],
    default_trial: str,
    spool_folder: Path,
    poll_seconds: float = 2.0,
    flush_seconds: float = 1.0,
    shutdown_seconds: float = 10.0,
    max_spool_bytes: int = 2 * 2**30,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> FastAPI:
    """Build the model server. Nothing is contacted before the application starts, and then in the background.

    Args:
        champions: makes the registry client; called in a background thread.
        features: makes the online store client; called in a background thread.
        predictions: makes the writer of ``gold/predictions``; called in a background thread.
        profiles: the trials whose champions are served.
        default_trial: name of the trial for requests that name none.
        spool_folder: local folder of the prediction log.
        poll_seconds: how often the registry is asked for new champions.
        flush_seconds: how often predictions are moved from the spool to the table.
        shutdown_seconds: longest wait for that at the end; the rest stays in the spool.
        max_spool_bytes: most bytes in the spool.
        clock: the present, aware; ages are measured against it.

    Raises:
        ValueError: `default_trial` is not among `profiles`.
    """
    by_name = {profile.name: profile for profile in profiles}
    if default_trial not in by_name:
        raise ValueError(f"the default trial {default_trial!r} is not among {', '.join(by_name)}")
    metrics = ServingMetrics()
    metrics.declare(by_name)
    manager = ChampionManager(champions, profiles, poll_seconds=poll_seconds, on_load_failure=metrics.load_failed)
    log = PredictionLog(spool_folder, predictions, flush_seconds=flush_seconds, max_spool_bytes=max_spool_bytes)
    engine = Engine(manager, features, by_name, default_trial, log, metrics, clock=clock)
    metrics.registry.register(StateCollector(manager, engine, log))
    started_at = datetime.now(UTC)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        log.start()
        engine.start()
        manager.start()
        yield
        await asyncio.to_thread(manager.close)
        await asyncio.to_thread(engine.close)
        await asyncio.to_thread(log.close, shutdown_seconds)

    app = FastAPI(
        title="Clinical model serving",
        version="1",
        description=_DESCRIPTION,
        lifespan=lifespan,
        swagger_ui_parameters={"tryItOutEnabled": True},
    )
    app.state.manager, app.state.engine, app.state.log = manager, engine, log
    error_docs: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorAnswer, "description": text}
        for code, text in (
            (413, "The body is too large."),
            (422, "The request is not as documented."),
            (500, "The model failed on this input."),
            (503, "No model yet, or Redis or MLflow is out; `what_to_do` says what to start."),
        )
    }

    async def run(instances: Sequence[Instance]) -> None:
        """Hand instances to the engine and wait for their results."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def finish() -> None:
            if not ready.done():  # it is, when the caller hung up
                ready.set_result(None)

        def tell() -> None:
            with suppress(RuntimeError):  # the server is ending and nobody waits any more
                loop.call_soon_threadsafe(finish)

        if problem := engine.submit(instances, tell):
            raise _RefusedError(problem)
        await ready

    def checked(body: object) -> Instance:
        """Return the instance that a JSON value describes.

        Raises:
            _RefusedError: it describes none.
        """
        try:
            given = InstanceBody.model_validate(body)
        except ValidationError as error:
            raise _RefusedError(errors.invalid(_explain(error))) from None
        if given.trial is not None and given.trial not in by_name:
            raise _RefusedError(errors.unknown_trial(sorted(by_name)))
        return Instance(given.patient_id, given.features, given.trial, given.feature_time)

    async def predict_one(body: object) -> Response:
        instance = checked(body)
        await run([instance])
        if isinstance(instance.result, dict):
            return _json(instance.result)
        raise _RefusedError(instance.result or errors.model_failed())

    async def predict_many(body: dict[str, Any]) -> Response:
        given = body["instances"]
        if body.keys() != {"instances"}:
            raise _RefusedError(errors.invalid("a batch has the field `instances` and no other"))
        if not isinstance(given, list) or not 1 <= len(given) <= MAX_INSTANCES:
            raise _RefusedError(errors.invalid(f"`instances` must be a list of 1 to {MAX_INSTANCES:,} instances"))
        outcomes: list[Instance | Problem] = []
        for number, item in enumerate(given):
            try:
                outcomes.append(checked(item))
            except _RefusedError as error:
                metrics.refused(error.problem.error)
                outcomes.append(error.problem)
            if number % 100 == 99:
                await asyncio.sleep(0)  # others get their turn while a large batch is being read
        await run([outcome for outcome in outcomes if isinstance(outcome, Instance)])
        results = [outcome.result if isinstance(outcome, Instance) else outcome for outcome in outcomes]
        problems = [result if result is not None else errors.model_failed() for result in results]
        failed = [problem for problem in problems if isinstance(problem, Problem)]
        if len(failed) == len(problems) and all(problem.status == 503 for problem in failed):
            raise _RefusedError(failed[0])
        return _json(
            {
                "predictions": [
                    {**result.body(), "status": result.status} if isinstance(result, Problem) else result
                    for result in problems
                ],
                "succeeded": len(problems) - len(failed),
                "failed": len(failed),
            }
        )

    @app.post(
        "/predict",
        tags=["predictions"],
        summary="Predict for a patient, for given features, or for several of these",
        responses={
            200: {"model": PredictionAnswer | BatchAnswer, "description": "The prediction; for a batch, all of them."},
            404: {"model": ErrorAnswer, "description": "The patient has no online features."},
            **error_docs,
        },
        openapi_extra=_request_body(["InstanceBody", "BatchBody"], ["patient", "features", "batch"]),
    )
    async def predict(request: Request) -> Response:
        body = await _body(request)
        return await predict_many(body) if "instances" in body else await predict_one(body)

    @app.post(
        "/predict/batch",
        tags=["predictions"],
        summary=f"Predict for up to {MAX_INSTANCES:,} instances",
        responses={200: {"model": BatchAnswer}, **error_docs},
        openapi_extra=_request_body(["BatchBody"], ["batch"]),
    )
    async def predict_batch(request: Request) -> Response:
        body = await _body(request)
        if "instances" not in body:
            raise _RefusedError(errors.invalid("the field `instances` is missing"))
        return await predict_many(body)

    @app.get("/health", tags=["operation"], summary="State of the server", responses={200: {"model": HealthAnswer}})
    async def health() -> Response:
        return _json(_health(manager, engine, log, default_trial, started_at))

    @app.get("/metrics", tags=["operation"], summary="Prometheus metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/models", tags=["operation"], summary="Champions that serve", responses={200: {"model": ModelsAnswer}})
    async def models() -> Response:
        served = [state.served for state in manager.states().values() if state.served is not None]
        return _json(
            {
                "models": [
                    {
                        "trial": model.trial,
                        "model_name": model.champion.model_name,
                        "model_version": model.version,
                        "loaded_at": model.loaded_at,
                        "target": by_name[model.trial].target.name,
                        "horizon_seconds": by_name[model.trial].target.horizon.total_seconds(),
                        "risk_bands": by_name[model.trial].risk_bands.model_dump(),
                        "feature_names": list(model.model.feature_names),
                    }
                    for model in served
                ],
                "default_trial": default_trial,
            }
        )

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _json(
            {
                "service": "Clinical model serving",
                "predict": "POST /predict",
                "docs": "/docs",
                "openapi": "/openapi.json",
                "health": "/health",
                "models": "/models",
                "metrics": "/metrics",
            }
        )

    @app.exception_handler(_RefusedError)
    async def refused(_: Request, error: _RefusedError) -> Response:
        return _problem(error.problem)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        what = f"{request.method} {request.url.path[:100]}: {error.detail}"
        answer = _problem(Problem(error.status_code, code, what, "See /docs for what this server answers."))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _problem(errors.invalid("the request is not as documented"))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return _problem(
            Problem(500, "internal_error", "The server failed to answer.", "Try again; its log has the cause.")
        )

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = FastAPI.openapi(app)
            _, bodies = models_json_schema(
                [(InstanceBody, "validation"), (BatchBody, "validation")], ref_template="#/components/schemas/{model}"
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this as the way to extend the schema
    app.add_middleware(_Measure, metrics=metrics)
    return app


class _Measure:
    """Counts and times requests by endpoint, never by raw path."""

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]], metrics: ServingMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = "500"

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            endpoint = scope["path"] if scope["path"] in _ENDPOINTS else "other"
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.latency.labels(endpoint).observe(time.perf_counter() - started)


_ENDPOINTS = frozenset({"/", "/predict", "/predict/batch", "/health", "/metrics", "/models", "/docs", "/openapi.json"})


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _problem(problem: Problem) -> Response:
    answer = _json(problem.body(), problem.status)
    if problem.status == 503:
        answer.headers["Retry-After"] = "2"
    return answer


async def _body(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request.

    Raises:
        _RefusedError: it is too large, or none.
    """
    too_large = Problem(
        413, "too_large", f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB.", "Send smaller batches."
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _RefusedError(too_large)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise _RefusedError(too_large)
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _RefusedError(
            errors.invalid(
                f"the body is no JSON (line {error.lineno}, column {error.colno}); NaN and Infinity are not JSON"
            )
        ) from None
    if not isinstance(body, dict):
        raise _RefusedError(errors.invalid("the body must be a JSON object"))
    return body


def _explain(error: ValidationError) -> str:
    """Say what is wrong and where, without repeating values, which may belong to a patient."""
    found = []
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:5]:
        place = ".".join(str(part)[:60] for part in item["loc"] if part != "[key]")
        found.append(f"{place}: {item['msg']}" if place else item["msg"].removeprefix("Value error, "))
    more = error.error_count() - len(found)
    return "; ".join(found) + (f"; and {more} more" if more > 0 else "")


def _request_body(names: Sequence[str], examples: Sequence[str]) -> dict[str, Any]:
    """Return the OpenAPI part of a body that the handler reads itself."""
    schemas = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas},
                    "examples": {name: _EXAMPLES[name] for name in examples},
                }
            },
        }
    }


def _health(
    manager: ChampionManager, engine: Engine, log: PredictionLog, default_trial: str, started_at: datetime
) -> Mapping[str, object]:
    """Return the body of /health.

    Trials without a champion are no problem by themselves, except the default one: not every deployment runs every
    trial.
    """
    problems: list[str] = []
    models: dict[str, dict[str, object]] = {}
    for trial, state in manager.states().items():
        served = state.served
        if state.failed_version is not None:
            kind = "failing"
            problems.append(f"trial {trial}: version {state.failed_version} cannot be loaded: {state.error}")
        elif served is not None:
            kind = "serving"
        else:
            kind = "no_model" if manager.polled and manager.registry_error is None else "loading"
        models[trial] = {
            "state": kind,
            "model_name": state.model_name,
            "model_version": served.version if served else None,
            "loaded_at": served.loaded_at if served else None,
            "error": state.error,
        }
    if manager.registry_error is not None:
        problems.append(f"model registry: {manager.registry_error}")
    if engine.online.up is False:
        problems.append(f"online feature store: {engine.online.error}")
    log_state = log.state()
    if log_state.last_error is not None:
        problems.append(f"prediction log: {log_state.last_error}")
    if log_state.dropped:
        problems.append(f"prediction log: {log_state.dropped} predictions could not be kept")
    has_model = any(model["model_version"] is not None for model in models.values())
    if models[default_trial]["model_version"] is None and has_model:
        problems.append(f"the default trial {default_trial} has no model")
    return {
        "status": "no_model" if not has_model else "degraded" if problems else "healthy",
        "problems": problems,
        "models": models,
        "default_trial": default_trial,
        "registry": {
            "state": "out" if manager.registry_error else "up" if manager.polled else "connecting",
            "error": manager.registry_error,
        },
        "online_store": {
            "state": {True: "up", False: "out", None: "connecting"}[engine.online.up],
            "error": engine.online.error,
        },
        "prediction_log": {
            "backlog": log_state.backlog,
            "in_memory": log_state.in_memory,
            "written": log_state.written,
            "dropped": log_state.dropped,
            "write_failures": log_state.write_failures,
            "spool_failures": log_state.spool_failures,
            "spool_bytes": log_state.spool_bytes,
            "error": log_state.last_error,
        },
        "started_at": started_at,
    }
