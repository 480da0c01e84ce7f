"""Signals that a starter left ignored: what the platform starts can still be ended politely."""

import subprocess
import sys
from pathlib import Path

IGNORING = (
    "import signal, sys\n"
    "for name in ('SIGTERM', 'SIGINT', 'SIGQUIT'):\n"
    "    signal.signal(getattr(signal, name), signal.SIG_IGN)\n"
)
SPAWN = IGNORING + (
    "from pathlib import Path\n"
    "from clinical_orchestration.stack.process import spawn\n"
    "program = spawn(['sleep', '60'], log=Path(sys.argv[1]), environment={'PATH': '/usr/bin:/bin'})\n"
    "import time; time.sleep(0.5)\n"
    "program.terminate()\n"
    "print(program.wait(10))\n"
)
COMMAND = IGNORING + (
    "from clinical_orchestration.stack.cli import main\n"
    "main(['--version'])\n"
    "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)\n"
)


def _run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_a_service_hears_sigterm_whatever_its_starter_ignored(tmp_path: Path) -> None:
    assert _run(SPAWN, str(tmp_path / "log")) == "-15"


def test_the_command_line_hears_sigterm_again() -> None:
    assert _run(COMMAND) == "True"
