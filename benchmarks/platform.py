"""Measure the platform as a user meets it, and print a Markdown table.

    python benchmarks/platform.py [--clone] [--rounds N] [--output FILE]

Figures: set-up of a fresh clone (only with --clone, which needs the package registries), the import of the
definitions, the stack from stopped to all healthy, `clinical_data_pipeline` on the whole CDISC pilot the first time, on
warm services with all features computed and all models trained again, and with no new data, and the resident memory.
Everything runs in a folder of its own on ports of its own, so a running stack is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORTS = ("POSTGRES", "KAFKA", "REDIS", "S3", "MLFLOW", "SPARK", "SERVING", "PAGE", "GATEWAY", "CODE_SERVER")
IMPORT = (
    "import time; t = time.perf_counter(); import clinical_orchestration.definitions; print(time.perf_counter() - t)"
)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def timed(command: list[str], env: dict[str, str], cwd: Path) -> tuple[float, str]:
    begin = time.perf_counter()
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return seconds, result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", action="store_true", help="measure the set-up of a fresh clone too")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of start, run, stop (default 3)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    rows: list[tuple[str, list[float], str, str]] = []
    with tempfile.TemporaryDirectory(prefix="clinical-benchmark-") as folder:
        root = ROOT
        env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        if options.clone:
            root = Path(folder) / "clone"
            subprocess.run(["git", "clone", "-q", str(ROOT), str(root)], check=True)
            seconds, _ = timed(["./pipeline-manager.sh", "--version"], env, root)
            rows.append(("set-up of a fresh clone", [seconds], "s", "< 240"))
        python = str(root / ".venv" / "bin" / "python")
        imports = [float(timed([python, "-c", IMPORT], env, root)[1]) for _ in range(5)]
        rows.append(("import clinical_orchestration.definitions", imports, "s", "< 2"))

        start, first, full, again, memory, stop = [], [], [], [], [], []
        for round_ in range(options.rounds):
            home = Path(folder) / f"home-{round_}"
            stack = {
                f"CLINICAL_PORT_{name}": str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)
            }
            env_round = {**env, **stack, "CLINICAL_HOME": str(home)}
            manager = "./pipeline-manager.sh"
            start.append(timed([manager, "--start"], env_round, root)[0])
            try:
                first.append(timed([manager, "--run", "clinical_data_pipeline"], env_round, root)[0])
                everything = json.dumps({"full_features": True, "force_training": True})
                command = [manager, "--run", "clinical_data_pipeline", "--conf", everything]
                full.append(timed(command, env_round, root)[0])
                again.append(timed([manager, "--run", "clinical_data_pipeline"], env_round, root)[0])
                _, text = timed([manager, "--stats", "--json"], env_round, root)
                services = json.loads(text)["stats"]["services"].values()
                memory.append(sum(item.get("rss_mb") or 0 for item in services) / 1024)
            finally:
                stop.append(timed([manager, "--stop"], env_round, root)[0])
            shutil.rmtree(home, ignore_errors=True)
        rows += [
            ("stack: stopped to all healthy", start, "s", "< 40"),
            ("clinical_data_pipeline, whole pilot, first run of a new stack", first, "s", "< 120"),
            ("clinical_data_pipeline, warm, all features and models anew", full, "s", "< 60"),
            ("clinical_data_pipeline, no new data", again, "s", ""),
            ("resident memory of the whole stack", memory, "GB", "< 5"),
            ("stop", stop, "s", ""),
        ]

    lines = ["| figure | minimum | median | maximum | unit | wanted |", "|---|--:|--:|--:|---|---|"]
    lines += [
        f"| {name} | {min(values):.2f} | {statistics.median(values):.2f} | {max(values):.2f} | {unit} | {wanted} |"
        for name, values, unit, wanted in rows
    ]
    table = "\n".join(lines)
    print(table)
    if options.output:
        options.output.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
