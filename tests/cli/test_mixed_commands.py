"""What a mixture's parts are called on the command line, and the commands that a report prints."""

import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from made_runs import finished_run

import rung
from rung.cli import main as cli
from rung.cli.train import load_recipe, read
from rung.core.config import dumps_json
from rung.report import page
from rung.report.load import read_run
from rung.tasks.sandbox import Limits
from rung.train.config import TaskSpec

FILE = """
from rung.train.config import GroupRL, TaskSpec

def mine() -> GroupRL:
    return GroupRL(name="mine", task=TaskSpec(name="arithmetic", options={"digits": 3}), num_steps=7)
"""
MIXED = {
    "the_sums.task": "arithmetic",
    "the_sums.weight": 0.5,
    "the_sums.digits": 1,
    "rest.task": "mixture",
    "rest.a.task": "steps",
    "rest.b.task": "reasoning-gym:countdown",
    "rest.b.must_end": False,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a file of recipes, and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path


@pytest.mark.parametrize("task", [TaskSpec(name="arithmetic"), TaskSpec(name="mixture", options=MIXED)])
def test_the_commands_of_a_report_measure_as_the_run_did(here, monkeypatch, task):
    """Every limit of the verifier, and every option of a mixture's parts, a mixture among them."""
    limits = Limits(seconds=7.5, cpu_seconds=3, memory_bytes=1 << 31, processes=9, network=True)
    recipe = replace(load_recipe("mine.py:mine"), foreign=True, max_length=99, grading=limits, task=task)
    run = finished_run(here / "runs" / "mine", recipe.num_steps, recipe)
    evaluate = shlex.split(page._commands(read_run(run.folder)).splitlines()[0])
    asked = {}
    found = SimpleNamespace(accuracy=0.5, low=0.25, high=0.75, n=8, unknown=0)
    monkeypatch.setattr(rung, "load", lambda name, **more: asked.update(more), raising=False)
    monkeypatch.setattr(rung, "evaluate", lambda _, task, **more: asked.update(more, task=task) or found, raising=False)
    assert cli.main(evaluate[1:]) == 0
    assert (asked["foreign"], asked["max_length"], asked["limits"]) == (True, 99, limits)
    assert asked["task"] == task


def test_the_parts_of_a_mixture_are_typed_with_their_own_options(here):
    words = (
        "--task.name mixture --task.options.sums.task guess --task.options.sums.guesses=3 --task.options.b.task steps"
    )
    task = TaskSpec(name="mixture", options={"sums.task": "guess", "b.task": "steps", "sums.guesses": 3})
    recipe = read(["mine.py:mine", *words.split()])[1]
    assert recipe.task == task
    (here / "mixed.json").write_text(dumps_json(recipe))
    _, changed = read(["mixed.json", "--task.options.sums.weight", "2", "--task.options.c.task", "arithmetic"])
    assert changed.task.options == {**task.options, "c.task": "arithmetic", "sums.weight": 2.0}
