"""MLflow's tracking server in one process: ``python -m clinical_orchestration.stack.mlflow_server``.

The ``mlflow server`` command imports MLflow, prepares the database and then starts a second process that imports it
all again; with a single worker that costs 300 MB of memory and half of the start. This runs the same application, with
the same settings, in the process that prepared the database, whose URL comes from ``MLFLOW_BACKEND_STORE_URI``.
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(description="MLflow tracking server, one process")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--artifacts-destination", required=True, help="for example s3://mlflow-artifacts")
    arguments = parser.parse_args()

    # MLflow's worker processes are told by these variables; they are read while the application is imported
    from mlflow import server

    store = os.environ["MLFLOW_BACKEND_STORE_URI"]
    os.environ[server.BACKEND_STORE_URI_ENV_VAR] = store
    os.environ[server.REGISTRY_STORE_URI_ENV_VAR] = store
    os.environ[server.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[server.SERVE_ARTIFACTS_ENV_VAR] = "true"
    os.environ[server.ARTIFACTS_DESTINATION_ENV_VAR] = arguments.artifacts_destination
    os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"

    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(store, store, "mlflow-artifacts:/")

    import uvicorn

    uvicorn.run(
        "mlflow.server.fastapi_app:app",
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,  # the stack asks for /health all the time
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
