"""``python -m clinical_orchestration.page --host 127.0.0.1 --port 8085``."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

from clinical_orchestration.page.settings import PageSettings, is_loopback

SWITCH_SECONDS = 0.0005


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until the process is told to end; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m clinical_orchestration.page", description="The page on port 8085.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8085, help="port to listen on (default %(default)s)")
    options = parser.parse_args(arguments)
    settings = PageSettings()
    if not is_loopback(options.host) and not settings.allow_remote:
        return _refused(
            f"the page does not listen on {options.host}",
            "it answers to this machine only, where the first user is admin with the password admin",
            "use 127.0.0.1, or set CLINICAL_PAGE_ALLOW_REMOTE=true and a password in CLINICAL_ADMIN_PASSWORD",
        )
    if not settings.dagster_home:
        return _refused(
            "DAGSTER_HOME is not set",
            "it names the instance that the page shows",
            'eval "$(./pipeline-manager.sh --env)", or start the stack, which sets it',
        )
    if settings.allow_remote and (reason := _open_to_everybody(settings)):
        return _refused("the page would be open to everybody", *reason)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # a code server that starts later is no news worth a page of stack trace; the UI and /health show it
    warnings.filterwarnings("ignore", message="Error loading repository location")

    # a request that waits for the database often would else wait 5 ms for a busy thread each time it goes on
    sys.setswitchinterval(SWITCH_SECONDS)
    import uvicorn

    from clinical_orchestration.page.app import create_app

    uvicorn.run(
        create_app(settings), host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=3
    )
    return 0


def _refused(what: str, why: str, cure: str) -> int:
    sys.stderr.write(f"error: {what}\n  why:  {why}\n  cure: {cure}\n")
    return 2


def _open_to_everybody(settings: PageSettings) -> tuple[str, str] | None:
    """Return why the login is no protection, and the cure; None where it is one."""
    from clinical_orchestration.platform.database import StoreUnavailableError
    from clinical_orchestration.users.first_user import UnsafeLoginError, prepare_first_user
    from clinical_orchestration.users.store import UserStore

    store = UserStore(settings.postgres_url.get_secret_value())
    try:
        prepare_first_user(store, remote=True, password=settings.admin_password.get_secret_value())
    except UnsafeLoginError as error:
        return error.why, error.cure
    except StoreUnavailableError as error:
        return f"its users cannot be read: {error}", "start the database first"
    return None


if __name__ == "__main__":
    sys.exit(main())
