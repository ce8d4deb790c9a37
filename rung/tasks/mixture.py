"""Several tasks as one: each draw comes from a part with a chance in proportion to its weight.

A part is written as options with its name in front, so that all stay plain values:

    sums.task = "arithmetic"            sums.weight = 2        sums.digits = 1
    chains.task = "reasoning-gym:chain_sum"                    chains.max_terms = 3

The numbers of the mixture's problems are dealt out to the parts, in proportion to their weights and so many that each
part has all its problems among them, a small one again and again.  Which problem a number means is a function of the
number alone.  Splits are the parts' own, as a problem's id is: what is held out of a part is held out here.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

from rung.core.errors import TaskError
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks import load
from rung.tasks.base import Task, problem_at

LARGEST = 1 << 62  # len() must fit a machine word
OWN = ("task", "weight")
PART = "part"  # the fact; a part's own fact of this name is put aside as "part.part"
TASK = f"{PART}.task"  # the fact that keeps what the part calls its task


@dataclass(frozen=True)
class Part:
    """A task of the mixture, by its name there."""

    name: str
    task: Task
    weight: float


class Mixture:
    """Problems keep their ids, and carry the fact "part"; their `task` is the name of the part."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = {part.name: part for part in parts}
        total = sum(Fraction(part.weight) for part in parts)
        shares = [Fraction(part.weight) / total for part in parts]
        needed = max(len(part.task) / share for part, share in zip(parts, shares, strict=True))
        size = min(math.ceil(needed), LARGEST)
        self._ends = [math.floor(share * size) for share in accumulate(shares)]  # the last is `size`

    def __len__(self) -> int:
        return self._ends[-1]

    def problem(self, index: int) -> Problem:
        number = bisect_right(self._ends, index)
        part = list(self.parts.values())[number]
        start = self._ends[number - 1] if number else 0
        problem = problem_at(part.task, (index - start) % len(part.task))
        aside = {f"{PART}.{key}" if _is_part(key) else key: value for key, value in problem.facts.items()}
        return replace(problem, task=part.name, facts={**aside, PART: part.name, TASK: problem.task})

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        return self._of(problem).reply(_own(problem), messages)

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """Each by its own part, one at a time."""
        grades = []
        for answer in answers:
            grades += self._of(answer.problem).grade([replace(answer, problem=_own(answer.problem))])
        return grades

    def _of(self, problem: Problem) -> Task:
        return self.parts[str(problem.facts[PART])].task


def _own(problem: Problem) -> Problem:
    """The problem as its part knows it."""
    own = {key: value for key, value in problem.facts.items() if key not in (PART, TASK)}
    facts = {key.removeprefix(f"{PART}."): value for key, value in own.items()}
    return replace(problem, task=str(problem.facts[TASK]), facts=facts)


def _is_part(key: str) -> bool:
    return key == PART or key.startswith(f"{PART}.")


def parts_of(task: Task) -> list[Task]:
    """The tasks that a mixture is made of, mixtures in it included; any other task alone."""
    return [own for part in task.parts.values() for own in parts_of(part.task)] if isinstance(task, Mixture) else [task]


def mixture(**options: Any) -> Mixture:
    """Raises TaskError for a part without a task, or a weight that is none."""
    parts = []
    for name, own in _parts(options).items():
        weight = own.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise TaskError(f"{name}.weight must be a positive number, and is {weight!r}")
        rest = {key: value for key, value in own.items() if key not in OWN}
        try:
            parts.append(Part(name, load.load_task(own["task"], rest), float(weight)))
        except TaskError as error:
            raise TaskError(f"the part {name} of the mixture: {error}") from error
    return Mixture(parts)


def _parts(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Part -> its options, in the order in which they are written."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        name, dot, option = key.partition(".")
        if not dot or not name or not option:
            raise TaskError(
                f"an option of a mixture is written PART.OPTION (sums.task, sums.weight), and this is {key!r}"
            )
        found.setdefault(name, {})[option] = value
    for name, own in found.items():
        if not isinstance(own.get("task"), str):
            raise TaskError(
                f"the part {name} of a mixture needs {name}.task, the name of a task; it has {', '.join(own)}"
            )
    if len(found) < 2:
        raise TaskError(
            "a mixture needs at least two parts, written in a recipe as options of its task: sums.task, chains.task "
            "(docs/guide/your_task.md)"
        )
    return found


def absolute(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the full paths of files (`load.absolute`)."""
    found: dict[str, Any] = {}
    for name, own in _parts(options).items():
        rest = {key: value for key, value in own.items() if key not in OWN}
        task, rest = load.absolute(own["task"], rest)
        named = {"task": task, **{key: own[key] for key in OWN[1:] if key in own}, **rest}
        found |= {f"{name}.{key}": value for key, value in named.items()}
    return found


def files(options: Mapping[str, Any]) -> list[Path]:
    """The user's own files that the options name (`load.files`)."""
    found: list[Path] = []
    for own in _parts(options).values():
        found += load.files(own["task"], {key: value for key, value in own.items() if key not in OWN})
    return found


def packages(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The packages that the parts depend on (`load.packages`)."""
    found: list[str] = []
    for own in _parts(options).values():
        found += load.packages(own["task"], {key: value for key, value in own.items() if key not in OWN})
    return tuple(sorted(set(found)))
