import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.core.errors import TaskError
from rung.core.words import Message, Problem
from rung.tasks.arithmetic import Arithmetic
from rung.tasks.base import draw, permuted, problem_id, problems, split_of


@dataclass(frozen=True)
class Listed:
    """Problems 0 to size - 1; `parts` names the split of some of them."""

    size: int
    parts: tuple[str, ...] = ()

    def __len__(self):
        return self.size

    def problem(self, index):
        facts = {"split": self.parts[index]} if index < len(self.parts) else {}
        return Problem(id=problem_id(str(index)), messages=(Message("user", str(index)),), facts=facts)

    def reply(self, problem, messages):
        return None

    def grade(self, answers):
        raise NotImplementedError


def ids(found):
    return [problem.id for problem in found]


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_is_one_for_every_size_and_key(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_of_different_keys_are_unrelated():
    """Of 1000 positions, two random permutations agree in about 1 (Poisson): more than 10 has probability 1e-8."""
    rows = [[permuted(i, 1000, key) for i in range(1000)] for key in (0, 1, 2, 2**63)]
    for i, a in enumerate(rows):
        for b in [*rows[:i], list(range(1000))]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) <= 10


@pytest.mark.parametrize("size", [2**62, 2**62 - 1, 10**30])
def test_a_permutation_of_an_astronomical_set_stays_inside_and_spreads(size):
    found = {permuted(i, size, 5) for i in range(200)}
    assert len(found) == 200
    assert max(found) < size
    assert (
        len({10 * x // size for x in found}) == 10
    )  # all tenths are visited: missing one has probability 10 * 0.9^200


def test_the_parts_of_a_task_are_disjoint_complete_and_of_the_promised_sizes():
    task = Arithmetic(digits=1, terms=3)
    parts = {split: ids(problems(task, split, len(task))) for split in ("train", "validation", "held_out")}
    everything = {task.problem(i).id for i in range(len(task))}
    assert sum(map(len, parts.values())) == len(everything) == 10 * 11 * 12 // 6  # unordered triples
    assert set().union(*parts.values()) == everything
    for split, share in {"train": 0.7, "validation": 0.1, "held_out": 0.2}.items():
        deviation = (share * (1 - share) / len(everything)) ** 0.5
        assert abs(len(parts[split]) / len(everything) - share) < 3 * deviation


def test_more_problems_begin_with_the_same_ones_and_a_seed_changes_them():
    task = Arithmetic()
    assert ids(problems(task, "held_out", 100))[:20] == ids(problems(task, "held_out", 20))
    assert len(set(ids(problems(task, "held_out", 100)))) == 100
    assert ids(problems(task, "held_out", 20, seed=1)) != ids(problems(task, "held_out", 20))


def test_the_parts_and_the_draws_are_the_same_in_every_process():
    code = (
        "from rung.tasks.arithmetic import Arithmetic; from rung.tasks.base import draw, problems;"
        "print([p.id for p in problems(Arithmetic(), 'held_out', 9) + draw(Arithmetic(), 9, seed=3, step=4)])"
    )
    out = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    here = problems(Arithmetic(), "held_out", 9) + draw(Arithmetic(), 9, seed=3, step=4)
    assert out == {str(ids(here))}


def test_a_step_draws_different_training_problems_and_only_those():
    task, seen = Arithmetic(), Counter()
    for step in range(60):
        drawn = draw(task, 16, seed=0, step=step)
        assert len(set(ids(drawn))) == 16
        assert {split_of(problem) for problem in drawn} == {"train"}
        seen.update(ids(drawn))
    assert len(seen) > 700  # of 2866 for 960 draws: about 816 are expected


def test_a_draw_is_a_function_of_seed_step_and_refill():
    task = Arithmetic()
    base = {"seed": 0, "step": 1, "refill": 0}
    assert ids(draw(task, 8, **base)) == ids(draw(task, 8, **base))
    for name in base:
        assert ids(draw(task, 8, **base)) != ids(draw(task, 8, **base | {name: 2}))


def test_every_training_problem_is_drawn_equally_often():
    task = Listed(40, ("train",) * 30 + ("held_out",) * 10)
    counts = Counter(name for step in range(750) for name in ids(draw(task, 4, seed=0, step=step)))
    assert len(counts) == 30
    deviation = (750 * 4 / 30 * (1 - 4 / 30)) ** 0.5  # each step takes a problem with probability 4/30
    assert all(abs(count - 100) < 4.5 * deviation for count in counts.values())


def test_a_step_larger_than_the_task_repeats_all_problems_evenly():
    drawn = draw(Listed(5, ("train",) * 3 + ("held_out",) * 2), 7, seed=0, step=0)
    assert sorted(Counter(ids(drawn)).values()) == [2, 2, 3]


def test_a_task_may_name_its_own_parts():
    task = Listed(6, ("held_out", "train", "validation", "train", "train", "train"))
    assert [p.messages[0].content for p in problems(task, "held_out", 9)] == ["0"]
    with pytest.raises(TaskError, match="must be train, validation or held_out, and is 'test'"):
        problems(Listed(1, ("test",)), "train", 1)


def test_an_empty_part_is_an_error_that_says_why():
    with pytest.raises(TaskError, match="no held_out problem among its 3: 7 of 10 problems are for training"):
        problems(Listed(3, ("train",) * 3), "held_out", 500)
    with pytest.raises(TaskError, match="no train problem among its 2"):
        draw(Listed(2, ("held_out",) * 2), 4, seed=0, step=0)


def test_a_problem_that_fails_in_the_middle_of_a_run_is_named_with_its_line():
    class Failing(Listed):
        def problem(self, index):
            return {}[index] if index == 3 else super().problem(index)

    with pytest.raises(TaskError, match=r"problem 3 of the task Failing failed: KeyError: 3 \(.*test_base.py, line "):
        problems(Failing(9), "held_out", 9)


def test_fewer_problems_than_asked_are_all_that_there_are():
    assert len(problems(Listed(9, ("held_out",) * 9), "held_out", 500)) == 9


def test_the_grading_child_imports_neither_torch_nor_numpy():
    code = "import rung.tasks.worker, sys; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
