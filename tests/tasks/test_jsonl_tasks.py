"""Questions out of JSON lines: read strictly, judged by math-verify."""

import json

import pytest

from rung.core.errors import TaskError
from rung.core.words import Answer, Message
from rung.tasks.base import split_of
from rung.tasks.jsonl import Columns, read
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader


def graded(task, index, text, stop="eos"):
    (grade,) = task.grade([Answer(problem=task.problem(index), text=text, stop=stop, num_tokens=1)])
    return grade


GOOD = {"question": "1 + 1?", "answer": "2"}
BAD_FILES = {
    "not UTF-8": ([GOOD, b'{"question": "\xff"}'], "line 2 is not UTF-8: byte 15 is 0xff"),
    "not JSON": ([GOOD, b"", b"{question: 1}"], "line 3 is not JSON: Expecting property name"),
    "a name twice": (
        [b'{"question": "a", "question": "b"}'],
        "line 1 is not JSON: the name 'question' stands in it twice",
    ),
    "a number that is none": ([b'{"question": "a", "answer": NaN}'], "line 1 is not JSON: NaN is no JSON"),
    "half a character": ([b'{"question": "\\ud800", "answer": "1"}'], "line 1 holds half of a surrogate pair"),
    "no table": ([GOOD, b"[1]"], "line 2 must be a table of names and values, and is [1]"),
    "deep": ([b"[" * 100_000], "line 1 is not JSON"),
    "a missing question": (
        [GOOD, {"qestion": "x", "answer": "1"}],
        "line 2 has no 'question'. Did you mean 'qestion'?",
    ),
    "a missing answer": ([GOOD, {"question": "x"}], "line 2 has no 'answer'. Known: question."),
    "an empty answer": (
        [{"question": "x", "answer": " "}],
        "line 1: the answer must be a text or a number, and is ' '",
    ),
    "an answer that is a list": ([{"question": "x", "answer": [1]}], "line 1: the answer must be a text or a number"),
    "an empty question": (
        [{"question": " ", "answer": "1"}],
        "line 1: 'question' must end with something that is asked",
    ),
    "a question that is a number": (
        [{"question": 1, "answer": "1"}],
        "'question' must be a text or a list of messages",
    ),
    "an odd message": (
        [{"messages": [{"role": "boss", "content": "x"}], "answer": "1"}],
        "a message has a role (system,",
    ),
    "two questions": (
        [{"question": "a", "prompt": "b", "answer": "1"}],
        "has the columns question and prompt: name the",
    ),
    "no question": (
        [{"text": "a", "answer": "1"}],
        "needs a column question, prompt or messages, or the option `question`",
    ),
    "a duplicate": ([GOOD, {"question": "2?", "answer": "2"}, GOOD], "lines 1 and 3 ask the same with one answer"),
    "a contradiction": ([GOOD, {**GOOD, "answer": "3"}], "lines 1 and 2 ask the same with two answers, '2' and '3'"),
    "a split that is none": (
        [{**GOOD, "split": "test"}],
        "line 1: a problem's split must be train, validation or held_out",
    ),
    "a list in place of lines": ([b'[{"question": "a", "answer": "1"}]'], "write every table on a line of its own"),
    "no answers at all": ([{"question": "x"}], "line 1 has no answer: needed a column answer or solution"),
    "nothing": ([b"", b" "], "has no questions"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_is_read_strictly_and_the_message_names_the_line(case, data):
    rows, message = BAD_FILES[case]
    path = data(*rows)
    with pytest.raises(TaskError) as error:
        read(path, Columns())
    assert message in str(error.value)
    assert path in str(error.value)


def test_questions_come_as_texts_as_messages_and_as_conversations_whose_last_turn_is_the_answer(data):
    chat = [{"role": "system", "content": "S."}, {"role": "user", "content": "2 + 2?"}]
    (text,) = read(data({"prompt": "1 + 1?", "solution": 2}), Columns(system="Calculate."))
    assert text.messages == (Message("system", "Calculate."), Message("user", "1 + 1?"))
    assert (text.answer, text.asked) == ("2", "1 + 1?")
    (listed,) = read(data({"prompt": chat, "answer": "4"}), Columns(system="Calculate."))
    assert listed.messages == (Message("system", "S."), Message("user", "2 + 2?"))
    (conversation,) = read(data({"messages": [*chat, {"role": "assistant", "content": "4"}]}), Columns())
    assert (conversation.answer, conversation.asked, conversation.messages) == ("4", chat, listed.messages)
    (other,) = read(data({"q": "x", "a": "y", "prompt": "not this"}), Columns(question="q", answer="a"))
    assert (other.messages[0].content, other.answer) == ("x", "y")
    twice = data(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), GOOD)
    assert len(read(twice, Columns(drop_duplicates=True))) == 1


def test_a_split_of_the_data_sets_own_is_kept(data):
    task = load_task("maths", {"data": data(GOOD, {"question": "q", "answer": "1", "split": "held_out"})})
    assert split_of(task.problem(1)) == "held_out"


SAME = {
    "2": ["2", "2.0", "Answer: 2", "so it is\n\\boxed{2}", "#### 2", "\\boxed{\\frac{4}{2}}", "$2$", "**Answer: 2**"],
    "Long story.\n#### 1,234": ["1234", "1,234", "1234.00"],
    "we get $\\boxed{\\frac{1}{2}}$.": ["1/2", "0.5", "\\frac12", "\\frac{2}{4}"],
    "x^2+1": ["1 + x^2", "x**2+1"],
}
OTHER = {
    "2": ["3", "", "2\nAnswer: 3", "\\boxed{2} or \\boxed{3}", "-2", "2, 3", "1/0", "\\boxed{", "two"],
    "Long story.\n#### 1,234": ["234", "1,235", "1"],
    "we get $\\boxed{\\frac{1}{2}}$.": ["2", "0.51"],
    "x^2+1": ["x^2", "x^2-1"],
}


@pytest.mark.parametrize("gold", SAME)
def test_an_answer_is_right_when_it_means_what_the_known_one_means(gold, data):
    pytest.importorskip("math_verify")
    task = load_task("maths", {"data": data({"question": "q", "answer": gold})})
    assert graded(task, 0, task.problem(0).answer).right
    for text in SAME[gold]:
        assert graded(task, 0, text).right, text
        cut = graded(task, 0, text, stop="length")
        assert (cut.score, cut.right, cut.parts) == (0.0, False, {"equal": 1.0, "ended": 0.0}), text
    for text in OTHER[gold]:
        found = graded(task, 0, text)
        assert (found.score, found.right) == (0.0, False), text


@pytest.mark.parametrize("rule", ["boxed", "marker", "last_line", "number", "tag", "whole", "final"])
def test_every_rule_of_extraction_knows_a_text_that_is_right(rule, data):
    pytest.importorskip("math_verify")
    task = load_task("maths", {"data": data(GOOD), "extract": rule, "suffix": "Be brief."})
    problem = task.problem(0)
    assert problem.messages[-1].content == "1 + 1?\nBe brief."
    assert graded(task, 0, problem.answer).right
    with Grader("maths", {"data": data(GOOD), "extract": rule}) as grader:
        (grade,) = grader.grade([Answer(problem=problem, text=problem.answer, stop="eos", num_tokens=1)])
    assert grade.right


def test_a_known_answer_that_is_no_formula_is_refused_by_its_line(data):
    pytest.importorskip("math_verify")
    with pytest.raises(TaskError, match=r"data.jsonl, line 2: an answer is a formula of up to 300 characters"):
        load_task("maths", {"data": data(GOOD, {"question": "q", "answer": "9" * 400})})
    with pytest.raises(TaskError, match="the task maths needs `data`"):
        load_task("maths", {})
