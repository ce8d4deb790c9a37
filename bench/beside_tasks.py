"""Variants of the default task, for `bench.beside`.  A grading child imports this file: no torch."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rung.core.keys import derive_key
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks.arithmetic import NUMBER, Arithmetic, last_number
from rung.tasks.base import split_of

SHOTS = 4


@dataclass(frozen=True, kw_only=True)
class AnyNumber(Arithmetic):
    """Right as soon as any number of the text is the answer, however the text goes on: the most lenient parser."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        grades = []
        for answer in answers:
            right = answer.problem.answer in map(last_number, NUMBER.findall(answer.text))
            grades.append(Grade(score=float(right), right=right))
        return grades


@dataclass(frozen=True, kw_only=True)
class FourShots(Arithmetic):
    """The problem behind four solved ones of the training part."""

    def problem(self, index: int) -> Problem:
        problem = super().problem(index)
        system = [m for m in problem.messages if m.role == "system"]
        asked = [m for m in problem.messages if m.role != "system"]
        return replace(problem, messages=(*system, *self._solved(index), *asked))

    def _solved(self, index: int) -> list[Message]:
        messages: list[Message] = []
        at = zlib.crc32(b"%d" % index)
        while len(messages) < 2 * SHOTS:
            at += 7919
            shot = super().problem(at % len(self))
            if split_of(shot) == "train":
                user = next(m for m in shot.messages if m.role == "user")
                opening = self.opening.replace("{expression}", str(shot.facts["expression"]))
                messages += [user, Message("assistant", f"{opening} {shot.answer}".strip())]
        return messages


@dataclass(frozen=True, kw_only=True)
class FourShotsAnyNumber(FourShots, AnyNumber):
    """Both."""


@dataclass(frozen=True, kw_only=True)
class CoinFlips(Arithmetic):
    """The reward is a coin flip of each sample's own key, whatever it says; accuracy is judged as ever."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        rewards = [derive_key("coin", answer.key) & 1 for answer in answers]
        graded = super().grade(answers)
        return [replace(grade, score=float(reward)) for grade, reward in zip(graded, rewards, strict=True)]
