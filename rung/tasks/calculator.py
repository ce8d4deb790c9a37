"""Arithmetic with a tool: the model may write an expression between marks, and its exact value comes back.

    user: What is 417 * 36 - 5?   assistant: <calc>417*36-5</calc>   user: = 15007   assistant: 15007

The tool is a parser of its own for + - * / and brackets over whole numbers, in fractions: no text is run as a program,
and limits on length and brackets bound the size of every value, and the depth of the parser.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from rung.core.errors import TaskError
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks.arithmetic import Arithmetic

LONGEST = 200  # characters of an expression: its value has hardly more digits
BRACKETS = 20  # of an expression: each takes three levels of Python's stack of 1000
MARKED = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
SYSTEM = "To calculate, write <calc>expression</calc> and stop: I tell you the value. Then answer with the number only."


@dataclass(frozen=True, kw_only=True)
class Calculator:
    """Expressions of `terms` numbers of `digits` digits, to be answered with or without the tool.

    operations, digits, terms, prompt: as of `arithmetic`
    system:  what explains the tool
    calls:   how often it may be used; max_turns of the run should be one more
    speaker: as whom it answers: user is understood by every chat template, tool by some
    """

    operations: str = "+-*"
    digits: int = 3
    terms: int = 3
    prompt: str = "What is {expression}?"
    system: str = SYSTEM
    calls: int = 3
    speaker: Literal["user", "tool"] = "user"

    def __post_init__(self) -> None:
        if self.calls < 1:
            raise TaskError(f"calculator needs 1 call or more, and got {self.calls}")
        self._arithmetic  # noqa: B018 (refuses what arithmetic refuses)

    def __len__(self) -> int:
        return len(self._arithmetic)

    def problem(self, index: int) -> Problem:
        return self._arithmetic.problem(index)

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        asked = [MARKED.findall(m.content) for m in messages[len(problem.messages) :] if m.role == "assistant"]
        if not asked[-1] or len(asked) > self.calls:
            return None
        return [Message(self.speaker, f"= {tell(asked[-1][-1])}")]

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """The last answer's last number, as in `arithmetic`; an answer that is still asking the tool is none."""
        grades = self._arithmetic.grade(answers)
        return [
            Grade(score=0.0) if MARKED.search(answer.text) else grade
            for answer, grade in zip(answers, grades, strict=True)
        ]

    @property
    def _arithmetic(self) -> Arithmetic:
        return Arithmetic(
            operations=self.operations, digits=self.digits, terms=self.terms, prompt=self.prompt, system=self.system
        )


def tell(expression: str) -> str:
    """The value of an expression in words: a whole number, a fraction, or what is wrong with it.

    >>> tell("2*(3+4)"), tell("1/4"), tell("1/0")
    ('14', '1/4', 'division by zero')
    """
    try:
        value = evaluate(expression)
    except ZeroDivisionError:
        return "division by zero"
    except ValueError as error:
        return str(error)
    return str(value)


def evaluate(expression: str) -> Fraction:
    """The exact value of whole numbers, + - * / and brackets.  Raises ValueError and ZeroDivisionError."""
    if len(expression) > LONGEST:
        raise ValueError(f"an expression has at most {LONGEST} characters")
    if not re.fullmatch(r"[0-9+*/()\s-]*", expression, re.ASCII):
        raise ValueError("an expression is made of whole numbers, + - * / and brackets")
    if expression.count("(") > BRACKETS:
        raise ValueError(f"an expression has at most {BRACKETS} pairs of brackets")
    tokens = iter([*re.findall(r"[0-9]+|[-+*/()]", expression), ""])
    value, after = _sum(next(tokens), tokens)
    if after:
        raise ValueError(f"an operator was expected before {after!r}")
    return value


def _sum(token: str, rest: Iterator[str]) -> tuple[Fraction, str]:
    """A sum that begins with `token`, and the token behind it."""
    value, token = _product(token, rest)
    while token in ("+", "-"):
        term, after = _product(next(rest), rest)
        value, token = (value + term if token == "+" else value - term), after
    return value, token


def _product(token: str, rest: Iterator[str]) -> tuple[Fraction, str]:
    value, token = _atom(token, rest)
    while token in ("*", "/"):
        factor, after = _atom(next(rest), rest)
        value, token = (value * factor if token == "*" else value / factor), after
    return value, token


def _atom(token: str, rest: Iterator[str]) -> tuple[Fraction, str]:
    if token == "-":
        value, token = _atom(next(rest), rest)
        return -value, token
    if token == "(":
        value, token = _sum(next(rest), rest)
        if token != ")":
            raise ValueError("a bracket is not closed")
        return value, next(rest)
    if not token.isdigit():
        raise ValueError(f"a number was expected, and {token!r} came" if token else "a number was expected at the end")
    return Fraction(int(token)), next(rest)
