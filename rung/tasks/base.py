"""What a task is, and how its problems are split and drawn.  Strings only: no model, no token, no tensor.

One distribution serves all splits: a problem belongs to the part that a hash of its *content* names, so that the parts
are disjoint whatever the order or the seed, and a generator of a billion problems is split as a list of twenty is.

    train       70 %  what the policy learns from
    validation  10 %  what hyper-parameters are chosen on
    held_out    20 %  what is reported
"""

import hashlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from rung.core.errors import RungError, TaskError
from rung.core.keys import GOLDEN, MASK, MIX_1, derive_key, mix64
from rung.core.words import Answer, Grade, Message, Problem

Split = Literal["train", "validation", "held_out"]
SPLITS: tuple[Split, ...] = ("train",) * 7 + ("validation",) + ("held_out",) * 2  # type: ignore[assignment]
HERE = Path(__file__).parent  # its frames say nothing about a task of the user's own
FEISTEL_ROUNDS = 4  # enough for a pseudo-random permutation  [Luby & Rackoff 1988]


@runtime_checkable
class Task(Protocol):
    """A finite, indexed set of problems (it may be astronomically large) and their verifier."""

    def __len__(self) -> int: ...

    def problem(self, index: int) -> Problem:
        """Problem number `index`, from 0; the same in every process and every run."""

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        """The environment's next turn; None ends the episode.

        messages: the conversation so far, from the problem to the answer that was just given
        """

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """One grade per answer."""


def problem_id(content: str) -> str:
    """The id of a problem of this content.  Problems that differ only in wording should share their content."""
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def split_of(problem: Problem) -> Split:
    """The part a problem belongs to: what its fact "split" says, else by a hash of its id."""
    named = problem.facts.get("split")
    if named is None:
        return SPLITS[derive_key("split", problem.id) % len(SPLITS)]
    for split in SPLITS:
        if split == named:
            return split
    raise TaskError(f"a problem's split must be train, validation or held_out, and is {named!r}")


def problem_at(task: Task, index: int) -> Problem:
    """Problem number `index`.  Raises TaskError, with the line of the task's file, where the task gives none."""
    name = type(task).__name__
    try:
        problem = task.problem(index)
    except RungError:
        raise
    except (Exception, SystemExit) as error:
        place = getattr(sys.modules.get(type(task).__module__), "__file__", None) or ""
        raise TaskError(f"problem {index} of the task {name} failed: {where(error, place)}") from error
    if not isinstance(problem, Problem):
        raise TaskError(f"problem {index} of the task {name} must be a Problem (rung.core.words), and is {problem!r}")
    return problem


def problems(task: Task, split: Split, count: int, seed: int = 0) -> list[Problem]:
    """`count` different problems of a split, in an order that the seed draws; fewer where the task has no more.

    Raises TaskError where the split is empty.
    """
    return _first(task, split, count, derive_key("problems", split, seed))


def draw(task: Task, count: int, *, seed: int, step: int, refill: int = 0) -> list[Problem]:
    """The training problems of a step: a function of these arguments alone, so that nothing need be saved for resume.

    They differ from each other, unless the task has fewer than `count`: then all are there, again and again.
    Raises TaskError where there is no training problem.
    """
    found = _first(task, "train", count, derive_key("train", seed, step, refill))
    return [found[i % len(found)] for i in range(count)]


def permuted(index: int, size: int, key: int) -> int:
    """Where a pseudo-random permutation of 0 ... size - 1, named by the key, puts `index`.

    A Feistel network over the next power of 4, walked until it falls inside  [Black & Rogaway 2002]; any size below
    2^128, and nothing is stored.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix64((key + right * GOLDEN + turn * MIX_1) & MASK) & mask)
        index = left << half | right
        if index < size:
            return index


def _first(task: Task, split: Split, count: int, key: int) -> list[Problem]:
    size = len(task)
    found: dict[str, Problem] = {}
    for index in range(size):
        if len(found) >= count:
            break
        problem = problem_at(task, permuted(index, size, key))
        if split_of(problem) == split:
            found.setdefault(problem.id, problem)
    if count and not found:
        raise TaskError(
            f"the task has no {split} problem among its {size}: 7 of 10 problems are for training, 1 for validation "
            f"and 2 held out, by a hash of their content, so that a task needs a few dozen problems (or name their "
            f'parts yourself, with a fact "split", which is a column of JSON lines)'
        )
    return list(found.values())


def where(error: BaseException, place: str) -> str:
    """An exception in one line, with the last line of the file `place` that it came through."""
    what = " ".join(traceback.format_exception_only(error)[-1].split())
    if isinstance(error, SyntaxError):
        return f"{what} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame for frame in frames if not frame.filename.startswith("<frozen") and Path(frame.filename).parent != HERE
    ]
    own = [frame for frame in theirs if Path(frame.filename).name == Path(place).name] or theirs
    return f"{what} ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})" if own else what
