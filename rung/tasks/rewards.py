"""Questions out of JSON lines, rewarded by functions of your own, with trl's signature or with Rung's.

    def f(prompts, completions, **columns) -> list[float | None]       trl's, unchanged
    def g(problem, text) -> float | bool | Grade                       Rung's

`rewards` names them, each with a weight or without: "r.py:f, r.py:g=0.5".  The reward is the weighted sum; what each
gave is kept in the grade's parts.  As in trl, None means that a function does not apply to an answer: it is left out of
the sum, and the grade is unknown where none applies.  A `Grade` that is unknown makes the whole one unknown.

An accuracy counts the answers to which the function that is named *first* gave exactly 1.

A function of trl's is called with one answer at a time: prompts, completions and every column are lists of length one,
texts, or lists of messages where the data has those.  It may ask for `log_metric` (recorded among the parts) and
`log_extra` (which does nothing); `completion_ids`, `trainer_state` and `environments` it cannot have: a task speaks
strings, and knows of no trainer.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rung.core.errors import TaskError, nearest
from rung.core.words import Answer, Grade, Message, Problem, unknown
from rung.tasks.extract import LONGEST_TEXT
from rung.tasks.jsonl import Columns, Row, problem_of, read
from rung.tasks.load import absolute_name, find_function, source_file

NOT_HERE = ("completion_ids", "trainer_state", "environments")
NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # as in trl


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A function, its weight, and what its part of a grade is called."""

    name: str
    function: Callable[..., Any]
    weight: float
    part: str


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """A file of JSON lines and the functions that reward answers.

    data:     its path
    rewards:  functions, `file.py:name` or `module:name`, with =WEIGHT where it is not 1; more after commas
    question, answer: names of columns; "" takes the usual ones (question, prompt or messages; answer or solution)
    system:   a system message, "" for none
    drop_duplicates: keep the first of questions that are there twice; else they are refused
    """

    data: str = ""
    rewards: str = ""
    question: str = ""
    answer: str = ""
    system: str = ""
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise TaskError(
                "the task rewards needs `data`, a file of JSON lines (on the command line: --data FILE.jsonl)"
            )
        assert self._rows
        for reward in self._functions:
            _check(reward, self._rows[0])

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        columns = Columns(
            question=self.question,
            answer=self.answer,
            system=self.system,
            needs_answer=False,
            drop_duplicates=self.drop_duplicates,
        )
        return read(self.data, columns)

    @cached_property
    def _functions(self) -> tuple[Reward, ...]:
        named = spelt(self.rewards)
        parts = [name.rpartition(":")[2] for name, _ in named]
        return tuple(
            Reward(
                name=name,
                function=find_function(name),
                weight=weight,
                part=part if parts.count(part) == 1 else f"{part}_{number}",
            )
            for number, ((name, weight), part) in enumerate(zip(named, parts, strict=True), 1)
        )

    def __len__(self) -> int:
        return len(self._rows)

    def problem(self, index: int) -> Problem:
        return problem_of(self._rows[index], "rewards", index=index)

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        return None

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [self._grade(answer) for answer in answers]

    def _grade(self, answer: Answer) -> Grade:
        if len(answer.text) > LONGEST_TEXT or any("\ud800" <= character <= "\udfff" for character in answer.text):
            return Grade(score=0.0, parts={"allowed": 0.0})
        row = self._rows[int(answer.problem.facts["index"])]
        parts: dict[str, float] = {}
        applied: list[tuple[Reward, float]] = []
        for reward in self._functions:
            given = _call(reward, row, answer, parts)
            if isinstance(given, Grade):
                if given.score is None:
                    return unknown(f"{reward.name}: {given.error}")
                given = given.score
            if given is not None:
                parts[reward.part] = given
                applied.append((reward, given))
        if not applied:
            return unknown("every reward function returned None: none applies to this answer")
        score = sum(reward.weight * given for reward, given in applied)
        first = parts.get(self._functions[0].part)
        return Grade(score=score, right=first == 1.0, parts=parts)


def spelt(rewards: str) -> list[tuple[str, float]]:
    """Names and weights out of "r.py:f, r.py:g=0.5".  Raises TaskError."""
    found = []
    for item in filter(None, (item.strip() for item in rewards.split(","))):
        name, equals, weight = item.rpartition("=")
        try:
            found.append((name.strip(), float(weight)) if equals else (item, 1.0))
        except ValueError:
            raise TaskError(f"a reward is written FILE.py:NAME or FILE.py:NAME=WEIGHT, and this is {item!r}") from None
        if not math.isfinite(found[-1][1]):
            raise TaskError(f"a weight must be a finite number, and that of {found[-1][0]} is {weight}")
    for name, _ in found:
        if ":" not in name:
            raise TaskError(f"a reward names a file and a function in it, FILE.py:NAME, and this is {name!r}")
    if not found:
        raise TaskError("the task rewards needs a function in `rewards`: FILE.py:NAME")
    if len({name for name, _ in found}) < len(found):
        raise TaskError(f"a reward function is named twice in {rewards!r}: add the weights up")
    return found


def _is_trl(function: Callable[..., Any]) -> bool:
    return list(inspect.signature(function).parameters)[:2] != ["problem", "text"]


def _check(reward: Reward, row: Row) -> None:
    """Refuse a function that asks for what is not there, before a run begins."""
    if not _is_trl(reward.function):
        return
    known = {"prompts", "completions", "log_extra", "log_metric", *row.table} - set(NOT_COLUMNS)
    for parameter in inspect.signature(reward.function).parameters.values():
        if (
            parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            or parameter.default is not parameter.empty
        ):
            continue
        if parameter.name in NOT_HERE:
            raise TaskError(
                f"{reward.name} asks for {parameter.name!r}, which Rung does not hand to a reward function: it sees "
                "texts and columns, no tokens and no trainer. Take it out of the function, or give it a default"
            )
        if parameter.name not in known:
            raise TaskError(
                f"{reward.name} asks for {parameter.name!r}, and the data has no such column. "
                f"{nearest(parameter.name, row.table)} "
                "A reward function takes (prompts, completions, **columns) as in trl, or (problem, text)"
            )


def _call(reward: Reward, row: Row, answer: Answer, parts: dict[str, float]) -> Any:
    """What a function gives one answer: a number, None, or a Grade.  Raises TaskError for anything else."""
    if not _is_trl(reward.function):
        given = reward.function(answer.problem, answer.text)
        return given if isinstance(given, Grade) else _number(given, reward.name)
    chat = not isinstance(row.asked, str)
    columns = {name: [value] for name, value in row.table.items() if name not in NOT_COLUMNS}
    found: dict[str, Any] = {
        **columns,
        "prompts": [row.asked],
        "completions": [[{"role": "assistant", "content": answer.text}] if chat else answer.text],
        "log_metric": lambda name, value: parts.__setitem__(str(name), _number(value, str(name))),
        "log_extra": lambda *_: None,
    }
    wanted = inspect.signature(reward.function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values()):
        found = {name: value for name, value in found.items() if name in wanted}
    given = reward.function(**found)
    if inspect.isawaitable(given):
        given = asyncio.run(_awaited(given))
    try:
        (one,) = given
    except (TypeError, ValueError) as error:
        raise TaskError(
            f"{reward.name} must return a list with one reward per completion, and for one it returned {given!r:.80}"
        ) from error
    return None if one is None else _number(one, reward.name)


async def _awaited(given: Any) -> Any:
    return await given


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TaskError(f"a reward must be a number, and that of {name} is {value!r:.80}") from None
    if not math.isfinite(number):
        raise TaskError(f"a reward must be a finite number, and that of {name} is {number}")
    return number


def absolute(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the full paths of files (`load.absolute`)."""
    found = dict(options)
    if options.get("data"):
        found["data"] = str(Path(options["data"]).resolve())
    if "rewards" in options:
        named = [(absolute_name(name), weight) for name, weight in spelt(options["rewards"])]
        found["rewards"] = ", ".join(name if weight == 1.0 else f"{name}={weight!r}" for name, weight in named)
    return found


def files(options: Mapping[str, Any]) -> list[Path]:
    """The user's own files that the options name (`load.files`)."""
    sources = [source_file(name) for name, _ in spelt(options["rewards"])]
    return [Path(options["data"]), *dict.fromkeys(path for path in sources if path)]
