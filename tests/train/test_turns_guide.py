"""The example of docs/guide/turns.md is a task as it stands, and a tiny model trains on it."""

import re
from pathlib import Path

import pytest
from train.tiny import tiny_folder, tiny_recipe

import rung
from rung.core.rundir import open_run
from rung.core.words import Answer, Message
from rung.tasks.load import load_task
from rung.train.config import TaskSpec

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "turns.md"


@pytest.fixture
def place(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "spell.py").write_text(example)
    return f"{tmp_path / 'spell.py'}:SecondChance"


def test_the_example_gives_a_second_chance_and_half_the_reward(place):
    task = load_task(place, {})
    problem = task.problem(0)
    wrong, right = Message("assistant", "elppx"), Message("assistant", "elppa")
    assert task.reply(problem, [*problem.messages, right]) is None
    hint = task.reply(problem, [*problem.messages, wrong])
    assert hint == [Message("user", "4 letters are right. Try again.")]
    assert task.reply(problem, [*problem.messages, wrong, *hint, wrong]) is None
    said = Answer(problem=problem, text="elppa", stop="eos", num_tokens=9, earlier=(wrong, *hint))
    assert [
        grade.score for grade in task.grade([said, Answer(problem=problem, text="elppa", stop="eos", num_tokens=4)])
    ] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "turns"),
    [("spell.py:SecondChance", 2), ("guess", 3), ("calculator", 3)],
    ids=["example", "guess", "calculator"],
)
def test_a_tiny_model_trains_on_it_from_the_first_step_to_the_report(place, tmp_path, monkeypatch, name, turns):
    """`calculator` replies only to a mark, which the tiny model never writes: its episodes end at once."""
    monkeypatch.chdir(tmp_path)
    folder = tiny_folder(tmp_path / "model")
    options = {"system": "", "prompt": "{expression}"} if name == "calculator" else {}
    recipe = tiny_recipe(folder, task=TaskSpec(name=name, options=options), max_turns=turns, num_steps=2, eval_every=0)
    run = open_run(rung.train(recipe, folder=tmp_path / "run").folder)
    taken = {len(sample["turns"]) for sample in run.read("samples")}
    assert taken == ({1} if name == "calculator" else {turns})
    assert [m["step"] for m in run.read("metrics") if m["kind"] == "train"] == [1, 2]


def test_commands_of_the_guide_are_named_tasks():
    for name in ("guess", "calculator"):
        assert len(load_task(name, {})) > 50
