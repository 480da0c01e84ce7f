"""Embedded services for tests: real ones, on free ports, with their state in a folder of the test's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from clinical_orchestration.stack.engine import Engine
from clinical_orchestration.stack.model import StackError, State
from clinical_orchestration.stack.services import with_needs
from clinical_orchestration.stack.settings import INTERNAL_PORTS, PUBLIC_PORTS, StackSettings

S3_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL")


class NotInstalledError(StackError):
    """A wanted service cannot be had here (jars out of reach, no Java); tests skip with this reason."""


@contextlib.contextmanager
def embedded(
    home: Path, *services: str, use: Mapping[str, str] | None = None, timeout: float = 180.0
) -> Iterator[dict[str, str]]:
    """Start the named services and what they need; yield the environment of their clients.

    Names are those of :func:`.services.specs` (``postgres``, ``s3``, ``redis``, ``kafka``, ``spark``, ``mlflow``
    ...). All ports are free ones, all state is below ``home``, jars are shared with stacks (``CLINICAL_JARS``).
    ``use`` is the environment of services that already run: its S3 takes the place of an own one for Spark and in
    what is yielded. The services are ready when this yields and gone afterwards, also when the calling process is
    killed. Raises :class:`NotInstalledError` where one cannot be had, :class:`StackError` where one does not start.
    """
    home.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        home.chmod(0o711)  # PostgreSQL runs as another user then and must get to its folder
    settings = StackSettings.load(home, ports=dict.fromkeys((*PUBLIC_PORTS, *INTERNAL_PORTS), 0))
    if use:
        settings.overrides = {name: use[name] for name in S3_VARIABLES if name in use}
    engine = Engine(settings, with_needs(services))
    wanted = list(engine.units)
    try:
        engine.start()
        states = engine.wait_ready(wanted, timeout)
        for state in states:
            if state.state is State.NOT_INSTALLED and state.name in services:
                raise NotInstalledError(f"{state.title}: {state.error}", state.cure or "")
        failed = [state for state in states if not state.ok]
        if failed:
            reasons = "; ".join(f"{one.name}: {one.state.value} {one.error or one.note or ''}" for one in failed)
            raise StackError(f"not ready: {reasons}", failed[0].cure or "")
        yield settings.environment()
    finally:
        engine.stop()
