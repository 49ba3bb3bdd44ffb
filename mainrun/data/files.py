"""The documents of one file: lines of text, or one field of a CSV, JSON Lines or Parquet table.

The suffix says the format, and a file that is not wholly what it says is refused, with the line or
byte where there is one: half a corpus is worse than none. Which file is read, the user's or one
that `hub` has downloaded, and what becomes of its documents is decided elsewhere.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from mainrun.errors import UserError, one_line

SUFFIXES = (".parquet", ".csv", ".jsonl", ".txt")  # the first that a data set has is read


def read(path: Path, field: str, place: str) -> list[str]:
    """The documents of a file: lines of a .txt, the values of one field of a table.

    As they stand there, blank lines and blank values too; missing values are left out. `place`
    opens every message of the UserErrors raised: the setting and its value, and the file where
    that is not the value.
    """
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            raise UserError(f"{place}: a directory; name a file in it")
        if not path.exists():
            raise UserError(f"{place}: no such file, looked for at {path.absolute()}")
        if suffix == ".parquet":
            return _parquet_values(path, field, place)
        if suffix not in SUFFIXES:
            raise UserError(f"{place}: unknown suffix; accepted are {' '.join(sorted(SUFFIXES))}")
        text = _utf8(path.read_bytes(), place)
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror or error})") from error
    match suffix:
        case ".csv":
            return _csv_values(text, field, place)
        case ".jsonl":
            return _jsonl_values(text, field, place)
        case _:
            # Only \n ends a line (`sources.documents` strips the \r): splitlines would also cut at
            # U+2028, U+0085 and others, which titles do contain.
            return text.split("\n")


def _utf8(raw: bytes, place: str) -> str:
    if not raw.strip():
        raise UserError(f"{place}: empty; it needs at least two documents")
    if b"\0" in raw:
        raise UserError(f"{place}: binary, or UTF-16 (NUL bytes); save it as UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind the byte order mark.
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise UserError(
            f"{place}: not UTF-8 at byte {offset} (0x{raw[offset]:02x}); save it as UTF-8 text"
        ) from error


def _csv_values(text: str, field: str, place: str) -> list[str]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a document of more than 128 KiB
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    values = []
    try:
        header = next(rows, [])
        column = _column(field, header, place)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{place}: line {rows.line_num} has {len(row)} columns and the header "
                    f"{len(header)}; a field with commas in it stands in quotes"
                )
            values.append(row[column])
    except csv.Error as error:
        raise UserError(f"{place}: line {rows.line_num} is not CSV ({error})") from error
    return values


def _column(field: str, header: Sequence[str], place: str) -> int:
    if field not in header:
        raise UserError(
            f"{place}: no field {field!r}; set data.field to one of {', '.join(header) or '(none)'}"
        )
    return header.index(field)


def _jsonl_values(text: str, field: str, place: str) -> list[str]:
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: line {number} is not an object with fields")
        _column(field, list(row), f"{place}: line {number}")
        value = row[field]
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(
                f"{place}: line {number}: field {field!r} is {type(value).__name__}, not text"
            )
        if re.search("[\ud800-\udfff]", value):
            raise UserError(f"{place}: line {number}: half of a surrogate pair in {field!r}")
        values.append(value)
    return values


def _parquet_values(path: Path, field: str, place: str) -> list[str]:
    # PyArrow alone reads Parquet: the `datasets` library would bring pandas, dill, multiprocess
    # and aiohttp for the same column. Imported here, because no other source needs it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            kind = file.schema_arrow.field(_column(field, file.schema_arrow.names, place)).type
            if isinstance(kind, pa.DictionaryType):
                kind = kind.value_type
            if kind not in (pa.string(), pa.large_string(), pa.string_view()):
                raise UserError(f"{place}: field {field!r} is {kind}, not text")
            values = file.read(columns=[field]).column(0).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{place}: not a readable Parquet file ({one_line(error)})") from error
    return [value for value in values if value is not None]
