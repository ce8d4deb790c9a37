"""What a failure of the verifier means without a known-good answer, and what counts as a grade."""

import pytest

from rung.core.words import Answer, Grade
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader, Limits


def ask(place, *questions):
    task = load_task(place, {})
    return [Answer(problem=task.problem(i), text=text, stop="eos", num_tokens=1) for i, text in questions]


PICKY = """
problems = [{{"prompt": f"Write a number, {{n}}."}} for n in range(4)]

def reward(problem, text):
    return {body}
"""


def graded(tmp_path, body, *texts):
    """Grades of these texts by a reward function without known-good answers."""
    (tmp_path / "picky.py").write_text(PICKY.format(body=body))
    name = f"{tmp_path / 'picky.py'}:reward"
    with Grader(name, {}, Limits(seconds=5.0)) as grader:
        return grader.grade(ask(name, *((n % 4, text) for n, text in enumerate(texts))))


def test_without_a_known_good_answer_what_makes_a_working_verifier_raise_is_wrong(tmp_path):
    """float() raises on an empty text too, and works: "0" shows it, though no answer of the batch does."""
    bad = graded(tmp_path, "float(text)", "seven", "", "1.2.3", "x", "y")
    assert [grade.score for grade in bad] == [0.0] * 5
    assert "ValueError: could not convert string to float: 'seven'" in bad[0].error
    bad, good, also = graded(tmp_path, "float(text.split('#')[1])", "seven", "so #0.5", "")  # neither "" nor "0" passes
    assert [bad.score, good.score, also.score] == [0.0, 0.5, 0.0]


def test_without_a_known_good_answer_a_verifier_that_manages_no_text_leaves_the_grades_unknown(tmp_path):
    grades = graded(tmp_path, "problem.facts['gone']", "seven", "0", "")
    assert [grade.known for grade in grades] == [False] * 3
    assert "KeyError: 'gone'" in grades[0].error
    assert "with no known-good answer to try" in grades[0].error


JUDGE = """
from rung.core.words import Grade, Message, Problem

class Judge:
    def __len__(self):
        return 1
    def problem(self, index):
        return Problem(id="p", messages=(Message("user", "Say it."),), answer="good")
    def reply(self, problem, messages):
        return None
    def grade(self, answers):
        (answer,) = answers
        if answer.text == "good":
            return [Grade(score=1.0, right=True)]
        return {body}
"""


def judged(tmp_path, body):
    (tmp_path / "judge.py").write_text(JUDGE.format(body=body))
    name = f"{tmp_path / 'judge.py'}:Judge"
    with Grader(name, {}) as grader:
        return grader.grade(ask(name, (0, "bad"), (0, "good")))


@pytest.mark.parametrize(
    ("body", "grade"),
    [
        ("[Grade(score=True, right=1)]", Grade(score=1.0, right=True)),
        ("[Grade(score=False, right=0)]", Grade(score=0.0)),
        ("(Grade(score=2, parts={'a': True}),)", Grade(score=2.0, parts={"a": 1.0})),
    ],
)
def test_a_bool_or_a_whole_number_counts_as_the_number_it_is(tmp_path, body, grade):
    assert judged(tmp_path, body) == [grade, Grade(score=1.0, right=True)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("0.5", "grade must return a list of one Grade per answer, and returned 0.5"),
        ("[0.5]", "grade must return a list of one Grade per answer, and returned [0.5]"),
        ("None", "grade must return a list of one Grade per answer, and returned None"),
        ("[]", "grade must return a list of one Grade per answer, and returned []"),
        ("[Grade(score='high')]", "a score must be a finite number, and is 'high'"),
        ("[Grade(score=float('inf'))]", "a score must be a finite number, and is inf"),
        ("[Grade(score=1.0, parts={'a': None})]", "a score must be a finite number, and is None"),
        ("[Grade(score=1.0, right='no')]", "a grade is right or not (True or False), and is 'no'"),
    ],
)
def test_nonsense_in_place_of_a_grade_is_the_answers_doing_where_the_known_good_one_is_graded(tmp_path, body, message):
    bad, good = judged(tmp_path, body)
    assert (bad.score, good) == (0.0, Grade(score=1.0, right=True))
    assert f"the task {tmp_path / 'judge.py'}:Judge: {message}" in bad.error


def test_nonsense_for_every_answer_leaves_the_grades_unknown(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE.format(body="0.5").replace('"good":', '"none":'))
    name = f"{tmp_path / 'judge.py'}:Judge"
    with Grader(name, {}) as grader:
        (grade,) = grader.grade(ask(name, (0, "bad")))
    assert not grade.known
    assert "grade must return a list of one Grade per answer, and returned 0.5" in grade.error
