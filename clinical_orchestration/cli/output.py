"""What commands write: tables, JSON, YAML and plain columns as Airflow writes them, and files of exports."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clinical_orchestration.cli.command import CommandError

WIDTH = 200
"""Columns of a table that is not written to a terminal."""


def say(text: str) -> None:
    """Write one line to standard output."""
    sys.stdout.write(f"{text}\n")


def warn(text: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(f"{text}\n")


def show(rows: Sequence[Mapping[str, Any]], output: str) -> None:
    """Write rows in the format asked for: ``table``, ``json``, ``yaml`` or ``plain``.

    Values become text in every format, as Airflow gives them; only None stays none.
    """
    data = [{name: _normal(value, output) for name, value in row.items()} for row in rows]
    if output == "json":
        say(json.dumps(data))
    elif output == "yaml":
        import yaml

        say(yaml.safe_dump(data, sort_keys=True))
    elif not data:
        say("No data found")
    elif output == "plain":
        _plain(data)
    else:
        _table(data)


def _normal(value: Any, output: str) -> Any:
    if isinstance(value, list | tuple):
        inner = [_normal(one, output) for one in value]
        return ",".join(str(one) for one in inner) if output == "table" else inner
    if isinstance(value, Mapping) and output != "table":
        return {key: _normal(one, output) for key, one in value.items()}
    return None if value is None else str(value)


def _plain(data: Sequence[Mapping[str, Any]]) -> None:
    names = list(data[0])
    lines = [names, *([_cell(row[name]) for name in names] for row in data)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("\n", " ")


def _table(data: Sequence[Mapping[str, Any]]) -> None:
    from rich.box import ASCII_DOUBLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    table = Table(show_edge=False, pad_edge=False, box=ASCII_DOUBLE_HEAD, caption=" ")
    for name in data[0]:
        table.add_column(name, overflow="fold")
    for row in data:
        table.add_row(*(Text(str(value)) for value in row.values()))
    console.print(table)


def is_stream(file: str) -> bool:
    """Whether an export goes to somewhere that others may read along: ``-``, a terminal, a pipe."""
    return file == "-" or (os.path.exists(file) and not os.path.isfile(file))


def export(text: str, file: str, count: int, what: str) -> None:
    """Write an export: to standard output, or to a file that only its owner may read, and say how many it holds.

    Raises:
        CommandError: the file cannot be written.
    """
    if file == "-":
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()
        warn(f"\n{count} {what} successfully exported.")
        return
    try:
        if is_stream(file):
            Path(file).write_text(text, encoding="utf-8")
        else:
            write_private(Path(file), (text,))
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {error.strerror}") from None
    say(f"{count} {what} successfully exported to {file}.")


def write_private(path: Path, parts: Iterable[str]) -> None:
    """Replace a file by these texts, one after the other, when all are there; only its owner may read it.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp gives mode 600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.writelines(parts)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
