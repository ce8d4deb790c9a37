"""Sums with visible working: what counts is every running total, the answer, and that the text ended."""

import pytest

from rung.core.errors import TaskError
from rung.core.words import Answer
from rung.tasks.load import load_task
from rung.tasks.steps import Steps, worked

TASK = Steps(largest=50, terms=4, examples=2)
ODD = TASK.problem(7 - 1 + 50 * (12 - 1 + 50 * (30 - 1 + 50 * (5 - 1))))


def graded(text, stop="eos"):
    (grade,) = TASK.grade([Answer(problem=ODD, text=text, stop=stop, num_tokens=1)])
    return grade


RIGHT = "7 + 12 = 19\n19 + 30 = 49\n49 + 5 = 54\nAnswer: 54"


def test_the_known_good_answer_is_the_working_and_examples_stand_before_the_question():
    assert ODD.facts["expression"] == "7 + 12 + 30 + 5"
    assert ODD.answer == RIGHT == worked([7, 12, 30, 5])
    assert [message.role for message in ODD.messages] == ["user", "assistant"] * 2 + ["user"]
    assert ODD.messages[-1].content.startswith("What is 7 + 12 + 30 + 5?")
    assert len(Steps(largest=20, terms=3)) == 8000
    assert load_task("steps", {"largest": 20}).problem(0).facts["expression"] == "1 + 1 + 1"


@pytest.mark.parametrize(
    ("text", "steps", "equal"),
    [
        (RIGHT, 1.0, 1.0),
        ("First 7+12=19, then 19+30=49 and 49 + 5 = 54.\nAnswer: 54.", 1.0, 1.0),
        ("7 + 12 = 20\n" + RIGHT, 1.0, 1.0),  # a false start that is put right
        ("Answer: 54", 0.0, 1.0),
        ("7 + 12 = 19\n19 + 30 = 49\nAnswer: 54", 2 / 3, 1.0),
        ("19 + 30 = 49\n7 + 12 = 19\n49 + 5 = 54\nAnswer: 54", 1 / 3, 1.0),
        ("7 + 12 = 19\n19 + 30 = 50\n49 + 5 = 54\nAnswer: 54", 1 / 3, 1.0),
        (RIGHT.replace("Answer: 54", "Answer: 55"), 1.0, 0.0),
        (RIGHT.replace("Answer: 54", "54"), 0.0, 0.0),
        ("Answer: 54\n" + RIGHT.partition("\nAnswer")[0], 0.0, 1.0),  # the working comes first
        ("", 0.0, 0.0),
    ],
)
def test_an_answer_is_right_when_every_step_and_the_sum_are(text, steps, equal):
    grade = graded(text)
    assert grade.parts == pytest.approx({"equal": equal, "ended": 1.0, "steps": steps})
    assert grade.right == (grade.score == 1.0) == (steps == equal == 1.0)
    assert not graded(text, stop="length").right


def test_two_orders_of_a_sum_are_one_problem():
    small = Steps(largest=3, terms=3)
    by_content = {}
    for index in range(len(small)):
        problem = small.problem(index)
        by_content.setdefault(tuple(sorted(problem.facts["expression"].split(" + "))), set()).add(problem.id)
    assert len(by_content) == 10  # multisets of 3 out of 3
    assert all(len(ids) == 1 for ids in by_content.values())


def test_sizes_that_cannot_be_meant_are_refused():
    with pytest.raises(TaskError, match="steps needs numbers up to 2 at least"):
        Steps(largest=1)
