"""An environment runs in the grading child as a verifier does: what it says, what it may not say, and how it fails."""

import pytest

from rung.core.journal import GradeJournal, GradeKey
from rung.core.rundir import create
from rung.core.words import Answer, Grade, Message, Reply, spoken
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader, Limits

ENVIRONMENT = """
import os, time
from rung.core.words import Grade, Message, Problem

class Echo:
    def __len__(self): return 4

    def problem(self, index):
        return Problem(id=str(index), messages=(Message("user", "go"),), answer=None if index == 3 else "end")

    def reply(self, problem, messages):
        said = messages[-1].content
        if problem.id == "2":
            raise RuntimeError("the environment has a bug")
        if "".join(m.content for m in messages[:-1]).count("poison"):
            os._exit(3)
        match said:
            case "end" | "": return None
            case "raise": raise ValueError("no such move")
            case "die": os._exit(7)
            case "sleep": time.sleep(60)
            case "nothing": return []
            case "text": return "hello"
            case "texts": return ["hello"]
            case "opening": return [Message("assistant", "I say")]
            case "role": return [Message("wizard", "hocus")]
            case "content": return [Message("user", 7)]
            case "surrogate": return [Message("user", "\\ud800")]
            case "opened": return [Message("tool", "so"), Message("assistant", "I say")]
        return [Message("user", f"{len(messages)}: {said}")]

    def grade(self, answers):
        return [Grade(score=1.0, parts={"messages": float(len(answer.messages))}) for answer in answers]
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "echo.py").write_text(ENVIRONMENT)
    return f"{tmp_path / 'echo.py'}:Echo"


@pytest.fixture
def judge(place):
    task = load_task(place, {})
    with Grader(place, {}, Limits(seconds=2.0)) as grader:

        def ask(*questions, final=False):
            return grader.judge(
                [
                    Answer(
                        problem=task.problem(i),
                        text=said[-1],
                        stop="eos",
                        num_tokens=1,
                        final=final,
                        earlier=turns(said[:-1]),
                    )
                    for i, *said in questions
                ]
            )

        ask.grader = grader
        yield ask


def turns(said):
    return tuple(message for text in said for message in (Message("assistant", text), Message("user", "and")))


def test_a_reply_comes_back_or_the_grade_of_the_whole_conversation(judge):
    hello, end, later = judge((0, "hello"), (0, "end"), (1, "a", "b", "end"))
    assert hello == Reply(messages=(Message("user", "2: hello"),))
    assert end == Grade(score=1.0, parts={"messages": 2.0})
    assert later == Grade(score=1.0, parts={"messages": 6.0})
    assert judge((0, "x", "hello")) == [Reply(messages=(Message("user", "4: hello"),))]
    assert judge((0, "opened")) == [Reply(messages=(Message("tool", "so"), Message("assistant", "I say")))]


def test_a_final_answer_is_graded_whatever_the_environment_would_say(judge):
    assert judge((0, "hello"), (0, "raise"), final=True) == [Grade(score=1.0, parts={"messages": 2.0})] * 2
    (answer,) = [Answer(problem=load_problem(judge), text="hello", stop="eos", num_tokens=1, final=False)]
    assert judge.grader.grade([answer]) == [Grade(score=1.0, parts={"messages": 2.0})], "grade never hands back a reply"


def load_problem(judge):
    return load_task(judge.grader._setup["task"], {}).problem(0)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("raise", "ValueError: no such move"),
        ("die", "ended with exit code 7"),
        ("sleep", "took more than 2 seconds"),
        ("nothing", "must return None, which ends the episode, or begin with a turn that is not the model's"),
        ("opening", "must return None, which ends the episode, or begin with a turn that is not the model's"),
        ("text", "must return None or a list of Messages, and returned 'hello'"),
        ("texts", "must return None or a list of Messages, and returned ['hello']"),
        ("role", "has a role (system, user, assistant, tool) and a text"),
        ("content", "has a role (system, user, assistant, tool) and a text"),
        ("surrogate", "surrogates not allowed"),
    ],
)
def test_an_answer_that_breaks_the_environment_is_wrong_and_its_neighbours_are_not(judge, said, reason):
    """The environment manages the known-good answer to the same problem: the other answer did it."""
    before, broken, after = judge((0, "hello"), (0, said), (1, "hello"))
    assert (broken.score, broken.right) == (0.0, False)
    assert reason in broken.error
    assert before == after == Reply(messages=(Message("user", "2: hello"),))


def test_what_was_said_in_an_earlier_turn_cannot_make_the_grade_unknown(judge):
    """The known-good answer is tried alone: together with the poison it would fail as well."""
    (grade,) = judge((0, "poison", "hello"))
    assert (grade.score, grade.known) == (0.0, True)
    assert "ended with exit code 3" in grade.error


def test_an_environment_that_fails_on_the_known_good_answer_too_leaves_the_grade_unknown(judge):
    fine, unknown = judge((0, "hello"), (2, "hello"))
    assert isinstance(fine, Reply)
    assert not unknown.known
    assert "the environment has a bug" in unknown.error


def test_without_a_known_good_answer_an_environment_works_if_it_manages_any_other(judge):
    (wrong,) = judge((3, "raise"))
    assert (wrong.score, wrong.known) == (0.0, True)


def test_an_opening_and_the_answer_that_goes_on_with_it_are_one_message():
    said = [Message("user", "a"), Message("assistant", "b"), Message("assistant", "c"), Message("user", "d")]
    assert spoken(said) == (Message("user", "a"), Message("assistant", "bc"), Message("user", "d"))


KEY = GradeKey(step=4, problem="p", draw=1, sample=3)
REPLY = Reply(messages=(Message("user", "hü\n"), Message("assistant", "")))


def test_replies_are_kept_beside_grades_and_found_by_the_tokens_they_answered(tmp_path):
    run = create(tmp_path / "run", {}, {})
    GradeJournal(run).write([(KEY, (1,), REPLY), (KEY, (1, 2), Grade(score=0.5))])
    for journal in (GradeJournal(run), GradeJournal(run, since=4)):
        assert journal.lookup(KEY, (1,), final=False) == REPLY
        assert journal.lookup(KEY, (1,)) is None, "a final answer wants a grade"
        assert journal.lookup(KEY, (1, 2), final=False) == Grade(score=0.5), "the episode ended there"
    GradeJournal(run).write([(KEY, (1,), Grade(score=0.25))])  # there was no room to go on
    assert GradeJournal(run).lookup(KEY, (1,), final=False) == REPLY
    assert GradeJournal(run).lookup(KEY, (1,)) == Grade(score=0.25)
    assert GradeJournal(run, since=5).lookup(KEY, (1,), final=False) is None
