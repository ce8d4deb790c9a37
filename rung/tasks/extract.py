"""Which part of a text is its answer, and what an answer may look like before a scorer sees it.

    whole      all of it
    last_line  its last line that is not empty
    marker     what follows the last "Answer:" on its line
    tag        what stands in the last <answer> ... </answer>
    boxed      what stands in the last \\boxed{...}
    number     its last number, as in arithmetic
    final      boxed, else after the last "####" or "Answer:", else the last line

A rule is a pair of functions: out of a text, and around an answer, so that a known-good answer can be written as the
text that is right.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rung.tasks.arithmetic import last_number

LONGEST_TEXT = 100_000  # characters; nobody's answer is longer, and every rule takes time in proportion
MARKER = "Answer:"
GOLD_MARKER = "####"  # GSM8K's
BOXED = "\\boxed{"
TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """The answer in a text (None: there is none), and a text whose answer is this."""

    out: Callable[[str], str | None]
    around: Callable[[str], str]


def _last_line(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _marked(text: str, marker: str = MARKER) -> str | None:
    _, found, after = text.rpartition(marker)
    return after.strip().partition("\n")[0].strip().strip("*").strip() if found else None


def _tagged(text: str) -> str | None:
    found = TAG.findall(text)
    return found[-1].strip() if found else None


def _boxed(text: str) -> str | None:
    """The last box whose brackets close; nested ones count."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(BOXED)
    for index in range(begin, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if not depth:
            return text[begin:index].strip()
    return None


def final(text: str) -> str | None:
    """The answer of a worked solution, as data sets write theirs."""
    for found in (_boxed(text), _marked(text, GOLD_MARKER), _marked(text)):
        if found is not None:
            return found
    return _last_line(text)


RULES: Mapping[str, Rule] = {
    "whole": Rule(str.strip, str),
    "last_line": Rule(_last_line, str),
    "marker": Rule(_marked, lambda answer: f"{MARKER} {answer}"),
    "tag": Rule(_tagged, lambda answer: f"<answer>{answer}</answer>"),
    "boxed": Rule(_boxed, lambda answer: f"{BOXED}{answer}}}"),
    "number": Rule(last_number, str),
    "final": Rule(final, lambda answer: f"{MARKER} {answer}"),
}


@dataclass(frozen=True)
class Allowed:
    """What an answer may be: so many characters, all of which match."""

    length: int
    characters: re.Pattern[str]

    def __call__(self, answer: str) -> bool:
        return len(answer) <= self.length and self.characters.fullmatch(answer) is not None
