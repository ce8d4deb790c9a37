"""Grades and replies of a step: from the journal where they were given before, else from the task, and written down.

A grade is on disk before the step that uses it, so that a resumed run repeats what a verifier once said, whatever its
clock says today.
"""

from collections.abc import Sequence

from rung.core.journal import GradeJournal, GradeKey
from rung.core.words import Answer, Grade, Reply
from rung.tasks.sandbox import Grader
from rung.train.rollouts import Ask


class JournalledGrades:
    """Meets `rollouts.JudgeAll`."""

    def __init__(self, grader: Grader, journal: GradeJournal) -> None:
        self.grader, self.journal = grader, journal
        self.num_asked = 0  # answers that the verifier saw; the others were replayed

    def __call__(self, questions: Sequence[tuple[Ask, int, tuple[int, ...], Answer]]) -> list[Grade | Reply]:
        """A grade for every (ask, sample number, token ids, answer), or the environment's reply where it goes on."""
        keys = [
            GradeKey(step=ask.step, problem=ask.problem.id, draw=ask.first_draw, sample=number)
            for ask, number, _, _ in questions
        ]
        said = [
            self.journal.lookup(key, ids, final=answer.final)
            for key, (_, _, ids, answer) in zip(keys, questions, strict=True)
        ]
        missing = [i for i, what in enumerate(said) if what is None]
        new = self.grader.judge([questions[i][3] for i in missing]) if missing else []
        self.num_asked += len(missing)
        self.journal.write((keys[i], questions[i][2], what) for i, what in zip(missing, new, strict=True))
        for i, what in zip(missing, new, strict=True):
            said[i] = what
        return [what for what in said if what is not None]
