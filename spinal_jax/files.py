"""Files of a run: JSON documents with a schema, tables and arrays, written atomically."""

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

from spinal_jax import plotting
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json, ReadJson

T = TypeVar("T")
LARGEST = 1e100  # magnitude of a number in a saved result; figures overflow well above
SCRATCH = ".writing-"  # prefix of the folder for files of an incomplete run
TEMPORARY = re.compile(r"\..+\.(jsonl?|csv|parquet|safetensors|html|md|png|svg)\.\d+\.tmp")  # of `write_whole`


class Document:
    """Base of records that are saved as JSON documents, with an attribute for each section."""

    columns: Mapping[str, np.ndarray]
    summary: ReadJson
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
        """A column by name, [D + 1]. Raises UserError, with the known names, for another name."""
        if name not in self.columns:
            raise UserError(f"there is no column {name!r}; there are {', '.join(self.columns)}")
        return self.columns[name]

    def _ipython_key_completions_(self) -> list[str]:
        """What a notebook offers after `trace["`."""
        return list(self.columns)

    def table(self) -> dict[str, np.ndarray]:
        """A mapping of arrays with one row per boundary: boundary, relative_depth (l / D) and all columns."""
        boundary = np.arange(self.boundaries)
        return {"boundary": boundary, "relative_depth": boundary / self.depth, **self.columns}

    def to_pandas(self) -> Any:
        """`table` as a pandas.DataFrame. Raises UserError without pandas."""
        return _library("pandas").DataFrame(self.table())

    def to_polars(self) -> Any:
        """`table` as a polars.DataFrame; NaN stays NaN. Raises UserError without polars."""
        return _library("polars").DataFrame(self.table())

    def plot(self, kind: str | None = None) -> Any:
        """A figure of the page of this record, as a matplotlib figure.

        Args:
          kind: name of the figure; None is the first. Raises UserError, with the known names, for another name.
        """
        return plotting.draw(self, kind)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file atomically: under a temporary name that is then renamed."""
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
    """Locks a folder with a kernel lock, which ends with the process.

    Yields:
      Whether it is locked; False on a file system without locks on folders.

    Raises:
      UserError: another process holds or has moved the folder.
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


def first_difference(one: object, other: object, name: str = "") -> tuple[str, object, object] | None:
    """The first difference of two documents: dotted name and both values. None if they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other)
        found = (first_difference(one.get(key), other.get(key), f"{name}.{key}".removeprefix(".")) for key in keys)
        return next(filter(None, found), None)
    return None if one == other else (name, one, other)


@contextlib.contextmanager
def malformed(what: object) -> Iterator[None]:
    """Converts errors from invalid content of a saved file into a UserError with its name."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{what} is malformed: it has no {error.args[0]}") from error
    except MALFORMED as error:
        raise UserError(f"{what} is malformed: {error or type(error).__name__}") from error


# Errors of reading values of an unexpected type, size or shape.
MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, AssertionError)


def load_json(text: str | bytes, what: object, finite: bool = False) -> Any:
    """Parses a JSON text. Whole numbers of more than 64 bits become floats.

    Args:
      text: the JSON text.
      what: its name in error messages.
      finite: whether numbers beyond LARGEST, infinite ones included, are refused.

    Raises:
      UserError: the text is invalid or nested too deeply.
    """
    real = _finite if finite else float

    def whole(digits: str) -> int | float:
        value = int(digits) if len(digits) <= 20 else 1 << 63
        return value if abs(value) < 1 << 63 else real(digits)

    try:
        return json.loads(text, parse_float=real, parse_constant=real, parse_int=whole)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON: {error or 'nested too deeply'}") from error


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) > LARGEST:
        raise ValueError(f"it holds {text[:40]}, which is beyond any measurement")
    return value


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


def load_json_lines(file: Path) -> list[Json]:
    """The JSON objects of a log, one a line; a last line without an end is half-written and left out. UserError where
    the log cannot be read, or another line is no object."""
    records = []
    for number, line in enumerate(read_text(file).splitlines(keepends=True), 1):
        if line.endswith("\n"):
            records.append(load_json(line, f"{file}, line {number}"))
            if not isinstance(records[-1], dict):
                raise UserError(f"{file}, line {number} is not a JSON object")
    return records


def load_json_file(file: Path, finite: bool = False) -> Json:
    """The JSON object of a file. UserError where it cannot be read or is none; `finite` as for `load_json`."""
    content = load_json(read_text(file), file, finite)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object")
    return content


def load_record(path: Path, name: str, arrays: str, parse: Callable[[str, Mapping[str, np.ndarray]], T]) -> T:
    """Loads the record of a run folder or of a NAME.json, with its file of arrays if it exists.

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
    rows: Sequence[ReadJson],
    beside: str,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes the arrays to the file `beside` (if any), NAME.csv and, last, NAME.json, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    if arrays:
        # safetensors writes the raw buffer, so arrays must be contiguous.
        write_whole(folder / beside, save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))
    else:
        (folder / beside).unlink(missing_ok=True)
    write_whole(folder / f"{name}.csv", table(rows).encode())
    write_whole(folder / f"{name}.json", text.encode())


def writable(text: str) -> str:
    """The text without what is no Unicode: bytes of a file's name that are no UTF-8 become \\udc80 to \\udcff."""
    return text.encode(errors="backslashreplace").decode()


def table(rows: Sequence[ReadJson]) -> str:
    """Rows as CSV; NaN is an empty field."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return writable(out.getvalue())


def document(schema: str, sections: Mapping[str, tuple[str, ...]], record: Document) -> str:
    """The deterministic text of a document; NaN is null.

    Args:
      sections: for each attribute its first keys in order; other keys follow, sorted.
    """
    content: Json = {"schema": schema}
    for name, keys in sections.items():
        if name == "columns":
            content["boundaries"] = record.boundaries
        section = getattr(record, name)
        content[name] = {key: plain(section[key]) for key in (*keys, *sorted(set(section) - set(keys)))}
    content["warnings"] = list(record.warnings)
    lines = ",\n".join(f"  {json.dumps(key)}: {_two_levels(value)}" for key, value in content.items())
    return "{\n" + lines + "\n}\n"


@contextlib.contextmanager
def read(text: str, what: str, schema: str, superseded: Mapping[str, str] | None = None) -> Iterator[Json]:
    """Reads a document; errors from its content inside the block become a UserError.

    Args:
      superseded: older schema -> reason why it is not supported, and a remedy.
    """
    content = load_json(text, f"the {what}", finite=True)
    said = content.get("schema") if isinstance(content, dict) else None
    if isinstance(said, str) and said in (superseded or {}):
        raise UserError(f"the {what} says schema {said!r}: {(superseded or {})[said]}")
    if said != schema:
        raise UserError(f"the {what} says schema {said!r}; this version of spinal_jax reads {schema!r}")
    with malformed(f"the {what}"):
        yield content


def check_boundaries(content: ReadJson, boundaries: int) -> None:
    """Raises ValueError unless the number of boundaries matches the columns."""
    if (said := content.get("boundaries")) != boundaries:
        raise ValueError(f"it says {said} boundaries, its columns have {boundaries}")


def plain(value: object) -> Any:
    """`value` for JSON: NaN as None, arrays and tuples as lists, mappings with sorted keys."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def undefined(value: object) -> Any:
    """Replaces null by NaN."""
    if isinstance(value, dict):
        return {key: undefined(item) for key, item in value.items()}
    if isinstance(value, list):
        return [undefined(item) for item in value]
    return math.nan if value is None else value


def floats(name: str, values: object) -> np.ndarray:
    if not isinstance(values, list) or not all(type(value) in (float, int, type(None)) for value in values):
        raise ValueError(f"column {name} is not a list of numbers and nulls")
    column = np.array([math.nan if value is None else value for value in values], np.float64)
    if np.isinf(column).any():
        raise ValueError(f"column {name} holds infinity")
    return column


def _two_levels(value: object) -> str:
    """JSON with one line for each key of a section, for readable diffs."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items())
    return "{\n" + lines + "\n  }"


def flat(values: ReadJson, prefix: str = "") -> Json:
    """Flattens nested mappings to dotted names."""
    entries: Json = {}
    for key, value in values.items():
        entries |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return entries
