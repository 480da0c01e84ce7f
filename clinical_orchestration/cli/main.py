"""The command ``clinical`` and what ``pipeline-manager.sh`` starts: subcommands, and the flags of the stack."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from clinical_orchestration.cli import clinical
from clinical_orchestration.cli.words import as_flags
from clinical_orchestration.stack import cli as stack


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return stack.main(as_flags(given), subcommands=clinical)


if __name__ == "__main__":
    sys.exit(main())
