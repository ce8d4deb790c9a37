"""Any task under another prompt, parser or reward, for `bench.beside`.  A grading child imports this file: no torch.

`of` names the task; the other options are its own.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rung.core.keys import derive_key
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks.arithmetic import NUMBER, last_number
from rung.tasks.base import problem_at, split_of
from rung.tasks.load import load_task

SHOTS = 4


class Variant:
    """The task itself; a variant changes one thing."""

    def __init__(self, of: str, **options: Any) -> None:
        self.task = load_task(of, options)

    def __len__(self) -> int:
        return len(self.task)

    def problem(self, index: int) -> Problem:
        return problem_at(self.task, index)

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        return self.task.reply(problem, messages)

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return self.task.grade(answers)


class AnyNumber(Variant):
    """Right as soon as any number of the text is the answer's last one, however the text goes on: the most lenient
    parser."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        grades = []
        for answer in answers:
            right = last_number(answer.problem.answer or "") in map(last_number, NUMBER.findall(answer.text))
            grades.append(Grade(score=float(right), right=right))
        return grades


class FourShots(Variant):
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
                opening = shot.messages[-1].content if shot.messages[-1].role == "assistant" else ""
                user = next(m for m in reversed(shot.messages) if m.role == "user")
                messages += [user, Message("assistant", f"{opening} {shot.answer}".strip())]
        return messages


class FourShotsAnyNumber(FourShots, AnyNumber):
    """Both."""


class CoinFlips(Variant):
    """The reward is a coin flip of each sample's own key, whatever it says; accuracy is judged as ever."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        rewards = [derive_key("coin", answer.key) & 1 for answer in answers]
        graded = super().grade(answers)
        return [replace(grade, score=float(reward)) for grade, reward in zip(graded, rewards, strict=True)]
