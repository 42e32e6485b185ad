"""Reads rows of text, JSON lines, JSON arrays, parquet and Arrow files, folders of these, and hub data sets.

`key` is the group of settings of the source (`prompts`, `preferences`, `corpus`), for error messages.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spinal_jax.data.tables import HubDataset, data_files, hub_rows, table_rows
from spinal_jax.data.textfiles import File, items, kind_of, lines, starts_array
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTAINER = re.compile(r"\.(jsonl?|ndjson|txt|parquet|arrow|feather|gz|bz2|xz|zst)$", re.IGNORECASE)


class Row(NamedTuple):
    """A row: its number (0-based), its name in error messages, and its text or its fields.

    `text` is a line without its line break, "" if it is blank. Rows of tables and JSON arrays have their fields in
    `record` instead.
    """

    number: int
    where: str
    text: str = ""
    record: Any = None

    @property
    def blank(self) -> bool:
        return self.record is None and not self.text


class Source(NamedTuple):
    """A source of rows: a file, a folder with an optional split, or a data set on a hub."""

    path: File | None = None
    split: str | None = None  # of a folder
    hub: HubDataset | None = None
    label: str | None = None  # name in error messages; None is the path or id

    @property
    def shown(self) -> str:
        return self.label or (str(self.path) if self.hub is None else self.hub.shown)


def source_of(
    path: str | Path | None,
    dataset: str | None = None,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> Source:
    """The source of the settings `path`, `dataset`, `split`, `name` and `revision`."""
    if dataset is None:
        return Source(path, split)
    return Source(hub=HubDataset(dataset=dataset, split=split or "train", name=name, revision=revision))


def stem(source: str) -> str:
    """The name of a source in a trace: the file name without extensions of containers."""
    name = Path(source).name
    while (short := _CONTAINER.sub("", name)) != name and short:
        name = short
    return name


def read_rows(
    source: Source, key: str, offset: int, limit: int | None, counts: dict[str, int], *, as_text: bool = False
) -> Iterator[Row]:
    """Rows `offset` to `offset + limit`. Rows of a text file are its non-blank lines; blank lines are yielded, but not
    counted.

    The type of a file is detected from its content. gzip, bzip2, xz and Zstandard are decompressed; a text file that
    starts with "[" is a JSON array unless `as_text`. Nothing is read after the last requested row.
    `counts["undecodable"]` is increased by the number of bytes that are not UTF-8 and become U+FFFD.

    Raises `UserError` if `offset` or `limit` is out of range or the source cannot be read.
    """
    if offset < 0:
        raise UserError(f"{key}.offset={offset} is negative; give the number of rows to pass over, 0 or more")
    if limit is not None and limit < 1:
        raise UserError(f"{key}.limit={limit} leaves nothing; give 1 or more, or null for all")
    return _some(_all(source, key, counts, as_text), offset, limit)


def _some(every: Iterator[Row], offset: int, limit: int | None) -> Iterator[Row]:
    for row in every:
        if row.number >= offset:
            yield row
        if limit is not None and row.number + (not row.blank) >= offset + limit:
            return


def _all(source: Source, key: str, counts: dict[str, int], as_text: bool) -> Iterator[Row]:
    """All rows; a blank line has the number of the next row."""
    if source.hub is not None:
        if as_text:
            raise UserError(f"{key}.format=text reads lines of a file, but {key}.dataset names a data set")
        for number, record in enumerate(hub_rows(source.hub, key)):
            yield Row(number, f"{source.shown!r}, row {number + 1}", record=record)
        return
    assert source.path is not None
    number = 0
    files, names = _files(source, key)
    for file, name in zip(files, names, strict=True):
        for row in _of_file(file, name, key, counts, as_text):
            yield row._replace(number=number)
            number += not row.blank


def _files(source: Source, key: str) -> tuple[list[File], list[str]]:
    """The files of a source and their names in error messages."""
    file = source.path
    assert file is not None
    if not isinstance(file, str | Path):
        return [file], [source.shown]
    path = Path(file).expanduser()
    if not path.is_dir():
        if source.split is not None:
            raise UserError(f"{key}.split is {source.split!r}, but {source.shown!r} is one file, which has no splits")
        return [path], [source.shown]
    found = data_files(path, source.split, source.shown, key)
    return list(found), [f"{source.shown}/{p.relative_to(path).as_posix()}" for p in found]


def _of_file(file: File, name: str, key: str, counts: dict[str, int], as_text: bool) -> Iterator[Row]:
    kind = kind_of(file, name, key)
    if kind != "text":
        if as_text:
            raise UserError(f"{key}.path: {name!r} is a {kind} file, not text; name the column with {key}.field")
        assert isinstance(file, Path)
        for number, record in enumerate(table_rows(file, kind, name, key), 1):
            yield Row(0, f"{name!r}, row {number}", record=record)
    elif not as_text and starts_array(file, name, key):
        for number, record in enumerate(items(file, name, key, counts), 1):
            yield Row(0, f"{name!r}, item {number}", record=record)
    else:
        for number, line in enumerate(lines(file, name, key, counts), 1):
            yield Row(0, f"{name!r}, line {number}", "" if not line.strip() else line)


def asked(offset: int, limit: int | None) -> str:
    """The requested rows in error messages."""
    return f"offset={offset}, limit={'null' if limit is None else limit}"


def texts_sha256(texts: Iterable[str]) -> str:
    """The hex SHA-256 over texts in order, each as its UTF-8 length in 8 bytes, big-endian, then its UTF-8 bytes.

    Equal digests mean equal texts in equal order.
    """
    state = hashlib.sha256()
    for text in texts:
        data = text.encode()
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()


def valid(text: str) -> str:
    """The text with lone surrogates, which JSON allows and UTF-8 does not, replaced by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def json_object(row: Row, otherwise: str = "") -> Json:
    """The JSON object of a row; `otherwise` is an alternative for the error message."""
    value = row.record
    if value is None:
        try:
            value = json.loads(row.text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{row.where} is not JSON: {row.text[:60]!r}; give one object a line{otherwise}") from error
    if not isinstance(value, dict):
        raise UserError(f"{row.where} must hold a JSON object, not {json_start(value)}")
    return value


def field_of(record: Json, field: str, where: str) -> Any:
    """The value of a required field."""
    if field not in record:
        raise UserError(f"{where} has no field {field!r}; it has {names_of(record)}")
    return record[field]


def string_of(value: object, field: str, where: str) -> str:
    """The value of a required string field, as valid Unicode."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} must be a string, not {json_start(value)}")
    return valid(value)


def json_start(value: object) -> str:
    """The start of a value as JSON, for error messages."""
    try:
        return json.dumps(value, default=lambda item: f"<{type(item).__name__}>")[:60]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def names_of(record: Json) -> str:
    """The names of some fields, for error messages."""
    names = [repr(name[:40]) for name in record]
    return ", ".join(names[:12] + [f"and {len(names) - 12} more"] * (len(names) > 12)) or "none"
