"""What the command line shows: a live display on a terminal, plain lines elsewhere, and errors as one block.

Results go to standard output and progress to standard error, so that ``--json`` and ``--env`` can be piped.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

MARKS = {"good": "✓", "bad": "✗", "busy": "…", "idle": "-", "warn": "!"}
_STYLES = {"good": "green", "bad": "bold red", "busy": "yellow", "idle": "dim", "warn": "yellow"}
KINDS = {
    "healthy": "good",
    "starting": "busy",
    "unhealthy": "bad",
    "stopped": "idle",
    "not_installed": "warn",
    "off": "idle",
}
"""State of a service -> how to show it."""


@dataclass
class UserError(Exception):
    """A failure that a person can act on.

    Attributes:
        what: what failed.
        why: the cause.
        cure: what to do about it.
        status: exit status of the command; 2 for a wrong command line.
    """

    what: str
    why: str = ""
    cure: str = ""
    status: int = 1

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.why:
            lines.append("  why:  " + self.why.strip().replace("\n", "\n        "))
        if self.cure:
            lines.append("  cure: " + self.cure.strip().replace("\n", "\n        "))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        """Return the parts, for ``--json``."""
        return {"what": self.what, "why": self.why, "cure": self.cure}


def seconds(value: float) -> str:
    """Return a duration as people read it: ``0.4 s``, ``12 s``, ``3 min 05 s``."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value // 60:.0f} min {value % 60:02.0f} s"


def megabytes(value: float | None) -> str:
    """Return a size given in MB: ``12 MB``, ``3.4 GB``."""
    if value is None:
        return ""
    return f"{value / 1024:.1f} GB" if value >= 1024 else f"{value:.0f} MB"


class Display:
    """Shows progress and results.

    Args:
        out: where results go.
        err: where progress and errors go.
        quiet: show no progress (``--json``).
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, *, quiet: bool = False) -> None:
        self._out, self._err, self.quiet = out or sys.stdout, err or sys.stderr, quiet
        self._began = time.monotonic()
        self._status: Status | None = None
        self._rich: dict[str, Console] = {}

    @property
    def live(self) -> bool:
        """Whether progress is shown on a terminal that can move its cursor."""
        return not self.quiet and self._err.isatty() and os.environ.get("TERM", "") not in ("", "dumb")

    @property
    def interactive(self) -> bool:
        """Whether a person can be asked."""
        return sys.stdin.isatty() and self._err.isatty()

    def _console(self, stream: TextIO) -> Console:
        from rich.console import Console

        name = "out" if stream is self._out else "err"
        if name not in self._rich:
            self._rich[name] = Console(file=stream, highlight=False, soft_wrap=True)
        return self._rich[name]

    # ------------------------------------------------------------------------------------------------ progress

    def heading(self, text: str) -> None:
        """Write the title of what begins now."""
        if not self.quiet:
            self._progress(f"== {text}", "bold")

    def line(self, text: str, kind: str = "idle", *, mark: bool = True) -> None:
        """Write one line of progress that stays."""
        if not self.quiet:
            self._progress(f"{MARKS[kind]} {text}" if mark else text, _STYLES[kind] if kind != "idle" else "")

    def _progress(self, text: str, style: str) -> None:
        if self.live:
            from rich.text import Text

            self._console(self._err).print(Text(text, style=style))
        else:
            self._err.write(text + "\n")
            self._err.flush()

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show a moving sign beneath the lines while the block runs; nothing where there is no terminal."""
        if not self.live or self._status is not None:
            yield
            return
        with self._console(self._err).status(text, spinner="dots") as status:
            self._status = status
            try:
                yield
            finally:
                self._status = None

    def now(self, text: str) -> None:
        """Change the text of the moving sign."""
        if self._status is not None:
            self._status.update(text)

    # ------------------------------------------------------------------------------------------------- results

    def write(self, text: str = "", style: str = "") -> None:
        """Write one line of a result."""
        if self._out.isatty() and style:
            from rich.text import Text

            self._console(self._out).print(Text(text, style=style))
        else:
            self._out.write(text + "\n")

    def title(self, text: str) -> None:
        """Write the title of a part of the result."""
        self.write()
        self.write(text, "bold")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> None:
        """Write a table; `kinds` says for each row how to colour it. Columns that hold numbers are set right."""
        if not rows:
            return
        cells = [list(header), *[list(row) for row in rows]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        numeric = [
            all(not row[column] or row[column][0].isdigit() for row in cells[1:])
            and any(row[column] for row in cells[1:])
            for column in range(len(header))
        ]
        for number, row in enumerate(cells):
            text = "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            )
            style = (
                "dim" if number == 0 else (_STYLES[kinds[number - 1]] if kinds and kinds[number - 1] != "good" else "")
            )
            self.write("  " + text.rstrip(), style)

    def error(self, error: UserError) -> None:
        """Write an error as one block."""
        if self._err.isatty():
            from rich.text import Text

            first, _, rest = str(error).partition("\n")
            self._console(self._err).print(Text(first, style="bold red"))
            if rest:
                self._console(self._err).print(Text(rest))
        else:
            self._err.write(f"{error}\n")
            self._err.flush()

    def ask(self, question: str) -> bool:
        """Ask a yes-or-no question; anything but yes is no."""
        self._err.write(f"{question} [y/N] ")
        self._err.flush()
        try:
            answer = sys.stdin.readline()
        except KeyboardInterrupt:
            self._err.write("\n")
            return False
        return answer.strip().lower() in ("y", "yes")
