"""The files that a run leaves: JSON documents with a schema, a table and arrays beside them, each written whole."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from spinal_jax.errors import UserError

T = TypeVar("T")
SCRATCH = ".writing-"  # begins the name of a folder in which a run's files wait until all are written
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # name of a file that is being written


class Document:
    """What a document is written from: an attribute for each of its sections, of which these are always there."""

    columns: Mapping[str, np.ndarray]
    summary: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def boundaries(self) -> int:
        """D + 1."""
        return len(next(iter(self.columns.values())))

    @property
    def depth(self) -> int:
        """D, the number of decoder blocks."""
        return self.boundaries - 1

    @property
    def terminal(self) -> tuple[int, int]:
        """First and last boundary of the terminal block, both included."""
        first, last = self.summary["terminal"]
        return int(first), int(last)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column by name, [D + 1]. UserError names the columns where there is none of that name."""
        if name not in self.columns:
            raise UserError(f"there is no column {name!r}; there are {', '.join(self.columns)}")
        return self.columns[name]

    def _ipython_key_completions_(self) -> list[str]:
        """What a notebook offers after `trace["`."""
        return list(self.columns)

    def table(self) -> dict[str, np.ndarray]:
        """One row per boundary: boundary, relative_depth (l / D) and every column. What `to_pandas` and `to_polars` are
        made from, and any library that takes a mapping of arrays."""
        boundary = np.arange(self.boundaries)
        return {"boundary": boundary, "relative_depth": boundary / self.depth, **self.columns}

    def to_pandas(self) -> Any:
        """`table` as a pandas.DataFrame. UserError without pandas."""
        return _library("pandas").DataFrame(self.table())

    def to_polars(self) -> Any:
        """`table` as a polars.DataFrame; NaN stays NaN. UserError without polars."""
        return _library("polars").DataFrame(self.table())

    def plot(self, kind: str | None = None) -> Any:
        """One of the figures of this record's page, as a matplotlib figure.

        Args:
          kind: its name; None: the first. UserError names all of them where there is none of that name.
        """
        # Pages stand above records and import them, so they are found by name when one is asked for.
        return import_module("spinal_jax.report.notebook").plot(self, kind)


def write_whole(path: Path, data: bytes) -> None:
    """Writes the file under a temporary name, then renames it, so that nobody ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"to_{name} needs {name}: pip install {name}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Locks a folder for this process alone, through the kernel: the lock ends with the process, however that ends.

    Yields:
      Whether it is locked; False on a file system without locks on folders.

    Raises:
      UserError: another process holds the folder, or has just moved it away.
    """
    taken = UserError(f"{folder} is in use by another run; wait until it has ended or choose another")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise taken from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EBADF, errno.EINVAL):
                raise
            yield False
            return
        if not (folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())):
            raise taken
        yield True
    finally:
        os.close(descriptor)


def first_difference(one: object, other: object, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two documents differ: its dotted name, and what it holds in each. None where they agree."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other)
        found = (first_difference(one.get(key), other.get(key), f"{name}.{key}".removeprefix(".")) for key in keys)
        return next(filter(None, found), None)
    return None if one == other else (name, one, other)


@contextlib.contextmanager
def malformed(what: object) -> Iterator[None]:
    """What is found to be wrong with the content of a saved file inside the block becomes a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{what} is malformed: it has no {error.args[0]}") from error
    except MALFORMED as error:
        raise UserError(f"{what} is malformed: {error or type(error).__name__}") from error


# What reading values of another type, size or shape than was written raises.
MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, AssertionError)


def load_json(text: str | bytes, what: object) -> Any:
    """The value of a JSON text. UserError, which names `what` it is, where it is none or is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON: {error or 'nested too deeply'}") from error


def read_text(file: Path) -> str:
    """The text of a saved file. UserError where it is no regular file, such as a FIFO, which may have no end, or cannot
    be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file} is not a regular file")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def load_json_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, one a line; a last line without an end is half-written and left out. UserError where
    the log cannot be read, or another line is no object."""
    found = []
    for number, line in enumerate(read_text(file).splitlines(keepends=True), 1):
        if line.endswith("\n"):
            found.append(load_json(line, f"{file}, line {number}"))
            if not isinstance(found[-1], dict):
                raise UserError(f"{file}, line {number} is not a JSON object")
    return found


def load_json_file(file: Path) -> dict[str, Any]:
    """The JSON object of a file. UserError where it cannot be read or is none."""
    found = load_json(read_text(file), file)
    if not isinstance(found, dict):
        raise UserError(f"{file} is not a JSON object")
    return found


def load_record(path: Path, name: str, arrays: str, parse: Callable[[str, Mapping[str, np.ndarray]], T]) -> T:
    """The record of a run folder, or of a NAME.json; its arrays come from the file `arrays` beside it, if there.

    Raises:
      UserError: nothing there, or a file that cannot be read or parsed.
    """
    file = path / f"{name}.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no {name} at {path}: give a run folder that holds {name}.json, or the path of a {name}.json")
    beside = file.with_name(arrays)
    text = read_text(file)
    try:
        with malformed("its content"):
            return parse(text, load(beside.read_bytes()) if beside.is_file() else {})
    except SafetensorError as error:
        raise UserError(f"{beside} cannot be read: {error}") from error
    except OSError as error:
        raise UserError(f"{beside} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def save_record(
    folder: Path,
    name: str,
    text: str,
    rows: Sequence[Mapping[str, Any]],
    beside: str,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes the file `beside` (when there are arrays), NAME.csv and, last, NAME.json; each appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    if arrays:
        # safetensors writes the buffer as it lies in memory, so a strided view would come back scrambled.
        write_whole(folder / beside, save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))
    else:
        (folder / beside).unlink(missing_ok=True)
    write_whole(folder / f"{name}.csv", table(rows).encode())
    write_whole(folder / f"{name}.json", text.encode())


def writable(text: str) -> str:
    """The text without what is no Unicode: bytes of a file's name that are no UTF-8 become \\udc80 to \\udcff."""
    return text.encode(errors="backslashreplace").decode()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV; NaN is an empty field."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return writable(out.getvalue())


def document(schema: str, sections: Mapping[str, tuple[str, ...]], record: Document) -> str:
    """The text of a document: equal records give equal bytes; NaN is null.

    Args:
      sections: by the name of an attribute the keys that come first in it, in order; further keys follow, sorted.
    """
    content: dict[str, Any] = {"schema": schema}
    for name, keys in sections.items():
        if name == "columns":
            content["boundaries"] = record.boundaries
        section = getattr(record, name)
        content[name] = {key: plain(section[key]) for key in (*keys, *sorted(set(section) - set(keys)))}
    content["warnings"] = list(record.warnings)
    lines = ",\n".join(f"  {json.dumps(key)}: {_two_levels(value)}" for key, value in content.items())
    return "{\n" + lines + "\n}\n"


@contextlib.contextmanager
def read(text: str, what: str, schema: str, superseded: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The content of a document; what is found to be wrong with it inside the block becomes a UserError too.

    Args:
      superseded: by older schema, why this version does not read it and what to do.
    """
    content = load_json(text, f"the {what}")
    said = content.get("schema") if isinstance(content, dict) else None
    if isinstance(said, str) and said in (superseded or {}):
        raise UserError(f"the {what} says schema {said!r}: {(superseded or {})[said]}")
    if said != schema:
        raise UserError(f"the {what} says schema {said!r}; this version of spinal_jax reads {schema!r}")
    with malformed(f"the {what}"):
        yield content


def check_boundaries(content: Mapping[str, Any], boundaries: int) -> None:
    """ValueError unless a document says as many boundaries as its columns have."""
    if (said := content.get("boundaries")) != boundaries:
        raise ValueError(f"it says {said} boundaries, its columns have {boundaries}")


def plain(value: object) -> Any:
    """`value` as JSON can hold it: NaN -> None, arrays and tuples -> lists, mappings by sorted key."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def undefined(value: object) -> Any:
    """JSON's null is NaN again."""
    if isinstance(value, dict):
        return {key: undefined(item) for key, item in value.items()}
    if isinstance(value, list):
        return [undefined(item) for item in value]
    return math.nan if value is None else value


def floats(name: str, values: Any) -> np.ndarray:
    known = isinstance(values, list) and all(type(value) in (float, int, type(None)) for value in values)
    if not known:
        raise ValueError(f"column {name} is not a list of numbers and nulls")
    found = np.array([math.nan if value is None else value for value in values], np.float64)
    if np.isinf(found).any():
        raise ValueError(f"column {name} holds infinity")
    return found


def _two_levels(value: object) -> str:
    """JSON with one line per key of a section, so that a trace diffs well and a column stays on its line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items())
    return "{\n" + lines + "\n  }"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
