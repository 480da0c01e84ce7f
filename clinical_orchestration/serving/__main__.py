"""Run the model server: ``python -m clinical_orchestration.serving --host 127.0.0.1 --port 8000``.

Everything else comes from the environment, see :class:`clinical_orchestration.settings.ClientSettings`; the prediction
log's spool is in ``$CLINICAL_HOME/serving/predictions``. The port answers at once, models load in the background.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

_ENVIRONMENT = {
    # one row at a time: threads inside a model call cost more than they bring
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # a registry that is out is noticed in seconds, not minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


def spool_folder() -> Path:
    """Return the folder of the prediction log's spool."""
    home = os.environ.get("CLINICAL_HOME")
    root = Path(home) if home else Path(__file__).resolve().parents[2] / ".clinical"
    return root / "serving" / "predictions"


def build() -> FastAPI:
    """Build the server from the environment."""
    from clinical_orchestration.serving.app import create_app
    from clinical_orchestration.serving.ports import ChampionSource, FeatureReader, PredictionSink
    from clinical_orchestration.settings import ClientSettings, Variables
    from clinical_orchestration.trials import available_trials, configured_trial

    settings, variables = ClientSettings(), Variables()

    def champions() -> ChampionSource:
        from clinical_orchestration.serving.registry import RegistryChampions

        return RegistryChampions.from_settings(settings)

    def features() -> FeatureReader:
        from clinical_orchestration.serving.online import RedisFeatureReader

        return RedisFeatureReader(
            settings.redis_url.get_secret_value(), variables.feature_store_redis_prefix, timeout_seconds=1.0
        )

    def predictions() -> PredictionSink:
        from clinical_orchestration.stores.predictions import PredictionTable
        from clinical_orchestration.stores.tables import DeltaTableStore

        return PredictionTable(DeltaTableStore.from_settings(settings))

    default = configured_trial(settings.trial, variables)
    profiles = {name: configured_trial(name, variables) for name in available_trials()}
    profiles[default.name] = default  # it may be a file of its own
    return create_app(
        champions=champions,
        features=features,
        predictions=predictions,
        profiles=list(profiles.values()),
        default_trial=default.name,
        spool_folder=spool_folder(),
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and serve until a signal ends it."""
    parser = argparse.ArgumentParser(prog="python -m clinical_orchestration.serving", description="The model server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    chosen = parser.parse_args(arguments)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    import logging

    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Threads share one interpreter lock; the default of 5 ms would be added to an answer each time it changes hands
    sys.setswitchinterval(0.0005)
    uvicorn.run(
        build(),
        host=chosen.host,
        port=chosen.port,
        access_log=False,  # requests are counted in /metrics
        log_config=None,
        timeout_graceful_shutdown=10,
    )


if __name__ == "__main__":
    main()
