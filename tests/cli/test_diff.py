"""`rung diff`: what it prints, as text and as JSON, and what it says to runs that are none."""

import json
from dataclasses import replace

import pytest
from made_runs import ENVIRONMENT, RECIPE, answers, finished_run

from rung.cli import main as cli
from rung.core.rundir import create


def typed(capsys, *words):
    code = cli.main(["diff", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "runs" / "one")
    other = finished_run(tmp_path / "runs" / "two", recipe=replace(RECIPE, name="two", max_tokens=32))
    other.drop("evals", lambda row: row["step"] == 60)
    other.append("evals", answers(60, 4, 40))
    return tmp_path


def test_two_runs_are_compared_by_name(place, capsys):
    code, out, _ = typed(capsys, "one", "two")
    assert code == 0
    assert "first: runs/one  finished, 60/60 steps\nsecond: runs/two  finished, 60/60 steps\n" in out
    assert "\n  max_tokens  16  32\n" in out
    assert "environment\n  no difference\n" in out
    assert "second less first: -50.0 points (95 % interval " in out
    assert "), more than chance\n" in out
    assert "of 40 problems that both answered, 20 solved by the first alone, 0 by the second: p = 1.91e-06" in out
    assert "  reward " in out
    assert "only the first solved: 20 problems, of which 5 are shown\n  What is 14 + 19?  (answer: 33)\n" in out
    assert "    first: 33\n    second: The answer is 34, because␊I guess so.\n" in out
    assert "only the second solved" not in out


def test_json_has_everything(place, capsys):
    code, out, _ = typed(capsys, "one", "runs/two", "--json")
    found = json.loads(out)
    assert code == 0
    assert [run["name"] for run in found["runs"]] == ["made-up", "two"]
    assert found["config"] == {"max_tokens": [16, 32]}
    assert found["after"]["only_first"] == len(found["solved"]) == 20
    assert found["runs"][0]["held_out"][1]["value"] == 0.974


def test_a_run_that_was_stopped_is_compared_as_far_as_it_came(place, capsys):
    create(place / "runs" / "new", RECIPE, ENVIRONMENT | {"threads": 5})
    code, out, _ = typed(capsys, "one", "new")
    assert code == 0
    assert "second: runs/new  not finished, 0/60 steps (to go on: rung resume runs/new)" in out
    assert "not measured" in out
    assert "threads  2  5" in out
    assert "chance" not in out


def test_what_is_no_run_is_named(place, capsys):
    code, out, err = typed(capsys, "one", "three")
    assert (code, out) == (1, "")
    assert "three is not a run folder" in err
    (place / "runs" / "two" / "VERSION").write_text("rung-run 99\n")
    code, _, err = typed(capsys, "one", "two")
    assert code == 1
    assert "was written in the format 'rung-run 99'" in err


def test_one_run_twice_and_a_missing_word_are_misunderstandings(place, capsys):
    assert typed(capsys, "one", place / "runs" / "one")[::2] == (
        2,
        "error: rung diff needs two runs, and runs/one came twice.\n",
    )
    assert typed(capsys, "one")[0] == 2
    assert typed(capsys)[0] == 2


def test_what_a_model_said_cannot_steer_the_terminal(place, capsys):
    path = place / "runs" / "two" / "evals.jsonl"
    path.write_text(path.read_text().replace("I guess so", "\\u001b[2J"))
    out = typed(capsys, "one", "two")[1]
    assert "\x1b" not in out
    assert "␛[2J" in out
