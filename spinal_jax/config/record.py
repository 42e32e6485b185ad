"""What settings records are made of: help texts, and a strict `build` that turns a plain mapping into a record.

A setting stands once, as a field of a frozen record: name, type, default, and help with `about`. Field names are the
command line's override names: `metrics.contraction.window=[0.1,0.5]` sets `AuditConfig.metrics.contraction.window`.
Values are checked in `__post_init__`, so that a record that exists is valid.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any, Literal, NamedTuple, TypeVar, Union

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json, ReadJson

T = TypeVar("T")
FLOAT32 = (1.1754943508222875e-38, 3.4028234663852886e38)  # smallest and largest magnitude; others become 0 or inf
LARGEST = 2**63 - 1  # a whole number must fit 64 bits, as everything that takes one assumes


def about(help: str, unit: str = "") -> dict[str, str]:
    """The metadata of a field: what the setting means, and the unit of a number."""
    return {"help": help, "unit": unit}


def require(condition: bool, path: str, value: object, right: str) -> None:
    """UserError, unless `condition`: the setting `path` is `value`, and takes what `right` says."""
    if not condition:
        raise UserError(f"{path} is {_short(value)}; it takes {right}")


def _short(value: object) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"


def require_above(record: object, *names: str, or_null: bool = False) -> None:
    """UserError unless each of the named fields of a command's record is above 0, or None where `or_null`."""
    for name in names:
        value = getattr(record, name)
        good = or_null if value is None else value > 0
        require(good, name, value, "null or a number above 0" if or_null else "a number above 0")


class Setting(NamedTuple):
    """One setting of a record, as help shows it."""

    name: str  # dotted
    default: Any  # as plain values; REQUIRED where there is none
    help: str
    unit: str
    choices: tuple[Any, ...]  # of a Literal
    optional: bool  # it belongs to a part of the settings that is null by default


REQUIRED = "???"  # the default of a setting that must be given, as Hydra writes it


def settings_of(record: Any, prefix: str = "", optional: bool = False) -> Iterator[Setting]:
    """Every setting of a record, or of a record's class, with its default, in the order of the fields."""
    hints = typing.get_type_hints(record if isinstance(record, type) else type(record))
    for declared in fields(record):
        hint, default = hints[declared.name], _default(record, declared)
        name = f"{prefix}{_key(declared)}"
        if (inner := _record_of(hint)) is not None:
            absent = default is None
            yield from settings_of(inner if default in (None, MISSING) else default, f"{name}.", optional or absent)
            continue
        shown = REQUIRED if default is MISSING else _plain(default)
        text, unit = declared.metadata.get("help", ""), declared.metadata.get("unit", "")
        yield Setting(name, shown, text, unit, _choices(hint), optional)


def defaults_of(record: Any) -> Json:
    """The defaults of a record, or of a record's class, as plain nested values."""
    hints = typing.get_type_hints(record if isinstance(record, type) else type(record))
    found: Json = {}
    for declared in fields(record):
        default, inner = _default(record, declared), _record_of(hints[declared.name])
        if inner is not None and default is not None:
            found[_key(declared)] = defaults_of(inner if default is MISSING else default)
        else:
            found[_key(declared)] = REQUIRED if default is MISSING else _plain(default)
    return found


def optional_parts(record: type) -> dict[str, type]:
    """The parts of a record that are null by default, by name, with their classes."""
    hints = typing.get_type_hints(record)
    inner = {
        _key(declared): _record_of(hints[declared.name]) for declared in fields(record) if declared.default is None
    }
    return {name: kind for name, kind in inner.items() if kind is not None}


def _default(record: Any, declared: Field[Any]) -> Any:
    """The default of a field, or its value where `record` is an instance; MISSING where it must be given."""
    if not isinstance(record, type):
        return getattr(record, declared.name)
    if declared.default is not MISSING:
        return declared.default
    return MISSING if declared.default_factory is MISSING else declared.default_factory()


def _record_of(hint: Any) -> type | None:
    """The record's class in an annotation `Record` or `Record | None`."""
    return next((kind for kind in (hint, *typing.get_args(hint)) if is_dataclass(kind)), None)  # type: ignore[return-value]


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of `Literal[...]` or of `Literal[...] | None`."""
    kinds = (hint, *typing.get_args(hint))
    return next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal), ())


def to_mapping(config: Any) -> Json:
    """The record as plain nested dictionaries and lists, as it goes into manifest.json."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.removesuffix("_"): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def build(record: type[T], values: ReadJson, path: str = "") -> T:
    """A `record` from nested mappings. UserError names the dotted path of an unknown, missing or mistyped key."""
    hints = typing.get_type_hints(record)
    known = {_key(declared): declared for declared in fields(record)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(
                f"there is no setting {_join(path, key)}; there are {', '.join(_join(path, k) for k in known)}"
            )
    chosen = {}
    for name, declared in known.items():
        if name in values:
            chosen[declared.name] = _value(hints[declared.name], values[name], _join(path, name))
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise UserError(f"{_join(path, name)} is missing; give {_join(path, name)}=...")
    return record(**chosen)


def merged(given: Json, asked: Mapping[str, object], path: str = "") -> Json:
    """`given` with what was `asked` by keyword, at any depth; None asks for nothing. UserError if the two disagree."""
    for name, value in asked.items():
        where = f"{path}{name}"
        if isinstance(value, Mapping) and isinstance(given.get(name, {}), Mapping):
            given[name] = merged(dict(given.get(name, {})), value, f"{where}.")
        elif value is None:
            continue
        elif name not in given:
            given[name] = value
        elif given[name] != value:
            raise UserError(f"settings has {where}={given[name]!r}, but {value!r} is given too; give one of them")
    return given


def _key(declared: Field[Any]) -> str:
    """What users call a field: one that is a keyword of Python, such as assert, ends with an underscore here."""
    return declared.name.removesuffix("_")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _value(hint: Any, value: Any, path: str) -> Any:
    """`value` as what the annotation says, or UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        listed = isinstance(value, (list, tuple))
        return _value(
            next((kind for kind in kinds if (typing.get_origin(kind) is tuple) == listed), kinds[0]), value, path
        )
    if is_dataclass(hint):
        require(isinstance(value, Mapping), path, value, f"settings such as {path}.{_key(fields(hint)[0])}")
        return build(typing.cast(type, hint), value, path)
    if origin is Literal:
        known = any(type(value) is type(choice) and value == choice for choice in arguments)
        require(known, path, value, " or ".join(map(str, arguments)))
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), path, value, "a list")
        if arguments[-1] is Ellipsis:
            return tuple(_value(arguments[0], item, path) for item in value)
        require(len(value) == len(arguments), path, value, f"a list of {len(arguments)}")
        return tuple(_value(kind, item, path) for kind, item in zip(arguments, value, strict=True))
    if isinstance(value, int) and not isinstance(value, bool):
        require(-LARGEST <= value <= LARGEST, path, value, "a number that 64 bits can hold")
        if hint is float:
            return float(value)
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    require(isinstance(value, hint) and not (hint is int and isinstance(value, bool)), path, value, names[hint])
    if isinstance(value, float):
        require(value == value and abs(value) != float("inf"), path, value, "a finite number")
        least, most = FLOAT32
        require(value == 0 or least <= abs(value) <= most, path, value, f"0 or a number from {least:.2g} to {most:.2g}")
    if isinstance(value, str):
        good = "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
        require(good, path, value, "a text without null characters and lone surrogates")
    return value
