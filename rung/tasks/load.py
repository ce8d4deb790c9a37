"""A task by name: built in (`arithmetic`, `reasoning-gym:chain_sum`), importable (`package.module:name`), or in a file
(`file.py:name`).

The name is that of a Task class, of a function that returns a Task, or of a bare reward function beside a list:

    problems = [{"prompt": f"Spell {word} backwards.", "answer": word[::-1]} for word in ("cat", "house", ...)]

    def reward(problem, text):
        return text.strip() == problem.answer

`problems` is a list (or a function that returns one) of `Problem`s or of tables with a prompt; what a table has besides
prompt, answer and system becomes the problem's facts.  A reward is a number or a bool, or a `Grade`; an accuracy counts
the answers whose reward is 1.  Options become keyword arguments.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rung.core.config import decode
from rung.core.errors import ConfigError, RungError, TaskError, nearest
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks.base import Task, problem_at, problem_id, split_of, where

BUILT_IN: Mapping[str, str] = {
    "arithmetic": "rung.tasks.arithmetic:Arithmetic",
    "calculator": "rung.tasks.calculator:Calculator",
    "guess": "rung.tasks.guess:Guess",
    "maths": "rung.tasks.maths:Maths",
    "mixture": "rung.tasks.mixture:mixture",
    "rewards": "rung.tasks.rewards:Rewards",
    "steps": "rung.tasks.steps:Steps",
}
FAMILIES: Mapping[str, str] = {"reasoning-gym": "rung.tasks.reasoning"}  # a module whose `named` makes them by name
WITH_FILES = ("maths", "mixture", "rewards")  # their options name files: `absolute` and `files` in their modules
PACKAGES = {"maths": ("math-verify",), "reasoning-gym": ("reasoning-gym",)}  # that make a task's problems or grades
METHODS = ("__len__", "problem", "reply", "grade")


def load_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of a name, made with these options.

    Raises TaskError for a name that leads nowhere, a file that raises, an unknown option, an empty set of problems,
    or a first problem that cannot be had.
    """
    found, module, place = _find(name)
    _check_options(name, found, options)
    if name in BUILT_IN and is_dataclass(found):
        task = _run(name, place, lambda: _decoded(name, found, options))
    elif _is_reward(found):
        task = _run(name, place, lambda: _from_reward(module, found, name, options))
    else:
        task = _run(name, place, lambda: found(**options))
    if missing := [method for method in METHODS if not callable(getattr(task, method, None))]:
        raise TaskError(f"{name} must be a Task (__len__, problem, reply, grade), and has no {missing[0]}")
    if _run(name, place, lambda: len(task)) == 0:
        raise TaskError(f"the task {name} has no problems: it needs a few dozen, to learn from and to hold out")
    problem_at(task, 0)
    return task


def task_parameters(name: str) -> list[inspect.Parameter]:
    """What a task can be made with, as Python writes it.  Raises TaskError for a name that leads nowhere."""
    return _parameters(_find(name)[0])


def source_hash(name: str, options: Mapping[str, Any]) -> str:
    """Names what is in the user's own files behind a task; "" where there are none: the others change with Rung."""
    try:
        digests = [hashlib.blake2b(path.read_bytes(), digest_size=8) for path in files(name, options)]
    except OSError as error:
        raise TaskError(
            f"{error.filename}, which the task {name} is made of, cannot be read: {error.strerror}"
        ) from error
    if len(digests) > 1:
        return hashlib.blake2b(b"".join(digest.digest() for digest in digests), digest_size=8).hexdigest()
    return digests[0].hexdigest() if digests else ""


def files(name: str, options: Mapping[str, Any]) -> list[Path]:
    """The user's own files behind a task."""
    if _is_ours(name):
        return _module_of(name).files(options) if name in WITH_FILES else []
    path = source_file(name)
    return [path] if path else []


def packages(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The packages that a task's problems and grades depend on, beside Rung itself."""
    if name == "mixture":
        return _module_of(name).packages(options)
    return PACKAGES.get(name.partition(":")[0], ()) if _is_ours(name) else ()


def source_file(name: str) -> Path | None:
    """The file of the module that a name lies in."""
    path = inspect.getsourcefile(_find(name)[1])
    return Path(path) if path else None


def find_function(name: str) -> Callable[..., Any]:
    """What `file.py:name` or `module:name` stands for.  Raises TaskError."""
    return _find(name)[0]


def absolute(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the options with the full paths of files, so that they mean the same in another folder."""
    if name in WITH_FILES:
        return name, _module_of(name).absolute(options)
    return absolute_name(name), dict(options)


def absolute_name(name: str) -> str:
    """The name of a function or class with the full path of its file."""
    place, _, attribute = name.rpartition(":")
    return f"{Path(place).resolve()}:{attribute}" if place.endswith(".py") else name


def _is_ours(name: str) -> bool:
    return name in BUILT_IN or name.partition(":")[0] in FAMILIES


def _module_of(name: str) -> Any:
    return importlib.import_module(BUILT_IN[name].partition(":")[0])


@dataclass(frozen=True)
class RewardTask:
    """A list of problems and a function that rewards a text."""

    problems: tuple[Problem, ...]
    reward: Callable[[Problem, str], Any]

    def __len__(self) -> int:
        return len(self.problems)

    def problem(self, index: int) -> Problem:
        return self.problems[index]

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        return None

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [_grade(self.reward(answer.problem, answer.text)) for answer in answers]


def _grade(reward: Any) -> Grade:
    if isinstance(reward, Grade):
        return reward
    score = float(reward)
    if not math.isfinite(score):
        raise TaskError(f"a reward must be a finite number, and is {score}")
    return Grade(score=score, right=score == 1.0)


def _find(name: str) -> tuple[Callable[..., Any], ModuleType, str]:
    """What a name stands for, its module, and where that lies."""
    place, _, attribute = BUILT_IN.get(name, name).rpartition(":")
    if family := FAMILIES.get(place or name):
        members: Any = importlib.import_module(family)
        return members.named(attribute if place else ""), members, family
    if not place or not attribute:
        known = [*BUILT_IN, *(f"{family}:..." for family in FAMILIES)]
        raise TaskError(
            f"no task is called {name!r}. {nearest(name, known)} Your own is named `file.py:name` or `module:name`"
        )
    is_file = place.endswith(".py")
    module = _run(name, place, lambda: _load_file(Path(place)) if is_file else importlib.import_module(place))
    found = vars(module).get(attribute)
    if found is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TaskError(f"{place} has no {attribute!r}. {nearest(attribute, known) if known else 'It is empty.'}")
    if not callable(found):
        raise TaskError(f"{name} must be a Task class or a function, and is {type(found).__name__}")
    return found, module, place


def _decoded(name: str, cls: Any, options: Mapping[str, Any]) -> Task:
    try:
        return decode(cls, dict(options))
    except ConfigError as error:
        raise TaskError(f"the task {name}: {error}") from error


def _from_reward(module: ModuleType, reward: Callable[..., Any], name: str, options: Mapping[str, Any]) -> RewardTask:
    listed = vars(module).get("problems")
    if listed is None:
        raise TaskError(f"{name} is a reward function: its file needs a list `problems` beside it")
    rows = listed() if callable(listed) else listed
    task = RewardTask(tuple(_problem(row, name, i) for i, row in enumerate(rows)), partial(reward, **options))
    _refuse_contradictions(name, task.problems)
    return task


def _refuse_contradictions(name: str, problems: Sequence[Problem]) -> None:
    """A prompt listed in two parts would leak from one to the other; of two answers one would be lost."""
    seen: dict[str, tuple[int, Problem]] = {}
    for index, problem in enumerate(problems):
        first, other = seen.setdefault(problem.id, (index, problem))
        parts, answers = (split_of(other), split_of(problem)), (other.answer, problem.answer)
        for what, (old, new) in {"split": parts, "answer": answers}.items():
            if old != new:
                raise TaskError(
                    f"{name}: problems {first} and {index} are one prompt with two values of {what}, {old!r} and "
                    f"{new!r}: keep one of them ({problem.messages[-1].content[:80]!r})"
                )


def _problem(row: Any, name: str, index: int) -> Problem:
    if isinstance(row, Problem):
        return row
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
        raise TaskError(f"{name}: problem {index} must be a table with a prompt (a string), and is {row!r}")
    facts = {key: value for key, value in row.items() if key not in ("prompt", "answer", "system")}
    for key, value in facts.items():
        if not isinstance(value, str | int | float | bool):
            raise TaskError(f"{name}: problem {index} may hold strings and numbers, and its {key!r} is {value!r}")
    user, system, answer = Message("user", row["prompt"]), row.get("system"), row.get("answer")
    return Problem(
        id=problem_id(f"{system or ''}\n{row['prompt']}"),
        messages=(Message("system", str(system)), user) if system else (user,),
        answer=None if answer is None else str(answer),
        task=name,
        facts=facts,
    )


def _is_reward(found: Any) -> bool:
    return inspect.isfunction(found) and list(inspect.signature(found).parameters)[:2] == ["problem", "text"]


def _parameters(found: Any) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(found, eval_str=True)  # `from __future__ import annotations` leaves strings
    except Exception:  # an annotation that only a type checker understands
        signature = inspect.signature(found)
    return list(signature.parameters.values())[2 * _is_reward(found) :]


def _check_options(name: str, found: Any, options: Mapping[str, Any]) -> None:
    parameters = _parameters(found)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "It takes none."
            raise TaskError(f"the task {name} has no option {option!r}. {hint}")
    for p in parameters:
        if p.default is p.empty and p.name not in options and p.kind is not p.VAR_POSITIONAL:
            hint = ". A reward function begins with `(problem, text`" if inspect.isfunction(found) else ""
            raise TaskError(f"the task {name} needs the option {p.name!r}{hint}")


def _run(name: str, place: str, action: Callable[[], Any]) -> Any:
    """The user's code; what it raises becomes one line with the place in their file."""
    try:
        return action()
    except RungError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"the code of {name} failed: {where(error, place)}") from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TaskError(f"there is no file {path}, with a task or a reward")
    spec = importlib.util.spec_from_file_location(f"rung_task_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
