"""The built-in tasks of several turns: a game that halving solves, and a tool that calculates exactly."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rung.core.errors import TaskError
from rung.core.words import Answer, Message
from rung.tasks.calculator import BRACKETS, LONGEST, Calculator, evaluate, tell
from rung.tasks.guess import Guess
from rung.tasks.load import load_task


def play(task, problem, policy):
    """A whole episode: `policy` is told the conversation and answers."""
    messages = list(problem.messages)
    while True:
        text = policy(messages)
        answer = Answer(
            problem=problem, text=text, stop="eos", num_tokens=1, earlier=tuple(messages[len(problem.messages) :])
        )
        messages.append(Message("assistant", text))
        reply = task.reply(problem, messages)
        if reply is None:
            return answer, task.grade([answer])[0]
        messages += reply


def halving(highest):
    """A player who knows nothing but what is said."""

    def policy(messages):
        low, high, guess = 1, highest, (1 + highest) // 2
        for message in messages[1:]:
            if message.role == "user":
                low, high = (guess + 1, high) if message.content == "higher" else (low, guess - 1)
                guess = (low + high) // 2
        return f"I say {guess}."

    return policy


@pytest.mark.parametrize("highest", [2, 7, 100])
def test_halving_finds_every_number_in_so_many_guesses(highest):
    """2^k - 1 numbers are found in k guesses, and not all of them in fewer."""
    needed = highest.bit_length()
    for guesses, solved in ((needed, True), (needed - 1, False)):
        task = Guess(highest=highest, guesses=max(guesses, 1))
        grades = [play(task, task.problem(i), halving(highest))[1] for i in range(len(task))]
        assert all(grade.right for grade in grades) == (solved or needed == 1)
        assert max(grade.parts["guesses"] for grade in grades) == max(guesses, 1)


@pytest.mark.parametrize(
    ("said", "hint"),
    [("5", "higher"), ("700", "lower"), ("9", "higher"), ("43", "lower"), ("none", "Say a whole number."),
     ("-5", "Say a whole number."), ("42.5", "Say a whole number."), ("9" * 6000, "lower"), ("007", "higher")],
)  # fmt: skip
def test_a_guess_is_compared_by_its_value(said, hint):
    task = Guess()
    problem = task.problem(41)
    assert problem.answer == "42"
    assert task.reply(problem, [*problem.messages, Message("assistant", said)]) == [Message("user", hint)]


def test_the_secret_is_in_no_word_that_the_model_reads():
    task = Guess(highest=977)
    problem = task.problem(552)
    assert "553" not in problem.messages[0].content
    assert "977" in problem.messages[0].content
    assert len({task.problem(i).id for i in range(977)}) == 977


def test_a_calculation_is_told_and_then_answered():
    task = Calculator()
    problem = task.problem(12345)
    expression = problem.facts["expression"]

    def policy(messages):
        if messages[-1].role == "user" and messages[-1].content.startswith("= "):
            return messages[-1].content.removeprefix("= ")
        return f"Let me see. <calc>{expression}</calc>"

    answer, grade = play(task, problem, policy)
    assert grade.right
    assert len(answer.earlier) == 2


def test_an_answer_without_the_tool_is_graded_and_one_that_still_asks_for_it_is_wrong():
    task = Calculator(calls=1)
    problem = task.problem(7)
    assert play(task, problem, lambda messages: problem.answer)[1].right
    asking = f"<calc>1</calc> {problem.answer}"
    answer, grade = play(task, problem, lambda messages: asking)
    assert not grade.right
    assert len(answer.earlier) == 2, "one call, and the second is not answered"


DOES = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__}
SUMS = st.recursive(
    st.integers(0, 999).map(lambda n: (str(n), Fraction(n))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda x: (f"({x[0][0]} {x[1]} {x[2][0]})", DOES[x[1]](x[0][1], x[2][1]))
    ),
    max_leaves=8,
)


@given(SUMS)
def test_the_calculator_is_exact(case):
    text, value = case
    assert evaluate(text) == value
    assert tell(text) == str(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2+3*4", "14"), ("2-3-4", "-5"), ("8/4/2", "1"), ("1/3+1/6", "1/2"), ("-(2+3)*2", "-10"), ("2--3", "5"),
     ("0*5", "0"), (" 7 ", "7"), ("999999999999999999999*10", "9999999999999999999990")],
)  # fmt: skip
def test_precedence_and_signs(text, value):
    assert tell(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1/0", "division by zero"),
        ("9**9**9", "a number was expected, and '*' came"),
        ("__import__('os').system('true')", "is made of whole numbers, + - * / and brackets"),
        ("1.5+2", "is made of whole numbers"),
        ("\u0663+1", "is made of whole numbers"),  # an Arabic digit
        ("(" * BRACKETS, "a number was expected at the end"),
        ("(" * LONGEST, "at most 20 pairs of brackets"),
        ("-" * LONGEST, "a number was expected at the end"),
        ("1" * (LONGEST + 1), "has at most 200 characters"),
        ("9" * 10**6, "has at most 200 characters"),
        ("(1", "a bracket is not closed"),
        ("1 2", "an operator was expected before '2'"),
        ("1)", "an operator was expected before ')'"),
        ("", "a number was expected at the end"),
        ("\ud800", "is made of whole numbers"),
    ],
)
def test_what_is_no_expression_is_told_and_never_run(text, said):
    assert said in tell(text)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("guess", {"highest": 1}, "needs a highest number of 2"),
        ("guess", {"guesses": 0}, "1 to 1000 guesses"),
        ("calculator", {"calls": 0}, "needs 1 call or more"),
        ("calculator", {"digits": 0}, "needs 1 to 15 digits"),
        ("calculator", {"speaker": "system"}, "speaker"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(name, options, message):
    with pytest.raises(TaskError, match=message):
        load_task(name, options)
