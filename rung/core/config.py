"""Frozen dataclasses <-> JSON and TOML.  Values only: a function is written `module:name` or `file.py:name`.

A written configuration carries `schema = 1` at its top.  Reading is strict: an unknown name, a wrong type, a missing
field and another schema are errors that name the dotted path of the field.  What is written reads back equal.
"""

import json
import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rung.core.errors import ConfigError, nearest

SCHEMA = 1
KEY = "schema"
_T = TypeVar("_T")


def to_dict(value: Any) -> dict[str, Any]:
    """A dataclass as nested dicts, lists, strings and numbers, with the schema."""
    return {KEY: SCHEMA, **encode(value)}


def from_dict(cls: type[_T], data: Mapping[str, Any]) -> _T:
    """The inverse of `to_dict`.  Raises ConfigError naming the dotted path of what cannot be read."""
    if KEY not in data:
        raise ConfigError(f"a configuration needs `{KEY} = {SCHEMA}` at its top, and has none: add that line")
    if data[KEY] != SCHEMA or isinstance(data[KEY], bool):
        raise ConfigError(
            f"this version of Rung reads {KEY} {SCHEMA}, and the configuration has {KEY} {data[KEY]!r}: "
            f"read it with the version that wrote it"
        )
    return decode(cls, {name: item for name, item in data.items() if name != KEY})


def dumps_json(value: Any) -> str:
    """`to_dict` as indented JSON, ending in a newline."""
    return json.dumps(to_dict(value), indent=2) + "\n"


def strict_json(content: bytes) -> Any:
    """JSON of UTF-8 text.  ValueError for a name that a table has twice, NaN, and what is nested too deep."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands in it twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=table, parse_constant=constant)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def load(path: str | Path, cls: type[_T]) -> _T:
    """Read a `.json` or `.toml` file.  Raises ConfigError naming the file."""
    path = Path(path)
    readers = {".json": strict_json, ".toml": lambda content: tomllib.loads(content.decode("utf-8"))}
    if path.suffix not in readers:
        raise ConfigError(f"{path}: a configuration file ends in .json or .toml, this one in {path.suffix!r}")
    try:
        data = readers[path.suffix](path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # both parsers' errors, and UnicodeDecodeError, are ValueErrors with a line number
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a table of names and values, and holds {_described(data)}")
    try:
        return from_dict(cls, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two configurations (or mappings): dotted path -> (value in a, value in b).

    A path that one side lacks has None there.

    >>> diff({"optim": {"lr": 1.0, "eps": 0.0}}, {"optim": {"lr": 2.0, "eps": 0.0}})
    {'optim.lr': (1.0, 2.0)}
    """
    left, right = _leaves(encode(a)), _leaves(encode(b))
    paths = [*left, *(path for path in right if path not in left)]
    return {path: (left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)}


def encode(value: Any, path: str = "") -> Any:
    """A value as nested dicts, lists, strings and numbers.  Raises ConfigError for what is not a value."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name), _join(path, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{path or 'a mapping'} must have strings as names, and has {strange[0]!r}")
        return {name: encode(item, _join(path, name)) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path or 'a value'} must be finite to be written down, and is {value}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{path or 'a value'} must be a value (number, string, list or table), and is {_described(value)}; "
        f"a function is written as its name, `module:name` or `file.py:name`"
    )


def decode(cls: Any, data: Any, path: str = "") -> Any:
    """A value of the type `cls` out of what `encode` made of it.  Raises ConfigError naming the path."""
    origin, args = get_origin(cls), get_args(cls)
    if is_dataclass(cls):
        return _decode_dataclass(cls, data, path)
    if origin is Literal:
        if data in args and type(data) in {type(choice) for choice in args}:
            return data
        hint = f" {nearest(data, map(str, args))}" if isinstance(data, str) else ""
        raise ConfigError(f"{path} must be one of {', '.join(map(repr, args))}, and is {data!r}.{hint}")
    if origin in (Union, types.UnionType):
        return _decode_union(args, data, path)
    if origin is tuple:
        items = _expect(list, data, path, "a list")
        kinds = args[:1] * len(items) if len(args) == 2 and args[1] is Ellipsis else args
        if len(kinds) != len(items):
            raise ConfigError(f"{path} must be a list of {len(kinds)} values, and has {len(items)}")
        return tuple(
            decode(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(kinds, items, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        return {
            name: decode(args[1], item, _join(path, name))
            for name, item in _expect(dict, data, path, "a table").items()
        }
    if cls is float and type(data) is int:
        data = float(data) if abs(data) < 2**1023 else data
    if cls in (bool, int, float, str, type(None)):
        return _expect(cls, data, path, _NAMES[cls])
    raise AssertionError(f"{path}: a configuration cannot have a field of type {cls}")


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    type(None): "nothing",
}


def _decode_dataclass(cls: Any, data: Any, path: str) -> Any:
    table = _expect(dict, data, path or cls.__name__, "a table")
    hints, known = _hints(cls), {f.name: f for f in fields(cls)}
    for name in table:
        if name not in known:
            raise ConfigError(
                f"{_join(path, name)} is unknown: {cls.__name__} has no such field. {nearest(name, known)}"
            )
    for name, f in known.items():
        if name not in table and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{_join(path, name)} is missing: {cls.__name__} needs it")
    values = {name: decode(hints[name], item, _join(path, name)) for name, item in table.items()}
    try:
        return cls(**values)
    except ConfigError as error:  # the class's own check of its values
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


def _decode_union(kinds: tuple[Any, ...], data: Any, path: str) -> Any:
    if type(data) in kinds and not isinstance(data, float):  # a bool is not read as an int, nor an int as a float
        return data
    others = [kind for kind in kinds if kind is not type(None)]
    errors = []
    for kind in others:
        try:
            return decode(kind, data, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    wanted = " or ".join(_NAMES.get(kind, str(kind)) for kind in kinds)
    raise ConfigError(f"{path} must be {wanted}, and is {_described(data)}")


def _expect(kind: Any, data: Any, path: str, name: str) -> Any:
    if type(data) is not kind or (kind is float and not math.isfinite(data)):
        raise ConfigError(f"{path} must be {name}, and is {_described(data)}")
    return data


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _leaves(data: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {path: data}
    leaves: dict[str, Any] = {}
    for name, item in data.items():
        leaves |= _leaves(item, _join(path, name))
    return leaves


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _described(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
