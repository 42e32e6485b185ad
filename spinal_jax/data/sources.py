"""Streams the rows of a text file, and reads the fields of a JSON row; whatever is wrong is one `UserError`.

`key` is the part of the configuration that names the file (`prompts`, `preferences`, `corpus`), as errors say it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any, NamedTuple

from spinal_jax.errors import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """One line: its text without the newline ("" if blank), which row it is (0-based), and how errors name it."""

    text: str
    number: int
    where: str


def rows(file: str | Path | Traversable, source: str, key: str, offset: int, limit: int | None) -> Iterator[Row]:
    """Rows `offset` to `offset + limit`; a row is a line that is not blank, and blank lines among them come as "".

    A name that ends in `.gz` is gzipped text. Lines after the last row asked for are not read. Invalid UTF-8 becomes
    U+FFFD; a byte order mark is passed over. Raises `UserError` if `offset` or `limit` is out of range or the file
    cannot be read.
    """
    if offset < 0:
        raise UserError(f"{key}.offset={offset} is negative; give the number of rows to pass over, 0 or more")
    if limit is not None and limit < 1:
        raise UserError(f"{key}.limit={limit} leaves nothing; give 1 or more, or null for all")
    return _rows(file, source, key, offset, limit)


def asked(offset: int, limit: int | None) -> str:
    """How errors name the rows asked for."""
    return f"offset={offset}, limit={'null' if limit is None else limit}"


def digest(texts: Iterable[str]) -> str:
    """The hex SHA-256 over texts in order, each as its UTF-8 length in 8 bytes, big-endian, then its UTF-8 bytes.

    Equal digests mean equal texts in equal order.
    """
    state = hashlib.sha256()
    for text in texts:
        data = text.encode()
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()


def valid(text: str) -> str:
    """The text with lone surrogates, which JSON escapes can carry and UTF-8 cannot, as U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def json_object(row: Row, otherwise: str = "") -> dict[str, Any]:
    """The JSON object of a row; `otherwise` is what else the user may do if it is none."""
    try:
        value = json.loads(row.text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{row.where} is not JSON: {row.text[:60]!r}; give one object a line{otherwise}") from error
    if not isinstance(value, dict):
        raise UserError(f"{row.where} must hold a JSON object, not {shown(value)}")
    return value


def field_of(record: dict[str, Any], field: str, where: str) -> Any:
    """The value of a field that must be there."""
    if field not in record:
        raise UserError(f"{where} has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    return record[field]


def text_of(value: object, field: str, where: str) -> str:
    """The value of a field that must be a string, as valid Unicode."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} must be a string, not {shown(value)}")
    return valid(value)


def turns_of(
    messages: list[Any], field: str, where: str, roles: tuple[str, ...] = ("user", "assistant")
) -> list[tuple[str, str]]:
    """Chat messages {"role", "content"} as (role, content)."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'{where}: a message of {field!r} must be {{"role", "content"}}, not {shown(message)}')
        role = message["role"]
        if role not in roles:
            raise UserError(f"{where}: a role in {field!r} must be {' or '.join(roles)}, not {shown(role)}")
        turns.append((role, text_of(message["content"], "content", where)))
    return turns


def shown(value: object) -> str:
    """The beginning of a value, as JSON."""
    return json.dumps(value)[:60]


def _rows(file: str | Path | Traversable, source: str, key: str, offset: int, limit: int | None) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(_lines(file, source, key), 1):
        blank = not line.strip()
        if number >= offset:
            yield Row("" if blank else line.removesuffix("\n"), number, f"{source!r}, line {line_number}")
        number += not blank
        if limit is not None and number >= offset + limit:
            return


def _lines(file: str | Path | Traversable, source: str, key: str) -> Iterator[str]:
    try:
        with _open(file) as stream:
            yield from stream
    except FileNotFoundError as error:
        raise UserError(f"{key}.path: there is no file {source!r}") from error
    except IsADirectoryError as error:
        raise UserError(f"{key}.path: {source!r} is a folder; give one file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{key}.path: {source!r} is not a whole gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{key}.path: {source!r} cannot be read ({error.strerror or error})") from error


def _open(file: str | Path | Traversable) -> IO[str]:
    # utf-8-sig passes over a byte order mark
    if isinstance(file, str | Path):
        file = Path(file).expanduser()
        if file.suffix == ".gz":
            return gzip.open(file, "rt", encoding="utf-8-sig", errors="replace")
    return file.open("r", encoding="utf-8-sig", errors="replace")
