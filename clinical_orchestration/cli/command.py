"""Commands as data: arguments, command, group; and the parser that they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

Handler = Callable[[argparse.Namespace], None]
"""Does the work; raises :class:`CommandError` to fail with a message."""


class CommandError(Exception):
    """A command failed: its text goes to standard error, and the exit status is 1."""


class Arg:
    """One argument, as ``argparse.ArgumentParser.add_argument`` takes it."""

    def __init__(self, *flags: str, **options: Any) -> None:
        self.flags = flags
        self.options = options

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add the argument to a parser."""
        parser.add_argument(*self.flags, **self.options)


@dataclass(frozen=True)
class Command:
    """One command, such as ``variables list``."""

    name: str
    help: str
    handler: Handler
    args: tuple[Arg, ...] = field(default=())
    description: str | None = None


@dataclass(frozen=True)
class Group:
    """Commands under one word, such as ``variables``."""

    name: str
    help: str
    commands: tuple[Command, ...]


class _Parser(argparse.ArgumentParser):
    """Shows the whole help with an error, as Airflow does."""

    def error(self, message: str) -> NoReturn:
        self.print_help()
        self.exit(2, f"\n{self.prog} command error: {message}, see help above.\n")


def build_parser(prog: str, entries: Iterable[Group | Command]) -> argparse.ArgumentParser:
    """Return the parser of all groups and commands; ``handler`` of what it parses does the work."""
    parser = _Parser(prog=prog, description="Commands of Airflow 2.11 on this platform.")
    words = parser.add_subparsers(dest="group", metavar="GROUP_OR_COMMAND", required=True, parser_class=_Parser)
    for entry in sorted(entries, key=lambda one: one.name):
        if isinstance(entry, Command):
            _add(words, entry)
            continue
        below = words.add_parser(entry.name, help=entry.help, description=entry.help)
        commands = below.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
        for command in sorted(entry.commands, key=lambda one: one.name):
            _add(commands, command)
    return parser


def _add(words: Any, command: Command) -> None:
    parser = words.add_parser(
        command.name,
        help=command.help,
        description=command.description or command.help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for arg in command.args:
        arg.add_to(parser)
    parser.set_defaults(handler=command.handler)


OUTPUT = Arg(
    "-o",
    "--output",
    help="Output format. Allowed values: json, yaml, plain, table (default: table)",
    metavar="(table, json, yaml, plain)",
    choices=("table", "json", "yaml", "plain"),
    default="table",
)
VERBOSE = Arg("-v", "--verbose", help="Make logging output more verbose", action="store_true")
COLOR = Arg("--color", help="Do emit colored output (default: auto)", choices=("on", "off", "auto"), default="auto")
