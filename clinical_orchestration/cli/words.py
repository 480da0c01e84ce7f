"""Words for what ``pipeline-manager.sh`` does by flags: ``clinical stack start`` is ``--start``."""

from __future__ import annotations

from collections.abc import Sequence

STACK = {
    "start": "--start", "stop": "--stop", "restart": "--restart-rebuild", "clean": "--clean", "env": "--env",
    "health": "--health-check", "summary": "--summary", "stats": "--stats", "logs": "--logs", "open": "--open",
    "visualize": "--visualize", "demo": "--demo",
}  # fmt: skip
"""Flag by the word that follows ``stack``."""


def as_flags(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which ``stack WORD``, ``run JOB`` and ``quality`` are what they stand for.

    ``stack`` alone, or with a word that is none, becomes the help, or a flag that is refused.
    """
    given = list(arguments)
    match given:
        case ["stack"] | ["stack", "-h" | "--help", *_] | ["run"] | ["run", "-h" | "--help", *_]:
            return ["--help"]
        case ["stack", word, *rest]:
            return [STACK.get(word, f"--{word.lstrip('-')}"), *rest]
        case ["run", job, *rest]:
            return ["--run", job, *rest]
        case ["quality", *rest]:
            return ["data", "quality", *rest]
    return given
