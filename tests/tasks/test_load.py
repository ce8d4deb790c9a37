import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rung.cli.eval import task_options
from rung.core.errors import TaskError
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks.arithmetic import Arithmetic
from rung.tasks.load import absolute, load_task, task_parameters

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "tasks.md"

REWARD = """
problems = [{"prompt": f"Spell {w} backwards.", "answer": w[::-1], "letters": len(w)} for w in ("cat", "house", "tree")]

def reward(problem, text, *, bonus=0.0, strict=True):
    return bonus + (text == problem.answer if strict else problem.answer in text)
"""

TASK = """
from rung.core.words import Grade, Message, Problem

class Spell:
    def __init__(self, word, *, times: int = 1):
        self.word, self.times = word, times
    def __len__(self):
        return self.times
    def problem(self, index):
        return Problem(id=f"{self.word}{index}", messages=(Message("user", self.word),), answer=self.word[::-1])
    def reply(self, problem, messages):
        return None
    def grade(self, answers):
        return [Grade(score=float(a.text == a.problem.answer), right=a.text == a.problem.answer) for a in answers]

def made(word="cat", **others):
    return Spell(word, **others)

class Half:
    def __len__(self):
        return 1

class Empty(Spell):
    def __len__(self):
        return 0
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "mine.py").write_text(text)
        return f"{tmp_path / 'mine.py'}:"

    return write


def grade(task, index, text):
    answer = Answer(problem=task.problem(index), text=text, stop="eos", num_tokens=1)
    return task.grade([answer])


def test_a_built_in_name_takes_the_options_of_its_class():
    assert load_task("arithmetic", {"digits": 3, "operations": "*"}) == Arithmetic(digits=3, operations="*")
    assert load_task("rung.tasks.arithmetic:Arithmetic", {"digits": 3}) == Arithmetic(digits=3)


def test_a_reward_function_beside_a_list_is_a_task(write):
    name = write(REWARD) + "reward"
    task = load_task(name, {})
    problem = task.problem(1)
    assert len(task) == 3
    assert problem.messages == (Message("user", "Spell house backwards."),)
    assert (problem.answer, problem.facts, problem.task) == ("esuoh", {"letters": 5}, name)
    assert grade(task, 1, "esuoh") == [Grade(score=1.0, right=True)]
    assert grade(task, 1, "house") == [Grade(score=0.0, right=False)]
    loose = load_task(name, {"bonus": -0.5, "strict": False})
    assert grade(loose, 1, "It is esuoh") == [Grade(score=0.5, right=False)]  # right is a reward of 1


def test_problems_may_be_a_function_and_hold_problems_and_system_messages(write):
    name = write(
        "from rung.core.words import Message, Problem, Grade\n"
        "def problems():\n"
        "    yield Problem(id='own', messages=(Message('user', 'a'),))\n"
        "    yield {'prompt': 'b', 'system': 's'}\n"
        "    yield {'prompt': 'b', 'answer': 7}\n"
        "def reward(problem, text):\n    return Grade(score=0.25, parts={'x': 1.0})\n"
    )
    task = load_task(name + "reward", {})
    own, system, plain = (task.problem(i) for i in range(3))
    assert own == Problem(id="own", messages=(Message("user", "a"),))
    assert [(m.role, m.content) for m in system.messages] == [("system", "s"), ("user", "b")]
    assert (system.answer, plain.answer) == (None, "7")
    assert system.id != plain.id
    assert grade(task, 0, "x") == [Grade(score=0.25, parts={"x": 1.0})]


def test_a_class_and_a_function_that_returns_a_task_get_the_options(write):
    place = write(TASK)
    assert len(load_task(place + "Spell", {"word": "cat", "times": 4})) == 4
    assert load_task(place + "made", {"times": 2}).problem(0).answer == "tac"
    assert grade(load_task(place + "made", {}), 0, "tac")[0].right


def test_the_parameters_of_a_task_are_its_options_and_not_the_arguments_of_a_reward(write):
    assert [p.name for p in task_parameters(write(REWARD) + "reward")] == ["bonus", "strict"]
    assert [p.name for p in task_parameters("arithmetic")] == [f.name for f in fields(Arithmetic)]


BAD = {
    "an unknown built-in": (None, "arithmetc", {}, "no task is called 'arithmetc'. Did you mean 'arithmetic'?"),
    "an unknown option": (None, "arithmetic", {"digit": 2}, "arithmetic has no option 'digit'. Did you mean 'digits'?"),
    "an option of a wrong type": (None, "arithmetic", {"digits": "two"}, "digits must be a whole number, and is 'two'"),
    "a value that is refused": (None, "arithmetic", {"digits": 0}, "needs 1 to 15 digits"),
    "an unknown module": (None, "no_such_module:x", {}, "No module named 'no_such_module'"),
    "a missing file": (None, "/nowhere/mine.py:x", {}, "there is no file /nowhere/mine.py, with a task or a reward"),
    "a name without a part": (None, "mine.py", {}, "no task is called 'mine.py'. Known: arithmetic, "),
    "a misspelt name": (REWARD, "rewrd", {}, "mine.py has no 'rewrd'. Did you mean 'reward'?"),
    "a file that raises": ("x = 1\ny = [\n    x / 0]\n", "y", {}, "ZeroDivisionError: division by zero ("),
    "the line where it raises": ("x = 1\ndef f():\n    return x / 0\nf()\n", "f", {}, "line 3: return x / 0)"),
    "a file that is not Python": ("def f(:\n", "f", {}, "SyntaxError: invalid syntax"),
    "a file that exits": ("import sys\nsys.exit(3)\n", "f", {}, "SystemExit: 3"),
    "a file that is empty": ("", "f", {}, "mine.py has no 'f'. It is empty."),
    "a reward without problems": ("def reward(problem, text): return 1\n", "reward", {}, "needs a list `problems`"),
    "an empty list": ("problems = []\ndef reward(problem, text): return 1\n", "reward", {}, "has no problems"),
    "an empty task": (TASK, "Empty", {"word": "cat"}, "has no problems"),
    "a problem that is no table": (
        "problems = ['a']\ndef reward(problem, text): 1\n",
        "reward",
        {},
        "problem 0 must be",
    ),
    "a fact that is a list": (
        "problems = [{'prompt': 'a', 'x': [1]}]\ndef reward(problem, text): return 1\n",
        "reward",
        {},
        "problem 0 may hold strings and numbers, and its 'x' is [1]",
    ),
    "problems that raise": ("def problems(): 1 / 0\ndef reward(problem, text): 1\n", "reward", {}, "ZeroDivisionError"),
    "an option that a reward lacks": (REWARD, "reward", {"bonsu": 1}, "has no option 'bonsu'. Did you mean 'bonus'?"),
    "an option that is the argument": (REWARD, "reward", {"text": "x"}, "has no option 'text'"),
    "a missing option": (TASK, "Spell", {}, "needs the option 'word'"),
    "a class that is half a task": (
        TASK,
        "Half",
        {},
        "must be a Task (__len__, problem, reply, grade), and has no problem",
    ),
    "a constructor that raises": (
        TASK,
        "made",
        {"word": 3, "time": 1},
        "TypeError: Spell.__init__() got an unexpected",
    ),
    "a problem that raises": (
        TASK.replace("return Problem(", "index / 0; return Problem("),
        "made",
        {},
        "problem 0 of the task Spell failed: ZeroDivisionError: division by zero (",
    ),
    "a problem that is none": (
        TASK.replace("return Problem(", "return dict("),
        "made",
        {},
        "problem 0 of the task Spell must be a Problem (rung.core.words), and is {'id'",
    ),
    "a prompt in two parts": (
        "problems = [{'prompt': 'a', 'split': 'train'}, {'prompt': 'b'}, {'prompt': 'a', 'split': 'held_out'}]\n"
        "def reward(problem, text): return 1\n",
        "reward",
        {},
        "problems 0 and 2 are one prompt with two values of split, 'train' and 'held_out': keep one of them ('a')",
    ),
    "a prompt with two answers": (
        "problems = [{'prompt': 'a', 'answer': 1}, {'prompt': 'a', 'answer': 2}]\n"
        "def reward(problem, text): return 1\n",
        "reward",
        {},
        "problems 0 and 1 are one prompt with two values of answer, '1' and '2'",
    ),
    "a reward of another signature": (
        "problems = [{'prompt': 'a'}]\ndef reward(problem, answer): return 1\n",
        "reward",
        {},
        "needs the option 'problem'. A reward function begins with `(problem, text`",
    ),
    "a value": ("y = 5\n", "y", {}, "must be a Task class or a function, and is int"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_message_says_what_was_wrong(case, write):
    text, name, options, message = BAD[case]
    with pytest.raises(TaskError) as error:
        load_task(name if text is None else write(text) + name, options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_that_is_listed_twice_alike_is_one_problem(write):
    name = write("problems = [{'prompt': 'a', 'answer': 1, 'n': n} for n in range(2)]\ndef reward(problem, text): 1\n")
    assert len(load_task(name + "reward", {})) == 2


def test_the_kind_of_an_option_is_its_annotation_also_where_annotations_are_strings(write):
    place = write(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "def task(word: str, *, bonus: float = 1, times=2): ...\n"
        "def odd(*, bonus: Nowhere = 1): ...\n"
    )
    found = [(option.path[-1], option.kind, option.default) for option in task_options(place + "task", {})]
    assert found == [("word", str, None), ("bonus", float, 1), ("times", int, 2)]
    assert [option.kind for option in task_options(place + "odd", {})] == [int]


def test_a_reward_that_is_not_a_number_is_the_verifiers_failure(write):
    name = write(
        "problems = [{'prompt': 'a'}]\ndef reward(problem, text): return {'nan': float('nan'), '': None}[text]\n"
    )
    task = load_task(name + "reward", {})
    with pytest.raises(TaskError, match="must be a finite number, and is nan"):
        grade(task, 0, "nan")
    with pytest.raises(TypeError):
        grade(task, 0, "")


def test_a_relative_name_can_be_made_to_mean_the_same_elsewhere(write, tmp_path, monkeypatch):
    write(REWARD)
    monkeypatch.chdir(tmp_path)
    assert absolute("mine.py:reward", {"bonus": 1}) == (f"{tmp_path.resolve() / 'mine.py'}:reward", {"bonus": 1})
    assert absolute("arithmetic", {"digits": 1}) == ("arithmetic", {"digits": 1})
    assert absolute("a.b:c", {}) == ("a.b:c", {})
    assert len(load_task("mine.py:reward", {})) == 3


def test_loading_leaves_the_import_path_as_it_was(write):
    before = list(sys.path)
    load_task(write(REWARD) + "reward", {})
    assert sys.path == before


def test_the_task_files_of_the_guide_run_as_they_stand(tmp_path):
    blocks = [block.split("```")[0] for block in GUIDE.read_text().split("```python\n")[1:]]
    assert len(blocks) == 2
    for number, (block, attribute) in enumerate(zip(blocks, ("reward", "Sorting"), strict=True)):
        path = tmp_path / f"mine{number}.py"
        path.write_text(block)
        task = load_task(f"{path}:{attribute}", {})
        problem = task.problem(0)
        assert grade(task, 0, problem.answer)[0].right
        assert not grade(task, 0, "something else")[0].right
