"""The rules that hold for the whole project: style, types, import directions, cheap imports."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("pyspark", "mlflow", "sklearn", "xgboost", "pandas", "matplotlib", "deltalake", "polars", "pyarrow", "kafka")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_project_passes(command: tuple[str, ...]) -> None:
    result = run(*command)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_point_inward() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_definitions_import_loads_no_heavy_module() -> None:
    code = f"import sys, clinical_orchestration.definitions\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def _imported_modules() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "clinical_orchestration").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"clinical_orchestration"}


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        line.split("[")[0].split("=")[0].split(">")[0].split("<")[0].split("~")[0].strip().lower().replace("_", "-")
        for line in [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    }
    owners = packages_distributions()
    undeclared = {
        module: owners.get(module, ["?"])
        for module in _imported_modules()
        if not {name.lower().replace("_", "-") for name in owners.get(module, ["?"])} & declared
    }
    assert not undeclared
