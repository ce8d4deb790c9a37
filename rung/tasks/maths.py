"""Questions and answers of mathematics, out of JSON lines, judged by math-verify (extra `tasks`).

An answer is right when it means what the known answer means: 1/2 is 0.5 and \\frac{1}{2}.  Which part of a text is its
answer is fixed beforehand (`extract.py`), and only that part is shown to math-verify, after its length and characters.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from rung.core.errors import TaskError
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks.extract import LONGEST_TEXT, RULES, Allowed, final
from rung.tasks.jsonl import Columns, Row, problem_of, read

# What a formula is written with; a number of more digits, or a tower of powers, is no answer but an attack.
ALLOWED = Allowed(300, re.compile(r"[0-9A-Za-z +\-*/^_=<>|!%$.,:;(){}\[\]\\'°π∞√±≤≥∪∩·×−\n]*"))  # noqa: RUF001 (these signs are meant)
TOO_MUCH = re.compile(
    r"[0-9]{60}"
    r"|(?:\^|\*\*)\s*\{?\s*\(?-?[0-9]{4}"  # a power above 999
    r"|(?:\^|\*\*)\s*[{(]?[^{}()^*+]{0,20}(?:\^|\*\*)"  # of a power
    r"|[0-9]{4}\s*!|[)}!\]]\s*!"  # a factorial above 999!, or of something
    r"|(?:[({\[][^({\[)}\]]{0,20}){12}"  # brackets inside each other
    r"|\\(?:sum|prod|int|lim|binom|input|include|write|def)"  # what would have to be worked out, or is no formula
)
SECONDS = 3  # of math-verify itself, by an alarm in the grading child's main thread


@dataclass(frozen=True, kw_only=True)
class Maths:
    """A file of JSON lines.

    data:     its path
    question, answer: names of its columns; "" takes the usual ones (question, prompt or messages; answer or solution)
    system:   a system message, "" for none
    suffix:   what is added to every question
    extract:  how the answer is found in a text: boxed, marker ("Answer: ..."), last_line, number, tag, whole, or final
    must_end: an answer that was cut off is wrong
    drop_duplicates: keep the first of questions that are there twice with one answer; else they are refused
    """

    data: str = ""
    question: str = ""
    answer: str = ""
    system: str = ""
    suffix: str = ""
    extract: Literal["final", "boxed", "marker", "last_line", "number", "tag", "whole"] = "final"
    must_end: bool = True
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        _library()
        if not self.data:
            raise TaskError(
                "the task maths needs `data`, a file of JSON lines (on the command line: --data FILE.jsonl)"
            )
        assert self._rows

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        columns = Columns(
            question=self.question, answer=self.answer, system=self.system, drop_duplicates=self.drop_duplicates
        )
        rows = read(self.data, columns)
        for row in rows:
            gold = gold_of(row)
            if not ALLOWED(gold) or TOO_MUCH.search(gold):
                raise TaskError(
                    f"{self.data}, line {row.line}: an answer is a formula of up to {ALLOWED.length} characters, and "
                    f"this one is {gold[:80]!r}. Give its value alone, in \\boxed{{}} or after ####"
                )
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def problem(self, index: int) -> Problem:
        row = self._rows[index]
        problem = problem_of(row, "maths", gold=gold_of(row))
        *before, last = problem.messages
        asked = Message(last.role, f"{last.content}\n{self.suffix}") if self.suffix else last
        return Problem(
            id=problem.id,
            messages=(*before, asked),
            answer=RULES[self.extract].around(gold_of(row)),
            task=problem.task,
            facts=problem.facts,
        )

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        return None

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [self._grade(answer) for answer in answers]

    def _grade(self, answer: Answer) -> Grade:
        found = RULES[self.extract].out(answer.text) if len(answer.text) <= LONGEST_TEXT else None
        if found is None or not ALLOWED(found) or TOO_MUCH.search(found):
            return Grade(score=0.0, parts={"found": float(found is not None), "allowed": 0.0})
        equal = means_the_same(str(answer.problem.facts["gold"]), found)
        ended = not self.must_end or answer.stop != "length"
        right = equal and ended
        return Grade(score=float(right), right=right, parts={"equal": float(equal), "ended": float(ended)})


def gold_of(row: Row) -> str:
    """The value that a known answer ends in: GSM8K's stands after ####, others in a box, others are the whole text."""
    assert row.answer is not None
    worked = "####" in row.answer or "\\boxed" in row.answer
    return (final(row.answer) or "") if worked else row.answer.strip()


def means_the_same(gold: str, given: str) -> bool:
    """Whether math-verify takes both for the same.  Raises TaskError where it cannot read the known answer."""
    _, verify = _library()
    right = _read(gold)
    if not right:
        raise TaskError(
            f"math-verify cannot read the known answer {gold[:80]!r} as a formula: write a value alone, in "
            "\\boxed{} or after ####, or judge by a reward of your own (--reward FILE.py:NAME)"
        )
    found = _read(given)
    return bool(found) and bool(verify(right, found, timeout_seconds=SECONDS))


def _read(written: str) -> list[Any]:
    """As what stands in a box: all of it must be a formula.  Out of a plain text math-verify would pick a number."""
    parse, _ = _library()
    formula = written.strip("$ \n").rstrip(".").replace("**", "^")
    found = parse(f"\\boxed{{{formula}}}", parsing_timeout=SECONDS)
    return found if any(not isinstance(item, str) for item in found) else []


def absolute(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the full paths of files (`load.absolute`)."""
    return {**options, "data": str(Path(options["data"]).resolve())} if options.get("data") else dict(options)


def files(options: Mapping[str, Any]) -> list[Path]:
    """The user's own files that the options name (`load.files`)."""
    return [Path(options["data"])]


@cache
def _library() -> tuple[Any, Any]:
    """math-verify's two functions, silenced.  Raises TaskError where it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise TaskError(f"the task maths needs the package math-verify: pip install 'rung[tasks]' ({error})") from error
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it reports every text that is no formula
    return parse, verify
