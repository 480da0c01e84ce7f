"""Runs schemathesis over all operations of Airflow's own document and prints the failures by operation as JSON.

    python fuzz.py URL DOCUMENT SEED     # ADMIN as `name:password` in the environment; KNOWN as JSON, see below

The document is adjusted where it contradicts a running Airflow 2.11, and nowhere else: errors are sent as
problem+json, 400 is answered everywhere, title and detail of an error may be null. Every operation is tried with what
the document allows and forbids, and once more with the names of KNOWN (parameter -> values) in its path.
"""

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import yaml

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
METHODS = ("get", "post", "put", "patch", "delete")


def adjusted(document: dict) -> dict:
    """Return the document with the three adjustments."""
    operations = [path[method] for path in document["paths"].values() for method in METHODS if method in path]
    document["components"]["responses"].setdefault(
        "BadRequest",
        {
            "description": "Bad request",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        },
    )
    for operation in operations:
        operation["responses"].setdefault("400", {"$ref": "#/components/responses/BadRequest"})
    answers = [
        answer for operation in operations for status, answer in operation["responses"].items() if status >= "400"
    ]
    for answer in [*answers, *document["components"]["responses"].values()]:
        content = answer.get("content", {})
        if "application/json" in content:
            content["application/problem+json"] = content.pop("application/json")
    for name in ("title", "detail"):
        document["components"]["schemas"]["Error"]["properties"][name]["nullable"] = True
    return document


def run(folder: Path, url: str, seed: str, phases: str, examples: int, known: dict) -> dict:
    """Run the tool once; return the failures by operation."""
    lines = ["[parameters]"] if known else []
    lines += [f'"path.{name}" = {json.dumps(values)}' for name, values in known.items()]
    (folder / "schemathesis.toml").write_text("\n".join(lines) + "\n")
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(folder / "schemathesis.toml"), "run",
        str(folder / "v1.yaml"), "--url", url.rstrip("/") + "/api/v1", "--auth", os.environ.get("ADMIN", "admin:admin"),
        "--checks", CHECKS, "--phases", phases, "--max-examples", str(examples), "--seed", seed, "--mode", "all",
        "--report", "junit", "--report-junit-path", str(report), "--generation-database", "none", "--no-color",
        "--request-timeout", "20", "--continue-on-failure", "--suppress-health-check", "all", "--max-failures", "300",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if not report.is_file():
        raise SystemExit(f"schemathesis failed: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314 - the tool's own file
        wrong = [*case.iter("failure"), *case.iter("error")]
        found[case.get("name")] = [f"{one.get('message') or ''}\n{one.text or ''}"[:3000] for one in wrong]
    return found


def main() -> None:
    url, file, seed = sys.argv[1:4]
    document = adjusted(yaml.safe_load(Path(file).read_text()))
    wanted = {
        f"{method.upper()} {path}": []
        for path, item in document["paths"].items()
        for method in METHODS
        if method in item
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "v1.yaml").write_text(yaml.safe_dump(document))
        known = json.loads(os.environ.get("KNOWN", "{}"))
        rounds = [run(folder, url, seed, "examples,coverage,fuzzing", int(os.environ.get("EXAMPLES", "8")), {})]
        rounds += [run(folder, url, seed, "fuzzing", int(os.environ.get("EXAMPLES", "8")), known)] if known else []
    for found in rounds:
        for operation, failures in found.items():
            wanted.setdefault(operation, []).extend(failures)
    tried = sorted({operation for found in rounds for operation in found})
    sys.stdout.write(json.dumps({"operations": wanted, "tried": tried}))


if __name__ == "__main__":
    main()
