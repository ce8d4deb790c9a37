"""Grades of a step: from the journal where they were given before, else from the verifier, and then written down.

A grade is on disk before the step that uses it, so that a resumed run repeats what a verifier once said, whatever its
clock says today.
"""

from collections.abc import Sequence

from rung.core.journal import GradeJournal, GradeKey
from rung.core.words import Answer, Grade
from rung.tasks.sandbox import Grader
from rung.train.rollouts import Ask


class JournalledGrades:
    """Meets `rollouts.GradeAll`."""

    def __init__(self, grader: Grader, journal: GradeJournal) -> None:
        self.grader, self.journal = grader, journal
        self.num_asked = 0  # answers that the verifier saw; the others were replayed

    def __call__(self, questions: Sequence[tuple[Ask, int, tuple[int, ...], Answer]]) -> list[Grade]:
        """A grade for every (ask, sample number, token ids, answer)."""
        keys = [
            GradeKey(step=ask.step, problem=ask.problem.id, draw=ask.first_draw, sample=number)
            for ask, number, _, _ in questions
        ]
        grades = [self.journal.lookup(key, ids) for key, (_, _, ids, _) in zip(keys, questions, strict=True)]
        missing = [i for i, grade in enumerate(grades) if grade is None]
        new = self.grader.grade([questions[i][3] for i in missing]) if missing else []
        self.num_asked += len(missing)
        self.journal.write((keys[i], questions[i][2], grade) for i, grade in zip(missing, new, strict=True))
        for i, grade in zip(missing, new, strict=True):
            grades[i] = grade
        return [grade for grade in grades if grade is not None]
