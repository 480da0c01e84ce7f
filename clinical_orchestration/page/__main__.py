"""``python -m clinical_orchestration.page --host 127.0.0.1 --port 8085``."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

from clinical_orchestration.page.settings import PageSettings, is_loopback


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until the process is told to end; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m clinical_orchestration.page", description="The page on port 8085.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8085, help="port to listen on (default %(default)s)")
    options = parser.parse_args(arguments)
    settings = PageSettings()
    if not is_loopback(options.host) and not settings.allow_remote:
        sys.stderr.write(
            f"error: the page does not listen on {options.host}\n"
            "  why:  it has no login, so that everyone who reaches it could start and delete runs\n"
            "  cure: use 127.0.0.1, or set CLINICAL_PAGE_ALLOW_REMOTE=true behind a proxy that asks who it is\n"
        )
        return 2
    if not settings.dagster_home:
        sys.stderr.write(
            "error: DAGSTER_HOME is not set\n  why:  it names the instance that the page shows\n"
            '  cure: eval "$(./pipeline-manager.sh --env)", or start the stack, which sets it\n'
        )
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # a code server that starts later is no news worth a page of stack trace; the UI and /health show it
    warnings.filterwarnings("ignore", message="Error loading repository location")

    import uvicorn

    from clinical_orchestration.page.app import create_app

    uvicorn.run(
        create_app(settings), host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=3
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
