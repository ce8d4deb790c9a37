"""Long sums with visible working: every running total is written down, then the answer.

    What is 7 + 12 + 30?        7 + 12 = 19
                                19 + 30 = 49
                                Answer: 49

An answer is right when all running totals stand in it, each in an equation that is true and in their order, what
follows the last "Answer:" is the sum, and the text ended by itself.  The working is judged, not only its end: a sum
that was guessed is wrong.  Examples of the form, with sums of their own, stand before every question as turns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rung.core.errors import TaskError
from rung.core.keys import derive_key
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks.arithmetic import last_number
from rung.tasks.base import problem_id
from rung.tasks.extract import LONGEST_TEXT, MARKER, RULES

EQUATION = re.compile(r"([0-9]{1,9}) ?\+ ?([0-9]{1,9}) ?= ?([0-9]{1,9})(?![0-9])")
PROMPT = "What is {expression}? Write down every step, then the answer."


@dataclass(frozen=True, kw_only=True)
class Steps:
    """All sums of `terms` numbers from 1 to `largest`; `examples` worked ones stand before each question."""

    largest: int = 20
    terms: int = 3
    examples: int = 2
    system: str = ""

    def __post_init__(self) -> None:
        if not (2 <= self.largest <= 9999 and 2 <= self.terms <= 4 and 0 <= self.examples <= 8):
            raise TaskError(
                "steps needs numbers up to 2 at least and 9999 at most, 2 to 4 terms and at most 8 examples, and got "
                f"numbers up to {self.largest}, {self.terms} terms and {self.examples} examples"
            )

    def __len__(self) -> int:
        return self.largest**self.terms

    def problem(self, index: int) -> Problem:
        numbers = self._numbers(index)
        turns = [Message("system", self.system)] if self.system else []
        for example in range(self.examples):
            shown = self._numbers(derive_key("steps", example) % len(self))
            turns += [Message("user", _question(shown)), Message("assistant", worked(shown))]
        return Problem(
            id=problem_id(f"steps {sorted(numbers)}"),
            messages=(*turns, Message("user", _question(numbers))),
            answer=worked(numbers),
            task="steps",
            facts={"expression": " + ".join(map(str, numbers))},
        )

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        return None

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [_grade(answer) for answer in answers]

    def _numbers(self, index: int) -> list[int]:
        numbers = []
        for _ in range(self.terms):
            index, number = divmod(index, self.largest)
            numbers.append(number + 1)  # no zeros: a step that adds nothing is no working
        return numbers


def worked(numbers: Sequence[int]) -> str:
    """The sum as it should be answered."""
    totals = list(accumulate(numbers))
    lines = [f"{a} + {n} = {b}" for a, n, b in zip(totals, numbers[1:], totals[1:], strict=False)]
    return "\n".join([*lines, f"{MARKER} {totals[-1]}"])


def _question(numbers: Sequence[int]) -> str:
    return PROMPT.replace("{expression}", " + ".join(map(str, numbers)))


def _grade(answer: Answer) -> Grade:
    if len(answer.text) > LONGEST_TEXT:
        return Grade(score=0.0, parts={"allowed": 0.0})
    numbers = [int(number) for number in str(answer.problem.facts["expression"]).split(" + ")]
    totals = list(accumulate(numbers))
    wanted = list(zip(totals, numbers[1:], totals[1:], strict=False))
    shown = 0
    for equation in EQUATION.findall(answer.text.rpartition(MARKER)[0]):
        shown += shown < len(wanted) and tuple(map(int, equation)) == wanted[shown]
    equal = last_number(RULES["marker"].out(answer.text) or "") == str(totals[-1])
    ended = answer.stop != "length"
    right = equal and ended and shown == len(wanted)
    parts = {"equal": float(equal), "ended": float(ended), "steps": shown / len(wanted)}
    return Grade(score=float(right), right=right, parts=parts)
