import re
import time
from functools import cache

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rung.core.errors import TaskError
from rung.core.words import Answer
from rung.tasks.arithmetic import Arithmetic, last_number
from rung.tasks.base import split_of

TASKS = st.builds(
    Arithmetic,
    operations=st.sampled_from(["+", "-", "*", "+-", "*+", "+-*"]),
    digits=st.integers(1, 15),
    terms=st.integers(2, 8),
)


def answered(problem, text, stop="eos"):
    return Answer(problem=problem, text=text, stop=stop, num_tokens=3)


def grade(problem, text, stop="eos"):
    (found,) = Arithmetic().grade([answered(problem, text, stop)])
    return found


@given(TASKS, st.data())
def test_the_known_good_answer_is_the_value_of_the_expression(task, data):
    problem = task.problem(data.draw(st.integers(0, len(task) - 1)))
    expression = problem.facts["expression"]
    assert re.fullmatch(rf"\d{{{task.digits}}}( [+*-] \d{{{task.digits}}}){{{task.terms - 1}}}", expression)
    assert set(re.sub(r"[\d ]", "", expression)) <= set(task.operations)
    assert int(problem.answer) == eval(expression)
    assert expression in problem.messages[-1].content
    assert grade(problem, problem.answer).right


@pytest.mark.parametrize(("digits", "terms", "operations"), [(1, 2, "+"), (1, 3, "-*"), (1, 2, "+-*"), (2, 2, "*")])
def test_the_indices_number_every_expression_once(digits, terms, operations):
    task = Arithmetic(digits=digits, terms=terms, operations=operations)
    count = {1: 10, 2: 90}[digits] ** terms * len(operations) ** (terms - 1)
    assert len({task.problem(i).facts["expression"] for i in range(len(task))}) == len(task) == count


def test_a_set_too_large_to_number_is_sampled_from_all_of_it():
    """8.1e29 expressions: first digits of both numbers must reach everywhere, not stay with the smallest."""
    task = Arithmetic(digits=15, terms=2)
    assert len(task) == 2**62
    firsts = {tuple(n[0] for n in task.problem(i).facts["expression"].split(" + ")) for i in range(1000)}
    assert len(firsts) >= 80  # of 81 pairs, each missed with probability e^-12


def test_problems_share_an_id_exactly_where_they_differ_by_the_order_of_what_commutes():
    """Content rebuilt independently: a polynomial in one symbol per number, over one-digit expressions."""
    task = Arithmetic(digits=1, terms=3, operations="+-*")
    by_id, by_content = {}, {}
    for index in range(0, len(task), 2):  # 2 divides the 10 digits: half of the first numbers, all of the others
        problem = task.problem(index)
        content = polynomial(problem.facts["expression"])
        by_id.setdefault(problem.id, set()).add(content)
        by_content.setdefault(content, set()).add(problem.id)
    assert all(len(group) == 1 for group in [*by_id.values(), *by_content.values()])
    assert len(by_id) < len(task) / 3


def polynomial(expression):
    signed = expression.replace(" - ", " + -").split(" + ")
    return tuple(sorted(("-" * t.startswith("-"), *sorted(t.lstrip("-").split(" * "))) for t in signed))


def carries(a, b):
    return (a % 10 + b % 10 >= 10) + 2 * (a // 10 + b // 10 + (a % 10 + b % 10 >= 10) >= 10)


FEATURES = {
    "the last digit of the sum": (lambda a, b: (a + b) % 10, 9, 27.88),
    "which digits carry": (carries, 3, 16.27),
    "the smaller first digit": (lambda a, b: min(a, b) // 10, 8, 26.12),
}


def chi_squared(parts):
    """Pearson's statistic of the table part x value: its 99.9 % point is given beside each feature."""
    values = sorted({v for part in parts for v in part})
    total = sum(map(len, parts))
    statistic = 0.0
    for part in parts:
        for value in values:
            expected = len(part) * sum(p.count(value) for p in parts) / total
            statistic += (part.count(value) - expected) ** 2 / expected
    return statistic, len(values) - 1


@cache
def all_pairs():
    """(part, a, b) of every unordered pair of two-digit numbers."""
    problems = {p.id: p for p in map(Arithmetic().problem, range(len(Arithmetic())))}
    return [(split_of(p), *map(int, p.facts["expression"].split(" + "))) for p in problems.values()]


def pairs(split):
    return [(a, b) for part, a, b in all_pairs() if part == split]


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("other", ["held_out", "validation"])
def test_the_parts_have_the_same_shares_of_digits_and_carries(name, other):
    feature, freedom, limit = FEATURES[name]
    statistic, found = chi_squared([[feature(*pair) for pair in pairs(split)] for split in ("train", other)])
    assert found == freedom
    assert statistic < limit


def test_the_check_of_shares_would_notice_a_split_that_holds_out_the_sums_that_end_in_0():
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    sums = [(a + b) % 10 for a, b in pairs]
    assert chi_squared([[s for s in sums if s], [s for s in sums if not s]])[0] > 1000
    assert chi_squared([sums[::2], sums[1::2]])[0] < 27.88


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("46", "46"),
        ("12 + 34 = 46", "46"),
        ("The answer is 46.", "46"),
        ("46\n", "46"),
        ("**46**", "46"),
        ("$46$", "46"),
        ("046", "46"),
        ("46.0", "46"),
        ("46.50", "46.5"),
        ("= -22", "-22"),
        ("=-22", "-22"),
        ("\u221222", "-22"),
        ("(-22)", "-22"),
        ("12-34", "34"),
        ("12 - 34", "34"),
        ("x-34", "34"),
        ("(5)-34", "34"),
        ("1,234", "1234"),
        ("1,234,567.80", "1234567.8"),
        ("12, 34", "34"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("-0", "0"),
        ("-0.0", "0"),
        ("000", "0"),
        ("7 and 8 make fifteen", "8"),
        ("x2", "2"),
        ("no number", None),
        ("", None),
        ("\u0664\u0666", None),  # Arabic digits are not what was asked for
        ("9" * 6000, "9" * 6000),  # int() refuses more than 4300 digits
    ],
)
def test_the_answer_of_a_text_is_its_last_number(text, number):
    assert last_number(text) == number


@given(st.integers(-(10**18), 10**18), st.text(st.characters(blacklist_categories=["Nd"])))
def test_a_number_is_read_in_every_spelling_after_any_words(value, words):
    assume(not re.search(r"[0-9A-Za-z)\].,\u2212-]$", words) and not re.search(r"[0-9]", words))
    for spelling in (str(value), f"{value:,}", f"{value}.00"):
        assert last_number(words + spelling) == str(value)


@given(st.text(st.characters()))
def test_the_parser_never_fails(text):
    found = last_number(text)
    assert (found is None) == (re.search(r"[0-9]", text) is None)


@pytest.mark.parametrize(
    "text", ["1," * 10**5, "1" * 10**6, ",111" * 10**5 + "1", "1" + ",111" * 10**5 + "1", "-" * 10**6]
)
def test_the_parser_takes_linear_time_on_hostile_texts(text):
    started = time.monotonic()
    last_number(text)
    assert time.monotonic() - started < 2


def test_an_answer_is_right_when_it_is_equal_and_ended_by_itself():
    problem = Arithmetic().problem(0)  # 10 + 10
    table = {("20", "eos"): (1, 1, 1), ("20", "length"): (0, 1, 0), ("20", "stop"): (0, 1, 0), ("21", "eos"): (0, 0, 1)}
    for (text, stop), (score, equal, ended) in table.items():
        found = grade(problem, text, stop)
        assert (found.score, found.right) == (score, bool(score))
        assert found.parts == {"equal": equal, "ended": ended}
    assert grade(problem, "no number").score == 0
    assert not grade(problem, "-20").right


def test_an_opening_is_the_first_words_of_the_answer_and_has_no_part_in_the_content():
    problem = Arithmetic(opening="{expression} =").problem(5)
    assert [(m.role, m.content) for m in problem.messages[1:]] == [("assistant", "15 + 10 =")]
    assert problem.id == Arithmetic().problem(5).id


def test_a_system_message_and_another_prompt_change_the_words_and_not_the_content():
    plain = Arithmetic().problem(5)
    other = Arithmetic(system="You calculate.", prompt="{expression}=").problem(5)
    assert [(m.role, m.content) for m in other.messages] == [("system", "You calculate."), ("user", "15 + 10=")]
    assert (other.id, other.answer) == (plain.id, plain.answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": "/"}, "operations out of + - *, each once, and got '/'"),
        ({"operations": "++"}, "got '++'"),
        ({"operations": ""}, "got ''"),
        ({"digits": 0}, "1 to 15 digits and 2 to 8 terms, and got 0 digits and 2 terms"),
        ({"digits": 16}, "got 16 digits"),
        ({"terms": 1}, "and 1 terms"),
        ({"prompt": "What is it?"}, "needs {expression} in its prompt, which is 'What is it?'"),
    ],
)
def test_options_that_make_no_problems_are_refused(options, message):
    with pytest.raises(TaskError) as error:
        Arithmetic(**options)
    assert message in str(error.value)
