"""``airflow rotate-fernet-key``."""

from __future__ import annotations

import argparse

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import VERBOSE, Command
from clinical_orchestration.cli.output import say


def _rotate(args: argparse.Namespace) -> None:
    count = deployment.store().rotate()
    deployment.trail().keep_keys()  # rows that the old key signed can be checked when it is gone
    say(f"{count} secrets encrypted with the first key of CLINICAL_FERNET_KEY.")


ROTATE = Command(
    "rotate-fernet-key",
    "Rotate encrypted connection credentials and variables",
    _rotate,
    (VERBOSE,),
    description="Encrypts all secrets of connections and variables with the first key of CLINICAL_FERNET_KEY; put the\n"
    "new key before the old one, separated by a comma, run this, then take the old one away.",
)
