"""Settings of the embedded stack: its folder, ports and secrets, and the environment that they give to clients.

One deployment is one folder (``CLINICAL_HOME``). The ports in use are kept in ``settings.json`` there, so that later
commands find the stack again; the generated secrets are in ``secrets.json`` (mode 600). A value in the environment
wins over the kept one, which wins over the default.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets as random_secrets
import shlex
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, Field, PrivateAttr, SecretStr

from clinical_orchestration.platform.clients import STORED_FIRST
from clinical_orchestration.platform.crypto import FERNET_KEY, new_key
from clinical_orchestration.stack import starting
from clinical_orchestration.stack.model import StackError
from clinical_orchestration.stack.ports import LOOPBACK, Reservations

PUBLIC_PORTS: dict[str, int] = {
    "postgres": 5433,
    "kafka": 9092,
    "redis": 6379,
    "s3": 9000,
    "mlflow": 5000,
    "spark": 15002,
    "serving": 8000,
    "page": 8085,
    "gateway": 8081,
    "code_server": 4266,
}
"""Ports that users know, with their defaults; each is set by ``CLINICAL_PORT_<NAME>`` (0 picks a free one)."""

INTERNAL_PORTS: tuple[str, ...] = (
    "kafka_controller",
    "s3_grpc",
    "s3_master",
    "s3_master_grpc",
    "s3_volume",
    "s3_volume_grpc",
    "s3_filer",
    "s3_filer_grpc",
    "s3_admin",
    "s3_admin_grpc",
)
"""Ports that only the services themselves use. Free ones are picked; ``CLINICAL_PORT_<NAME>`` sets one."""

TRIAL_VARIABLES = ("CLINICAL_TRIAL", "CLINICAL_LAKE_ROOT", STORED_FIRST)
"""Variables that are handed through to the services when they are set."""

DAGSTER_WORKSPACE_VARIABLES = tuple(
    f"DAGSTER_CLI_{command}_WORKSPACE"
    for command in (
        "JOB_LAUNCH", "JOB_LIST", "JOB_PRINT", "JOB_BACKFILL",
        "SCHEDULE_LIST", "SCHEDULE_LOGS", "SCHEDULE_PREVIEW", "SCHEDULE_RESTART", "SCHEDULE_START", "SCHEDULE_STOP",
        "SENSOR_CURSOR", "SENSOR_LIST", "SENSOR_PREVIEW", "SENSOR_START", "SENSOR_STOP",
    )
)  # fmt: skip
"""By these Dagster's own command finds the running code server from any folder: its option ``--workspace`` of each."""


def checkout() -> Path:
    """Return the folder that holds the package: the checkout, with ``dagster.yaml`` beside the package."""
    return Path(__file__).resolve().parents[2]


def default_home() -> Path:
    """Return the folder of the stack: ``CLINICAL_HOME``, or ``.clinical`` in the checkout."""
    configured = os.environ.get("CLINICAL_HOME", "").strip()
    return Path(configured).expanduser().absolute() if configured else checkout() / ".clinical"


def default_jars() -> Path:
    """Return the folder of downloaded jars, shared by all stacks of a user: ``CLINICAL_JARS``, or the user's cache."""
    configured = os.environ.get("CLINICAL_JARS", "").strip()
    if configured:
        return Path(configured).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or str(Path.home() / ".cache")
    return Path(cache) / "clinical-orchestration" / "jars"


def default_maven_url() -> str:
    """Return the Maven repository: ``CLINICAL_MAVEN_URL``, or Maven Central."""
    return os.environ.get("CLINICAL_MAVEN_URL", "").strip().rstrip("/") or "https://repo.maven.apache.org/maven2"


class Secrets(BaseModel):
    """Generated at the first start of a home; never printed and never on a command line."""

    s3_access_key: str
    s3_secret_key: SecretStr
    postgres_password: SecretStr
    fernet_key: SecretStr = SecretStr("")
    """Of the secrets in PostgreSQL; several, separated by commas, while it is changed. Empty in homes of old."""
    service_token: SecretStr = SecretStr("")
    """Bearer token by which the stack's own commands are known to the page. Empty in homes of old."""

    @property
    def complete(self) -> bool:
        """Whether nothing is missing that an older version did not have."""
        return bool(self.fernet_key.get_secret_value() and self.service_token.get_secret_value())

    def completed(self) -> Secrets:
        """Return the same with what an older version did not have."""
        fresh = Secrets.generate()
        return self.model_copy(
            update={
                name: getattr(fresh, name)
                for name in ("fernet_key", "service_token")
                if not getattr(self, name).get_secret_value()
            }
        )

    @classmethod
    def generate(cls) -> Secrets:
        """Return new random secrets."""
        return cls(
            s3_access_key="clinical" + random_secrets.token_hex(6),
            s3_secret_key=SecretStr(random_secrets.token_hex(20)),
            postgres_password=SecretStr(random_secrets.token_hex(16)),
            fernet_key=SecretStr(new_key()),
            service_token=SecretStr(random_secrets.token_urlsafe(32)),
        )

    def as_json(self) -> str:
        """Return the secrets in clear, for the file that keeps them."""
        return json.dumps(
            {
                "s3_access_key": self.s3_access_key,
                "s3_secret_key": self.s3_secret_key.get_secret_value(),
                "postgres_password": self.postgres_password.get_secret_value(),
                "fernet_key": self.fernet_key.get_secret_value(),
                "service_token": self.service_token.get_secret_value(),
            }
        )


class StackSettings(BaseModel):
    """Where one stack lives and which ports it uses.

    ``ports`` maps the names of :data:`PUBLIC_PORTS` and :data:`INTERNAL_PORTS` to TCP ports on loopback.
    ``overrides`` replaces variables of :meth:`environment`, for services that run elsewhere. Build it with
    :meth:`load`.
    """

    home: Path
    ports: dict[str, int]
    jars: Path = Field(default_factory=default_jars)
    maven_url: str = Field(default_factory=default_maven_url)
    kafka_installed: bool = True
    spark_connectors_installed: bool = True
    overrides: dict[str, str] = Field(default_factory=dict, repr=False)
    _reservations: Reservations = PrivateAttr(default_factory=Reservations)

    @classmethod
    def load(cls, home: Path | None = None, ports: Mapping[str, int] | None = None) -> StackSettings:
        """Read the settings of ``home`` (default :func:`default_home`).

        ``ports`` overrides single ports; 0 picks a free one. Nothing is written. While the stack of this home runs,
        its kept ports win over everything, because those are the ones that answer. Raises :class:`StackError` for a
        port that is no port, or an unreadable settings file.
        """
        from clinical_orchestration.stack import paths

        folder = (home or default_home()).expanduser().absolute()
        kept = _read_kept(paths.settings_file(folder))
        running = paths.supervisor_pid(folder) is not None
        chosen: dict[str, int] = {}
        for name, default in (*PUBLIC_PORTS.items(), *((name, 0) for name in INTERNAL_PORTS)):
            wanted = None if running and name in kept else _configured_port(name, ports)
            chosen[name] = wanted if wanted is not None else kept.get(name, default)
        reservations = Reservations()
        for name, port in chosen.items():
            if port == 0:
                chosen[name] = reservations.pick(chosen.values())
        double = [name for name in chosen if list(chosen.values()).count(chosen[name]) > 1]
        if double:
            variables = " and ".join(port_variable(name) for name in double)
            raise StackError(f"port {chosen[double[0]]} is set for {', '.join(double)}", f"Change one of {variables}.")
        settings = cls(home=folder, ports=chosen)
        settings._reservations = reservations
        settings.refresh_installed()
        return settings

    def refresh_installed(self, run_java: bool = False) -> None:
        """Look anew whether Kafka and Spark's connectors can be used here; ``run_java`` asks Java for its version."""
        from clinical_orchestration.stack import jars, java

        runs_java = bool(java.candidates())
        if run_java:
            try:
                java.find_java()
            except StackError:
                runs_java = False
        self.kafka_installed = runs_java and jars.installed(self.jars, "kafka")
        self.spark_connectors_installed = runs_java and jars.installed(self.jars, "spark")

    def hold_ports(self) -> None:
        """Reserve the ports of this stack for as long as this object lives, so that no other stack picks them."""
        for port in self.ports.values():
            self._reservations.reserve(port)

    def release_ports(self) -> None:
        """Give up the reservations, for another process of this stack to take over."""
        self._reservations.close()

    def pick_port(self, name: str) -> None:
        """Give a service another port, one that is free and reserved."""
        self.ports[name] = self._reservations.pick(self.ports.values())

    def save(self) -> None:
        """Keep the ports in the home, readable by its owner only."""
        from clinical_orchestration.stack import paths

        write_private(paths.settings_file(self.home), json.dumps({"ports": self.ports}, indent=1) + "\n")

    def secrets(self) -> Secrets:
        """Return the secrets of the home; they are generated and kept at the first call.

        A home of an older version gets what it lacks; what it has stays.
        """
        from clinical_orchestration.stack import paths

        path = paths.secrets_file(self.home)
        try:
            found = _read_secrets(path)
            if found is not None and found.complete:
                return found
            with _alone(path):  # two first calls at once must agree on the secrets
                found = (_read_secrets(path) or Secrets.generate()).completed()
                write_private(path, found.as_json() + "\n")
                return found
        except (OSError, ValueError) as error:
            raise StackError(
                f"{path} cannot be read or written: {type(error).__name__}",
                "It holds the generated passwords of this stack's data. Restore it, or remove the home with --clean.",
            ) from None

    @property
    def dagster_home(self) -> Path:
        """Folder of ``dagster.yaml`` and ``workspace.yaml``."""
        return self.home / "dagster"

    def postgres_url(self, database: str = "clinical") -> str:
        """Return the URL of one database; it contains the password."""
        password = self.secrets().postgres_password.get_secret_value()
        return f"postgresql://clinical:{password}@{LOOPBACK}:{self.ports['postgres']}/{database}"

    def url(self, name: str, scheme: str = "http") -> str:
        """Return the URL of a service by the name of its port."""
        return f"{scheme}://{LOOPBACK}:{self.ports[name]}"

    def environment(self) -> dict[str, str]:
        """Return what every client and service of this stack needs in its environment, secrets included."""
        secrets = self.secrets()
        environment = {
            "CLINICAL_HOME": str(self.home),
            "AWS_ENDPOINT_URL": self.url("s3"),
            "AWS_ACCESS_KEY_ID": secrets.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": secrets.s3_secret_key.get_secret_value(),
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_S3_ENDPOINT_URL": self.url("s3"),
            "REDIS_URL": f"redis://{LOOPBACK}:{self.ports['redis']}/0",
            "KAFKA_BOOTSTRAP_SERVERS": f"{LOOPBACK}:{self.ports['kafka']}",
            "SPARK_REMOTE": f"sc://{LOOPBACK}:{self.ports['spark']}",
            "SERVING_URL": self.url("serving"),
            "AIRFLOW_URL": self.url("page"),
            "GATEWAY_URL": self.url("gateway"),
            "POSTGRES_URL": self.postgres_url(),
            FERNET_KEY: secrets.fernet_key.get_secret_value(),
            "DAGSTER_HOME": str(self.dagster_home),
            **{name: str(self.dagster_home / "workspace.yaml") for name in DAGSTER_WORKSPACE_VARIABLES},
            "CLINICAL_DAGSTER_STORAGE": str(self.home / "data" / "dagster"),
            starting.LAUNCHER_FOLDER: str(starting.meeting_folder(self.home)),
            # a backfill leaves an event a day: written together they take a second, one by one a minute
            "DAGSTER_EVENT_BATCH_SIZE": "1000",
            "CLINICAL_KAFKA_ENABLED": "true" if self.kafka_installed else "false",
            "CLINICAL_SPARK_CONNECTORS": "true" if self.spark_connectors_installed else "false",
        }
        handed_on = {
            name: value
            for name, value in os.environ.items()
            if name in TRIAL_VARIABLES or name.startswith("CLINICAL_VAR_")
        }
        return environment | handed_on | self.overrides

    def export_lines(self) -> str:
        """Return the lines of ``--env`` for ``eval``: ``export NAME=value``, with ``PATH`` led by this environment."""
        values = {"PATH": os.pathsep.join([scripts_folder(), os.environ.get("PATH", os.defpath)]), **self.environment()}
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in values.items())


def scripts_folder() -> str:
    """Return the folder of the commands of the running Python environment."""
    return sysconfig.get_path("scripts") or str(Path(sys.executable).parent)


def port_variable(name: str) -> str:
    """Return the environment variable that sets a port."""
    return f"CLINICAL_PORT_{name.upper()}"


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically; only its owner may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp gives mode 600
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_secrets(path: Path) -> Secrets | None:
    try:
        return Secrets.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time work on a file; the lock is a file beside it and ends with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read_kept(path: Path) -> dict[str, int]:
    try:
        return {str(name): int(port) for name, port in json.loads(path.read_text())["ports"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StackError(
            f"{path} cannot be read: {type(error).__name__}: {error}", "Repair or remove it; it only holds the ports."
        ) from None


def _configured_port(name: str, ports: Mapping[str, int] | None) -> int | None:
    if ports and name in ports:
        return ports[name]
    text = os.environ.get(port_variable(name), "").strip()
    if not text:
        return None
    if not text.isdigit() or int(text) > 65535:
        raise StackError(f"{port_variable(name)}={text} is not a port", "Use a number from 1 to 65535, or 0.")
    return int(text)
