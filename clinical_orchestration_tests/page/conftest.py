"""A Dagster instance and a workspace of the tiny definitions, for tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from clinical_orchestration.page.app import create_app
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration_tests.page.support import EverybodyIs, open_tiny_workspace


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The page with its Dagster UI, over a temporary instance; the code server is a real one."""
    home: Path = tmp_path_factory.mktemp("dagster")
    ui = DagsterUi(lambda stack: open_tiny_workspace(home, stack))
    settings = PageSettings(
        DAGSTER_HOME=str(home), POSTGRES_URL="", CLINICAL_HOME="", CLINICAL_PAGE_ALLOWED_HOSTS="testserver"
    )
    with ExitStack() as stack:
        client = stack.enter_context(TestClient(create_app(settings, ui, EverybodyIs("Admin")), follow_redirects=False))
        assert ui.wait(60), "the workspace did not open"
        yield client
