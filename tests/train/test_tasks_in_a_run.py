"""What a run and an evaluation ask of a task before they begin, and what becomes of grades that are unknown."""

import json
from dataclasses import replace

import pytest
from train.tiny import tiny_folder, tiny_recipe

import rung
from rung.core.errors import ConfigError, TaskError
from rung.core.rundir import open_run
from rung.core.words import Answer, Grade, Message, Problem
from rung.train.config import TaskSpec
from rung.train.evaluate import Evaluation
from rung.train.run import by_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


def listed(path, rows, reward="1.0"):
    """A task file with these problems."""
    path.write_text(f"problems = {rows!r}\ndef reward(problem, text): return {reward}\n")
    return TaskSpec(name=f"{path}:reward")


PARTS = [{"prompt": f"{part} {n}", "split": part} for part in ("train", "validation", "held_out") for n in range(4)]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("train", "no train problem among its 8"),
        ("validation", "no validation problem among its 8: .* eval_every = 3 asks validation problems: set it to 0"),
        ("held_out", "no held_out problem among its 8"),
    ],
)
def test_a_part_that_the_run_will_ask_and_that_is_empty_is_refused_before_anything_is_made(
    folder, tmp_path, part, message
):
    task = listed(tmp_path / "parts.py", [row for row in PARTS if row["split"] != part])
    with pytest.raises(TaskError, match=message):
        rung.train(tiny_recipe(folder, task=task), folder=tmp_path / "run")
    with pytest.raises(TaskError, match=message):
        rung.estimate(tiny_recipe(folder, task=task))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("eval_every", [0, 2])
def test_a_run_that_asks_no_validation_problem_needs_none(folder, tmp_path, eval_every):
    task = listed(tmp_path / "parts.py", [row for row in PARTS if row["split"] != "validation"])
    recipe = tiny_recipe(folder, task=task, eval_every=eval_every, num_steps=2)
    assert rung.train(recipe, folder=tmp_path / "run").summary["steps"] == 2


def test_a_listed_problem_that_is_too_long_is_refused_by_its_words_before_anything_is_made(folder, tmp_path):
    """The tiny model has 256 positions, a byte takes one."""
    rows = [{"prompt": f"short {n}"} for n in range(40)]
    long = {"prompt": "long " * 60, "split": "train"}
    recipe = tiny_recipe(folder, task=listed(tmp_path / "long.py", [*rows, long]))
    with pytest.raises(
        TaskError, match=r"must fit the model's 256 positions, and 'long long .*' takes 3\d\d tokens, with 5"
    ):
        rung.train(recipe, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_problems_that_just_fit_are_trained_on(folder, tmp_path):
    """The self-test at the start asks for no more room than the run does."""
    model, recipe = rung.load(folder), tiny_recipe(folder, num_steps=1, eval_every=0)
    room = model.decoder.config.max_positions - recipe.max_tokens - len(model.prompt_ids([Message("user", "")]))
    task = listed(tmp_path / "edge.py", [{"prompt": f"{n:0{room}d}"} for n in range(20)])
    assert rung.train(replace(recipe, task=task), folder=tmp_path / "run").summary["steps"] == 1


def test_an_evaluation_takes_a_name_and_refuses_what_is_too_long_or_none_at_all(folder, tmp_path):
    model = rung.load(folder)
    assert rung.evaluate(model, "arithmetic", problems=2).n == 2
    task = listed(tmp_path / "long.py", [{"prompt": f"{n} " + "long " * 60} for n in range(40)])
    with pytest.raises(TaskError, match="must fit the model's 256 positions"):
        rung.evaluate(model, task.name)
    fits = model.decoder.config.max_positions - len(model.prompt_ids([Message("user", "short")]))
    task = listed(tmp_path / "edge.py", [{"prompt": "short", "split": "held_out"}])
    assert rung.evaluate(model, task, max_tokens=fits).n == 1
    with pytest.raises(TaskError, match="must fit the model's 256 positions, and 'short' takes"):
        rung.evaluate(model, task, max_tokens=fits + 1)
    with pytest.raises(ConfigError, match="problems must be at least 1, not 0"):
        rung.evaluate(model, "arithmetic", problems=0)


def test_an_evaluation_divides_by_the_known_grades_and_fails_where_there_is_none(folder, tmp_path):
    rows = [{"prompt": f"{n}", "answer": "y", "split": "held_out"} for n in range(4)]
    header, model, news = "__import__('rung.core.words').core.words.unknown('asleep')", rung.load(folder), []
    some = listed(tmp_path / "some.py", rows, f"{header} if problem.messages[0].content < '2' else 1.0")
    found = rung.evaluate(model, some, listener=news.append)
    assert (found.accuracy, found.n, found.unknown) == (1.0, 2, 2)
    assert news[-1].metrics["accuracy_held_out"] == 1.0
    with pytest.raises(TaskError, match=r"the verifier graded none of 4 answers: asleep\. Mend the task"):
        rung.evaluate(model, listed(tmp_path / "none.py", rows, header))


PARTLY = """
import itertools
from rung.core.words import unknown

problems = [{"prompt": f"{n}", "answer": "y", "split": "train" if n < 4 else "held_out"} for n in range(6)]
asked = itertools.count()  # the order in which answers come

def reward(problem, text):
    number = int(problem.messages[0].content)
    lost = {0: 3, 1: 2}.get(number, 0)  # of 4 samples
    turn = next(asked) % 4
    return unknown("asleep") if turn < lost and number < 4 else float(turn + number)
"""


def test_a_group_with_fewer_than_two_known_grades_is_not_trained_on_and_unknown_samples_never_are(folder, tmp_path):
    """All four training problems are asked: of 4 grades, problem 0 has 1 known, problem 1 has 2, the others 4."""
    (tmp_path / "partly.py").write_text(PARTLY)
    recipe = tiny_recipe(
        folder, task=TaskSpec(name=f"{tmp_path / 'partly.py'}:reward"), num_steps=2, eval_every=0, eval_problems=4
    )
    run = open_run(rung.train(recipe, folder=tmp_path / "run").folder)
    steps = [r for r in run.read("metrics") if r["kind"] == "train"]
    assert [(m["groups"], m["groups_trained"], m["groups_dropped"]) for m in steps] == [(4, 3, 1)] * 2
    assert [m["unknown"] for m in steps] == [5 / 16] * 2
    groups = {}
    for sample in run.read("samples")[:16]:
        groups.setdefault(int(sample["prompt"].split()[-1]), []).append(sample)
    assert {number: [s["known"] for s in group].count(True) for number, group in groups.items()} == {0: 1, 1: 2, 2: 4, 3: 4}  # fmt: skip  # noqa: E501
    assert [s["advantage"] for s in groups[0]] == [None] * 4
    for number in (1, 2, 3):
        known = [s for s in groups[number] if s["known"]]
        baseline = sum(s["score"] for s in known) / len(known)  # of the known alone
        assert [s["advantage"] for s in known] == pytest.approx([s["score"] - baseline for s in known])
        assert all(s["advantage"] is None for s in groups[number] if not s["known"])


def test_a_mixture_is_reported_task_by_task_and_how_the_child_is_confined_is_kept(folder, tmp_path):
    options = {"a.task": "arithmetic", "a.digits": 1, "b.task": "arithmetic", "b.digits": 2}
    recipe = tiny_recipe(folder, task=TaskSpec(name="mixture", options=options), num_steps=1, eval_problems=12)
    run = open_run(rung.train(recipe, folder=tmp_path / "run").folder)
    evals = [r for r in run.read("metrics") if r["kind"] == "eval" and r["split"] == "held_out"]
    assert [set(r["by_task"]) for r in evals] == [{"a", "b"}] * 2
    assert run.environment()["grading"].startswith("processes ")


def test_accuracy_by_task_counts_known_grades_alone_and_leaves_out_a_task_without_any():
    graded = [("a", 1.0), ("a", 0.0), ("a", 1.0), ("a", None), ("b", 0.0), ("c", None)]
    problems = [Problem(id=str(n), messages=(Message("user", "?"),), task=task) for n, (task, _) in enumerate(graded)]
    grades = [Grade(score=score, right=bool(score)) for _, score in graded]
    answers = tuple(Answer(problem=problem, text="", stop="eos", num_tokens=1) for problem in problems)
    numbers = {"accuracy": 0.5, "low": 0.0, "high": 1.0, "n": 4, "unknown": 2, "ended": 1.0}
    found = Evaluation(**numbers, answers=answers, grades=tuple(grades))
    assert by_task(found) == {"a": pytest.approx(2 / 3), "b": 0.0}


def test_a_question_of_two_parts_that_is_learnt_in_one_and_held_out_in_the_other_is_refused(folder, tmp_path):
    (tmp_path / "r.py").write_text("def g(problem, text): return 1.0\n")
    for name, split in (("d", "train"), ("e", "held_out")):
        rows = [{"prompt": f"{name} {n}", "answer": "1", "split": split} for n in range(9)]
        rows += [
            {"prompt": "both", "answer": "1", "split": split},
            {"prompt": "either", "answer": name, "split": split},
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        f"{name}.{key}": value
        for name in "de"
        for key, value in {
            "task": "rewards",
            "data": str(tmp_path / f"{name}.jsonl"),
            "rewards": f"{tmp_path / 'r.py'}:g",
        }.items()
    }
    with pytest.raises(TaskError, match="'both' is a train problem in one part of the mixture, and a held_out"):
        rung.train(
            tiny_recipe(folder, task=TaskSpec(name="mixture", options=options), eval_every=0), folder=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_a_task_without_its_file_is_refused_before_the_model_is_looked_for(tmp_path):
    recipe = tiny_recipe(tmp_path / "no-model", task=TaskSpec(name="maths", options={"data": ""}))
    for ask in (rung.train, rung.estimate):
        with pytest.raises(TaskError, match="the task maths needs `data`"):
            ask(recipe)


def test_a_recipe_for_a_file_without_one_asks_for_it(folder, tmp_path):
    (tmp_path / "r.py").write_text("def g(problem, text): return 1.0\n")
    nothing = {"data": ""}
    given = {"maths": nothing, "rewards": {**nothing, "rewards": f"{tmp_path / 'r.py'}:g"}}
    for name, options in given.items():
        with pytest.raises(TaskError, match=f"the task {name} needs `data`, a file of JSON lines"):
            rung.train(tiny_recipe(folder, task=TaskSpec(name=name, options=options)), folder=tmp_path / "run")


def test_every_line_of_a_file_is_looked_at_before_a_run_is_made(folder, tmp_path):
    """Also where the file is a part of a mixture; the 64 problems that are looked at elsewhere would miss the line."""
    rows = [{"prompt": f"short {n}"} for n in range(300)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "long " * 60, "split": "train"}])))
    (tmp_path / "r.py").write_text("def g(problem, text): return 1.0\n")
    options = {"data": str(tmp_path / "d.jsonl"), "rewards": f"{tmp_path / 'r.py'}:g"}
    alone = TaskSpec(name="rewards", options=options)
    parts = {"a.task": "arithmetic", "b.task": "rewards", **{f"b.{key}": value for key, value in options.items()}}
    for task in (alone, TaskSpec(name="mixture", options=parts)):
        with pytest.raises(TaskError, match=r"must fit the model's 256 positions, and 'long long"):
            rung.train(tiny_recipe(folder, task=task), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_part_of_several_turns_is_told_apart_before_a_run_is_made(folder, tmp_path):
    parts = {"a.task": "arithmetic", "b.task": "guess"}
    with pytest.raises(ConfigError, match="max_turns is 1"):
        rung.train(tiny_recipe(folder, task=TaskSpec(name="mixture", options=parts)), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
