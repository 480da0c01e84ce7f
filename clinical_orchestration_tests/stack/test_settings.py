"""Settings: ports, secrets and the environment that clients get."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stack import services
from clinical_orchestration.stack.model import StackError
from clinical_orchestration.stack.ports import port_is_free
from clinical_orchestration.stack.settings import (
    DAGSTER_WORKSPACE_VARIABLES,
    PUBLIC_PORTS,
    StackSettings,
    port_variable,
)


@pytest.fixture(autouse=True)
def _no_ports_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("CLINICAL_PORT_", "CLINICAL_HOME")):
            monkeypatch.delenv(name)


def test_defaults_are_the_documented_ports(tmp_path: Path) -> None:
    ports = StackSettings.load(tmp_path).ports

    assert {name: ports[name] for name in PUBLIC_PORTS} == PUBLIC_PORTS
    assert len(set(ports.values())) == len(ports)


def test_a_variable_wins_over_the_kept_port_which_wins_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLINICAL_PORT_REDIS", "7001")
    monkeypatch.setenv("CLINICAL_PORT_S3", "7002")
    StackSettings.load(tmp_path).save()
    monkeypatch.delenv("CLINICAL_PORT_REDIS")
    monkeypatch.setenv("CLINICAL_PORT_S3", "7003")

    again = StackSettings.load(tmp_path)

    assert (again.ports["redis"], again.ports["s3"]) == (7001, 7003)
    assert again.ports["s3_master"] == json.loads((tmp_path / "settings.json").read_text())["ports"]["s3_master"]


def test_zero_picks_a_free_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_PORT_MLFLOW", "0")

    port = StackSettings.load(tmp_path).ports["mlflow"]

    assert port != PUBLIC_PORTS["mlflow"]
    assert port_is_free(port)


@pytest.mark.parametrize("text", ["70000", "web", "-1"])
def test_a_port_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CLINICAL_PORT_PAGE", text)

    with pytest.raises(StackError, match=f"CLINICAL_PORT_PAGE={text} is not a port"):
        StackSettings.load(tmp_path)


def test_one_port_for_two_services_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_PORT_PAGE", "9000")

    with pytest.raises(StackError, match="port 9000 is set for s3, page") as raised:
        StackSettings.load(tmp_path)

    assert "CLINICAL_PORT_PAGE" in raised.value.cure


def test_secrets_are_generated_once_and_private(tmp_path: Path) -> None:
    settings = StackSettings.load(tmp_path)

    first = settings.secrets()

    assert settings.secrets() == first
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    assert StackSettings.load(tmp_path / "other").secrets() != first
    assert first.s3_secret_key.get_secret_value() not in repr(settings) + repr(first)


def test_an_older_home_gets_a_key_for_secrets_and_keeps_what_it_has(tmp_path: Path) -> None:
    old = {"s3_access_key": "clinicalold", "s3_secret_key": "s" * 40, "postgres_password": "p" * 32}
    (tmp_path / "secrets.json").write_text(json.dumps(old) + "\n")
    settings = StackSettings.load(tmp_path)

    first = settings.secrets()

    assert len(first.fernet_key.get_secret_value()) == 44
    assert StackSettings.load(tmp_path).secrets() == first
    kept = json.loads((tmp_path / "secrets.json").read_text())
    assert {name: kept[name] for name in old} == old
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    assert settings.environment()["CLINICAL_FERNET_KEY"] == first.fernet_key.get_secret_value()
    token = first.service_token.get_secret_value()
    assert len(token) >= 32
    assert token not in settings.export_lines()
    for secret in (token, first.fernet_key.get_secret_value()):
        assert secret not in repr(settings) + repr(first)


def test_only_the_page_gets_the_service_token_and_the_admins_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = StackSettings.load(tmp_path)
    for name in ("CLINICAL_ADMIN_PASSWORD", "CLINICAL_USER", "CLINICAL_PASSWORD"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.delenv("CLINICAL_SERVICE_TOKEN", raising=False)
    token = settings.secrets().service_token.get_secret_value()
    shared = services.base_environment(settings)
    assert token not in shared.values()
    assert "hidden" not in shared.values()
    for spec in services.specs():
        own = spec.environment(services.Context(settings)) if spec.environment else {}
        assert (token in own.values()) is (spec.name == "page"), spec.name
        assert ("hidden" in own.values()) is (spec.name == "page"), spec.name


def test_first_calls_at_once_agree_on_the_secrets(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from clinical_orchestration.stack.settings import StackSettings\n"
        "print(StackSettings.load(pathlib.Path(sys.argv[1])).secrets().as_json())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]

    answers = {process.communicate(timeout=60)[0] for process in processes}

    assert len(answers) == 1
    assert "fernet_key" in answers.pop()


def test_the_environment_configures_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StackSettings.load(tmp_path)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)

    clients = ClientSettings()

    assert clients.s3_endpoint == "http://127.0.0.1:9000"
    assert clients.s3_secret_key == settings.secrets().s3_secret_key
    assert clients.spark_remote == "sc://127.0.0.1:15002"
    assert clients.postgres_url.get_secret_value() == settings.postgres_url()


def test_a_shell_takes_the_exported_lines(tmp_path: Path) -> None:
    home = tmp_path / "it's a home"
    settings = StackSettings.load(home)
    lines = settings.export_lines()

    shell = subprocess.run(
        ["sh", "-c", 'eval "$1"; printf %s "$DAGSTER_HOME|$AWS_ALLOW_HTTP|${PATH%%:*}"', "sh", lines],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    )

    dagster_home, allow_http, first_folder = shell.stdout.split("|")
    assert dagster_home == str(home / "dagster")
    assert allow_http == "true"
    assert (Path(first_folder) / "dagster").exists()


def test_the_variable_of_a_port_is_named_after_it() -> None:
    assert port_variable("code_server") == "CLINICAL_PORT_CODE_SERVER"


def test_dagsters_own_command_finds_the_running_code_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner
    from dagster._cli import ENV_PREFIX, cli

    asked = {
        f"{ENV_PREFIX}_{group}_{name}_WORKSPACE".upper()
        for group in ("job", "schedule", "sensor")
        for name, command in cli.commands[group].commands.items()  # type: ignore[attr-defined]
        if any(option.name == "workspace" for option in command.params)
    }
    assert asked == set(DAGSTER_WORKSPACE_VARIABLES)

    settings = StackSettings.load(tmp_path)
    settings.dagster_home.mkdir()
    (settings.dagster_home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    module = "clinical_orchestration_tests.airflow.tiny_definitions"
    (settings.dagster_home / "workspace.yaml").write_text(f"load_from: [{{python_module: {module}}}]\n")
    environment = settings.environment()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    kept = {name: environment[name] for name in ("DAGSTER_HOME", *DAGSTER_WORKSPACE_VARIABLES)}
    done = CliRunner().invoke(cli, ["job", "list"], env=kept, auto_envvar_prefix=ENV_PREFIX)
    assert "Job: model_monitoring" in done.output, done.output
