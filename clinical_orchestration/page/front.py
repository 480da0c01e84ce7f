"""The front page: reads everything that it shows, each part with a time limit of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from clinical_orchestration.airflow.control import RefusedError
from clinical_orchestration.page import measures
from clinical_orchestration.page.alerts import read_alerts
from clinical_orchestration.page.bounded import Background, Bounded
from clinical_orchestration.page.dagster_ui import PREFIX, DagsterUi
from clinical_orchestration.page.models import RetrainingView, read_models, read_retraining, why_unread
from clinical_orchestration.page.pipelines import PipelinesView, read_pipelines
from clinical_orchestration.page.stack_state import read_stack_state

if TYPE_CHECKING:
    from clinical_orchestration.airflow.control import Control
    from clinical_orchestration.page.health import HealthMonitor
    from clinical_orchestration.page.settings import PageSettings
    from clinical_orchestration.stores.alerts import AlertsView

LEVELS = (
    "infrastructure", "data ingestion", "data processing", "feature engineering", "ML pipeline", "orchestration",
)  # fmt: skip
PIPELINES_LIMIT_SECONDS = 4.0
MODELS_LIMIT_SECONDS = 4.0
MEASURES_LIMIT_SECONDS = 4.0
ALERTS_LIMIT_SECONDS = 2.5
NO_DATABASE = "The pipelines need the platform's database: POSTGRES_URL is not set."
NOT_OPEN = "The Dagster workspace is not open yet; this needs the database."
UNREAD = "The pipelines cannot be read now; the database or the code server does not answer."

_T = TypeVar("_T")
_logger = logging.getLogger("clinical_orchestration.page")


class FrontPage:
    """What the front page shows, read again at most about once a second however many look at it.

    Args:
        settings: addresses of what is asked.
        ui: holds the instance.
        control: Airflow's view of the instance; None without a database.
        monitor: health of the orchestration.
    """

    def __init__(
        self, settings: PageSettings, ui: DagsterUi, control: Control | None, monitor: HealthMonitor
    ) -> None:  # fmt: skip
        self._settings = settings
        self._control = control
        self._monitor = monitor
        url = settings.postgres_url.get_secret_value()

        def pipelines() -> PipelinesView:
            if control is None:
                raise RefusedError(NO_DATABASE)
            return read_pipelines(control, PREFIX)

        def retraining() -> dict[str, RetrainingView]:
            return {} if ui.instance is None else read_retraining(ui.instance)

        def series() -> tuple[measures.Measures, ...]:
            return () if ui.instance is None else measures.read_measures(ui.instance)

        self._pipelines = Bounded(pipelines, PIPELINES_LIMIT_SECONDS, fresh_seconds=1.0)
        self._alerts = Bounded(lambda: read_alerts(url), ALERTS_LIMIT_SECONDS, fresh_seconds=1.0)
        # these change seldom and are asked of others: nobody waits for them but who comes first
        self._models = Background(lambda: read_models(settings.mlflow_url), MODELS_LIMIT_SECONDS, fresh_seconds=5.0)
        self._retraining = Background(retraining, MEASURES_LIMIT_SECONDS, fresh_seconds=5.0)
        self._measures = Background(series, MEASURES_LIMIT_SECONDS, fresh_seconds=15.0)

    async def alerts(self) -> AlertsView | None:
        """Return the alerts, or None where they cannot be read: that is not the same as none."""
        return await _or_else(self._alerts, "alerts", lambda _: None)

    async def values(self, *, anew: bool = False) -> dict[str, Any]:
        """Return what the template needs.

        Args:
            anew: read the pipelines again, however new the last answer is; for after a change.
        """
        health, (view, note), alerts, (models, models_note), decisions, series = await asyncio.gather(
            self._monitor.check(),
            self._pipelines_now(anew),
            self.alerts(),
            self._models_now(),
            _or_else(self._retraining, "retraining decisions", lambda _: {}),
            _or_else(self._measures, "series of quality and performance", lambda _: None),
        )
        state = read_stack_state(self._settings.status_file)
        services = sorted(state.services, key=lambda service: service.level) if state else []
        pipelines = view.pipelines if view else ()
        return {
            "pipelines": pipelines,
            "problems": view.problems if view else (),
            "pipelines_note": note,
            "alerts": alerts,
            "models": models,
            "models_note": models_note,
            "retraining": decisions,
            "measures": series,
            "health": health.as_airflow(),
            "levels": [
                (f"{level} {LEVELS[level] if 0 <= level < len(LEVELS) else ''}".strip(), list(members))
                for level, members in groupby(services, key=lambda service: service.level)
            ],
            "unhealthy": [service for service in services if service.shown_state == "unhealthy"],
            "stale": bool(state and state.stale),
            "age_seconds": state.age_seconds if state else 0.0,
            "mlflow_url": self._settings.mlflow_url,
            "serving_url": self._settings.serving_url.rstrip("/"),
        }

    async def _pipelines_now(self, anew: bool) -> tuple[PipelinesView | None, str]:
        """Return the pipelines, or None, and what to say where there are none."""
        try:
            return await (self._pipelines.anew() if anew else self._pipelines()), "No pipeline is loaded."
        except RefusedError as error:
            return None, NO_DATABASE if str(error) == NO_DATABASE else NOT_OPEN
        except Exception as error:
            _logger.warning("the pipelines cannot be read: %s", type(error).__name__)
            return None, UNREAD

    async def _models_now(self) -> tuple[Any, str]:
        """Return the models, or None and why they cannot be told: that is not the same as none."""
        try:
            return await self._models(), ""
        except Exception as error:
            _logger.warning("the models cannot be read: %s", type(error).__name__)
            return None, why_unread(error)


async def _or_else(ask: Callable[[], Awaitable[_T]], what: str, otherwise: Callable[[Exception], _T]) -> _T:
    """Return an answer, or what stands for none; the log says why."""
    try:
        return await ask()
    except Exception as error:
        _logger.warning("the %s cannot be read: %s", what, type(error).__name__)
        return otherwise(error)
