"""Arithmetic in words: a few whole numbers, their operations, and a parser that is fixed beforehand.

The answer of a text is its **last number**.  A number is a run of digits 0 to 9 with an optional sign (- or −, touching
it, and not following a digit, letter or bracket, where it would be an operator), optional groups of three after commas
(1,234), and an optional decimal part.  Values are compared, not spellings: 046, 46.0 and 46 are equal.

An answer is right when its number is right **and** it ended by itself (an end token): a text that was cut off, or that
goes on until it is, has not answered.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rung.core.errors import TaskError
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks.base import permuted, problem_id

MINUS = "-\u2212"
NUMBER = re.compile(
    rf"(?:(?<![0-9A-Za-z)\]])[{MINUS}])?"  # a sign, not an operator
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
)
LARGEST = 1 << 62  # len() must fit a machine word; a larger set is indexed through a permutation of all of it


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """All expressions of `terms` numbers of exactly `digits` digits, joined by `operations` (any of + - *).

    operations: "+" is addition alone, "+-*" a mixture; usual precedence
    prompt:     the user's message; {expression} stands for the expression
    system:     a system message, "" for none
    opening:    how every answer begins, written by the task and not by the model; "" for nothing

    A problem's content forgets the order of what commutes: 12 + 34 and 34 + 12 are in the same split.
    """

    operations: str = "+"
    digits: int = 2
    terms: int = 2
    prompt: str = "What is {expression}? Answer with the number only."
    system: str = ""
    opening: str = ""

    def __post_init__(self) -> None:
        if not self.operations or set(self.operations) - set("+-*") or len(set(self.operations)) < len(self.operations):
            raise TaskError(f"arithmetic needs operations out of + - *, each once, and got {self.operations!r}")
        if not (1 <= self.digits <= 15 and 2 <= self.terms <= 8):
            raise TaskError(
                f"arithmetic needs 1 to 15 digits and 2 to 8 terms, and got {self.digits} digits and {self.terms} terms"
            )
        if "{expression}" not in self.prompt:
            raise TaskError(f"arithmetic needs {{expression}} in its prompt, which is {self.prompt!r}")

    def __len__(self) -> int:
        return min(self._all, LARGEST)

    def problem(self, index: int) -> Problem:
        code = index if self._all <= LARGEST else permuted(index, self._all, key=0)
        low, count = _range(self.digits)
        numbers, signs = [], []
        for _ in range(self.terms):
            code, digit = divmod(code, count)
            numbers.append(low + digit)
        for _ in range(self.terms - 1):
            code, choice = divmod(code, len(self.operations))
            signs.append(self.operations[choice])
        summands = _summands(numbers, signs)
        expression = str(numbers[0]) + "".join(f" {s} {n}" for s, n in zip(signs, numbers[1:], strict=True))
        messages = [
            Message("system", self.system),
            Message("user", self.prompt.replace("{expression}", expression)),
            Message("assistant", self.opening.replace("{expression}", expression)),
        ]
        return Problem(
            id=problem_id(f"arithmetic {sorted(summands)}"),
            messages=tuple(message for message in messages if message.content),
            answer=str(_value(summands)),
            task="arithmetic",
            facts={"expression": expression},
        )

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        return None

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [_grade(answer) for answer in answers]

    @property
    def _all(self) -> int:
        return _range(self.digits)[1] ** self.terms * len(self.operations) ** (self.terms - 1)


def last_number(text: str) -> str | None:
    """The last number of a text in plain spelling ("-46", "0.5"), None where there is none.

    >>> last_number("12 + 34 = 046.")
    '46'
    """
    found = NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    """Without sign of zero, leading zeros, commas and an empty decimal part; no int(), which refuses 5000 digits."""
    digits, _, decimals = number.lstrip(MINUS).replace(",", "").partition(".")
    digits, decimals = digits.lstrip("0") or "0", decimals.rstrip("0")
    size = f"{digits}.{decimals}" if decimals else digits
    return f"-{size}" if number[0] in MINUS and size != "0" else size


def _grade(answer: Answer) -> Grade:
    equal = last_number(answer.text) == answer.problem.answer
    ended = answer.stop == "eos"
    return Grade(
        score=float(equal and ended), right=equal and ended, parts={"equal": float(equal), "ended": float(ended)}
    )


def _range(digits: int) -> tuple[int, int]:
    """Smallest number of so many digits, and how many there are (one digit includes 0)."""
    low = 10 ** (digits - 1) if digits > 1 else 0
    return low, 10**digits - low


def _summands(numbers: Sequence[int], signs: Sequence[str]) -> list[tuple[int, list[int]]]:
    """The expression as a sum: (sign, factors in rising order) of every product in it."""
    summands = [(1, [numbers[0]])]
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign == "*":
            summands[-1][1].append(number)
        else:
            summands.append((-1 if sign == "-" else 1, [number]))
    return [(sign, sorted(factors)) for sign, factors in summands]


def _value(summands: Sequence[tuple[int, list[int]]]) -> int:
    return sum(sign * math.prod(factors) for sign, factors in summands)
