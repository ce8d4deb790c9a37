"""Words on a command line into frozen dataclasses, and the help text out of them.

A field without a default is an argument (`MODEL`), every other field an option (`--max-tokens 16`); fields of nested
dataclasses and keys of mappings are reached with dots (`--optim.lr 1e-5`).  What an option means is read from the
docstring of its class, whose lines say `name: text`, or `one, other: text`.
"""

import difflib
import math
import re
import shutil
import textwrap
import types
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rung.core.errors import ConfigError

Path = tuple[str, ...]
Value = TypeVar("Value")

MAX_WIDTH = 100  # of help texts, in columns: longer lines are hard to read
FLAG_WIDTH = 34
TASK = "--task.options."  # a misspelt option of a task is none of the run's
KIND_NAMES = {int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One word that a person may type.

    path:     fields from the outermost dataclass inwards
    kind:     int, float, str or bool
    required: it is an argument, recognised by its place
    many:     an argument that takes all words that are left, an option that may be given again
    """

    path: Path
    kind: type
    default: Any = None
    choices: tuple[str, ...] = ()
    required: bool = False
    many: bool = False
    help: str = ""

    @property
    def flag(self) -> str:
        return "--" + ".".join(self.path).replace("_", "-")

    @property
    def negation(self) -> str:
        return "--" + ".".join((*self.path[:-1], "no_" + self.path[-1])).replace("_", "-")

    @property
    def placeholder(self) -> str:
        if self.required:
            return self.path[-1].upper() + ("..." if self.many else "")
        if self.choices:
            listed = all(choice in self.help for choice in self.choices)
            return "NAME" if listed else "|".join(self.choices)
        return {int: "INT", float: "FLOAT", str: "TEXT", bool: ""}[self.kind]


def options_of(cls: type, default: Any = None, *, path: Path = (), more: Sequence[Option] = ()) -> list[Option]:
    """Every option of a dataclass, depth first.

    default: an instance whose values become the defaults; else the class's own
    more:    options for keys of mappings, which may be set although the mapping lacks them
    """
    found: list[Option] = []
    hints, words = get_type_hints(cls), _field_help(cls)
    for item in fields(cls):
        here, hint = (*path, item.name), hints[item.name]
        value = getattr(default, item.name) if default is not None else _default(item)
        if is_dataclass(value):
            found += options_of(type(value), value, path=here, more=more)
        elif isinstance(value, Mapping):
            inside = [option for option in more if option.path[:-1] == here]
            kinds = {option.path: option.kind for option in inside}
            for key, setting in value.items():
                own = (*here, key)
                inside.append(Option(path=own, kind=kinds.get(own, type(setting)), default=setting))
            found += {option.path: option for option in inside}.values()
        else:
            required = value is MISSING
            text = words.get(item.name, "")
            found.append(
                Option(path=here, default=None if required else value, required=required, help=text, **_kind(hint))
            )
    return found


def parse(args: Sequence[str], options: Sequence[Option], *, command: str) -> dict[Path, Any]:
    """The value that each typed word gives to a path.  ConfigError names what was meant by an unknown word."""
    flags = {option.flag: (option, True) for option in options if not option.required}
    flags |= {option.negation: (option, False) for option in options if option.kind is bool}
    values: dict[Path, Any] = {}
    places = deque(option for option in options if option.required)
    words = deque(args)
    only_places = False
    while words:
        word = words.popleft()
        if word == "--" and not only_places:
            only_places = True
        elif word.startswith("--") and not only_places:
            name, equals, text = word.partition("=")
            if name not in flags:
                raise ConfigError(f"{command} has no option {name}. {_meant(name, flags, command)}")
            option, yes = flags[name]
            if option.kind is not bool:
                if not equals and (not words or words[0] in flags):
                    raise ConfigError(f"{name} needs {_needed(option)} after it.")
                text = text if equals else words.popleft()
            elif equals:
                raise ConfigError(f"{name} takes no value: write {option.flag} or {option.negation}.")
            value = yes if option.kind is bool else _convert(name, text, option)
            values[option.path] = (*values.get(option.path, ()), value) if option.many else value
        elif not places:
            raise ConfigError(f"{command} takes no further argument, got {word!r}. See `{command} --help`.")
        elif places[0].many:
            option = places[0]
            values[option.path] = (*values.get(option.path, ()), _convert(option.placeholder, word, option))
        else:
            option = places.popleft()
            values[option.path] = _convert(option.placeholder, word, option)
    missing = [option.placeholder for option in places if option.path not in values]
    if missing:
        raise ConfigError(f"{command} needs {' and '.join(missing)}. See `{command} --help`.")
    return values


def read(cls: type[Value], args: Sequence[str], *, command: str) -> Value:
    """An instance of a flat dataclass from the words of a command line."""
    return cls(**{path[-1]: value for path, value in parse(args, options_of(cls), command=command).items()})


def help_of(cls: type, command: str) -> str:
    """The help text of a flat dataclass."""
    return help_text(command, summary_of(cls), {"options": options_of(cls)})


def changed(default: Any, values: Mapping[Path, Any]) -> Any:
    """`default` with the values at these paths replaced, through nested dataclasses and mappings."""
    new: dict[str, Any] = {}
    for name in dict.fromkeys(path[0] for path in values):
        inside = {path[1:]: value for path, value in values.items() if path[0] == name}
        current = getattr(default, name)
        if () in inside:
            new[name] = inside[()]
        elif isinstance(current, Mapping):
            new[name] = {**current, **{path[0]: value for path, value in inside.items()}}
        else:
            new[name] = changed(current, inside)
    return replace(default, **new)


def help_text(command: str, summary: str, groups: Mapping[str, Sequence[Option]]) -> str:
    """Usage, summary, and a table of every option, as wide as the terminal (at most MAX_WIDTH columns)."""
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    places = [option for group in groups.values() for option in group if option.required]
    end = ["[options]"] if any(not option.required for group in groups.values() for option in group) else []
    usage = " ".join([f"usage: {command}", *(option.placeholder for option in places), *end])
    lines = [usage, "", *textwrap.wrap(summary, width)]
    for title, group in groups.items():
        arguments = [option for option in group if option.required]
        choices = [option for option in group if not option.required]
        for heading, part in (("arguments", arguments), (title, choices)):
            if part:
                lines += ["", *textwrap.wrap(heading + ":", width)]
                lines += [line for option in part for line in _row(option, width)]
    return "\n".join(lines)


def summary_of(cls: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def _row(option: Option, width: int) -> list[str]:
    """One option of a help text: what to type, what it means, what it is otherwise."""
    typed = option.placeholder if option.required else f"{option.flag} {option.placeholder}".rstrip()
    said = option.help
    if option.kind is bool:
        typed = option.negation.replace("no-", "[no-]") if option.default else option.flag
        said = f"{said} (default: yes)" if option.default else said
    elif option.default not in (None, "", ()):
        said = f"{said} (default: {option.default})"
    told = textwrap.wrap(said.strip(), max(width - FLAG_WIDTH, 20)) or [""]
    typed = "  " + typed
    first = [typed] if len(typed) >= FLAG_WIDTH else []
    told[0] = told[0] if first else f"{typed:<{FLAG_WIDTH}}{told[0]}"
    indented = [" " * FLAG_WIDTH + line for line in told]
    return [line.rstrip() for line in (first + indented if first else [told[0], *indented[1:]]) if line.strip()]


def _default(item) -> Any:
    if item.default_factory is not MISSING:
        return item.default_factory()
    return item.default


def _kind(hint: Any) -> dict[str, Any]:
    """Kind, choices and number of words that a type annotation stands for."""
    if get_origin(hint) is Literal:
        return {"kind": str, "choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"kind": get_args(hint)[0], "many": True}
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return {"kind": hint}


def _field_help(cls: type) -> dict[str, str]:
    """Field name -> what the docstring says after `name:`, continuation lines joined."""
    names = {item.name for item in fields(cls)}
    texts: dict[str, str] = {}
    current: list[str] = []
    for line in (cls.__doc__ or "").splitlines():
        match = re.match(r"\s*(\w+(?:, \w+)*):\s+(.*)", line)
        if match and set(match[1].split(", ")) <= names:
            current = match[1].split(", ")
            texts |= dict.fromkeys(current, match[2].strip())
        elif not line.strip():
            current = []
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in current}
    return texts


def _convert(name: str, text: str, option: Option) -> Any:
    """A word as the option's kind of value."""
    try:
        value = option.kind(text)
    except ValueError:
        raise ConfigError(f"{name} needs {_needed(option)}, got {text!r}.") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} needs a finite number, got {text!r}.")
    if option.choices and value not in option.choices:
        close = difflib.get_close_matches(text, option.choices, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{name} needs {_needed(option)}, got {text!r}.{hint}")
    return value


def _needed(option: Option) -> str:
    return f"one of {', '.join(option.choices)}" if option.choices else KIND_NAMES[option.kind]


def _meant(name: str, flags: Mapping[str, Any], command: str) -> str:
    """The nearest option: one whose last part was typed, else one spelt alike."""
    if name.startswith(TASK):
        flags = {flag: option for flag, option in flags.items() if flag.startswith(TASK)}
    alike = [flag for flag in flags if flag.endswith("." + name[2:])]
    alike = alike or difflib.get_close_matches(name, flags, n=1, cutoff=0.5)
    return f"Did you mean {alike[0]}?" if alike else f"`{command} --help` lists them."
