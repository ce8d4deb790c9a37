"""The reader of run folders, on folders in every state a run can leave behind."""

import math

import pytest
from made_runs import RECIPE, answers, eval_row, finished_run, samples

from rung.core.errors import RunError
from rung.core.rundir import create
from rung.report.load import find_run, flat, read_run, wilson


def upper_root(right, n, z=1.959963984540054):
    """The larger root in p of (right/n - p)^2 = z^2 p (1 - p) / n, which defines Wilson's bound, by bisection."""
    share = right / n

    def miss(p):
        return (share - p) ** 2 - z * z * p * (1 - p) / n

    low, high = share, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if miss(middle) < 0 else (low, middle)
    return high


@pytest.mark.parametrize(("right", "n"), [(62, 500), (487, 500), (1, 3), (250, 500), (0, 40)])
def test_wilson_bounds_solve_the_equation_that_defines_them(right, n):
    low, high = wilson(right, n)
    assert high == pytest.approx(upper_root(right, n), abs=1e-12)
    assert low == pytest.approx(1 - upper_root(n - right, n), abs=1e-12)  # mirrored: wrong answers counted as right


def test_wilson_covers_the_true_share_more_often_than_the_plain_interval_does():
    n, p = 30, 0.95
    weight = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]

    def plain(k):
        half = 1.96 * math.sqrt(k / n * (1 - k / n) / n)
        return k / n - half, k / n + half

    covered = [
        sum(w for k, w in enumerate(weight) if low(k) <= p <= high(k))
        for low, high in (
            (lambda k: wilson(k, n)[0], lambda k: wilson(k, n)[1]),
            (lambda k: plain(k)[0], lambda k: plain(k)[1]),
        )
    ]
    assert covered[0] > 0.93 > covered[1]


def test_wilson_refuses_counts_that_cannot_be():
    for right, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"right={right}, n={n}"):
            wilson(right, n)


def test_a_finished_run_is_read_whole(tmp_path):
    finished_run(tmp_path / "run", steps=6)
    record = read_run(tmp_path / "run")
    assert record.finished
    assert [row["step"] for row in record.train] == [1, 2, 3, 4, 5, 6]
    assert [(a.step, a.n) for a in record.accuracies] == [(0, 500), (6, 500)]
    assert [a.step for a in record.validation] == [2, 4]  # the third set is not held-out
    assert len(record.pairs) == 40
    assert len(record.group) == 8
    assert record.notes == []


def test_a_run_is_finished_only_when_its_last_step_is_measured_and_its_model_written(tmp_path):
    run = create(tmp_path / "run", RECIPE, {})
    run.append("metrics", [eval_row(0, 5, 50)])
    run.append("metrics", [{"kind": "train", "step": step} for step in range(1, RECIPE.num_steps + 1)])
    assert not read_run(run.folder).finished
    run.append("metrics", [eval_row(RECIPE.num_steps, 40, 50)])
    assert not read_run(run.folder).finished
    (run.folder / "model").mkdir()
    assert read_run(run.folder).finished


def test_a_line_that_was_cut_off_is_left_out_and_said(tmp_path):
    run = create(tmp_path / "run", RECIPE, {})
    run.append("metrics", [{"kind": "train", "step": 1, "reward": 0.5}])
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2, "rew')
    record = read_run(run.folder)
    assert record.points("reward") == [(1, 0.5)]
    assert record.notes == ["metrics.jsonl: 1 line could not be read (cut off?) and left out."]


def test_what_is_not_a_finite_number_is_no_point(tmp_path):
    run = create(tmp_path / "run", RECIPE, {})
    rows = [{"kind": "train", "step": s, "reward": r} for s, r in ((1, None), (2, 0.25), (3, "x"))]
    run.append("metrics", rows)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "reward": NaN}\n')
    assert read_run(run.folder).points("reward") == [(2, 0.25)]


def test_answers_are_paired_by_problem_and_only_held_out_ones(tmp_path):
    run = create(tmp_path / "run", RECIPE, {})
    other = [row | {"split": "validation"} for row in answers(30, 10, 10)]
    run.append("evals", [*answers(0, 2, 20), *other, *reversed(answers(60, 7, 20))])
    pairs = read_run(run.folder).pairs
    assert len(pairs) == 20
    assert all(pair.before["problem"] == pair.after["problem"] == pair.problem for pair in pairs)
    # of ten problems 2 were right before and 7 after, and the order is the same: 2 + 5 + 0 + 3
    kinds = [pair.kind for pair in pairs[:10]]
    assert kinds == ["still right"] * 2 + ["became right"] * 5 + ["still wrong"] * 3


def test_a_run_that_was_measured_once_has_no_pairs_whatever_else_was_asked(tmp_path):
    run = create(tmp_path / "run", RECIPE, {})
    run.append("evals", [*answers(0, 2, 10), *(row | {"split": "validation"} for row in answers(30, 10, 10))])
    assert read_run(run.folder).pairs == []


def test_the_group_is_the_newest_even_in_a_file_too_long_to_read(tmp_path, monkeypatch):
    run = create(tmp_path / "run", RECIPE, {})
    for step in range(1, 30):
        run.append("samples", samples(step))
    monkeypatch.setattr("rung.report.load.TAIL_BYTES", 4000)
    record = read_run(run.folder)
    assert [row["step"] for row in record.group] == [29] * 8
    assert record.notes == []


def test_a_folder_without_a_run_or_of_another_version_is_refused_by_name(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        read_run(tmp_path)
    run = create(tmp_path / "run", RECIPE, {})
    (run.folder / "VERSION").write_text("rung-run 99\n")
    with pytest.raises(RunError, match="'rung-run 99'"):
        read_run(run.folder)


def test_a_run_is_found_by_path_and_by_name_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create("runs/one", RECIPE, {})
    assert find_run("one") == find_run("runs/one")
    assert str(find_run("two")) == "two"


def test_flat_names_every_leaf_once():
    nested = {"a": {"b": 1, "c": {"d": "text"}}, "e": [1, 2], "f": {}}
    assert list(flat(nested)) == [("a.b", "1"), ("a.c.d", "text"), ("e", "[1, 2]"), ("f", "{}")]
