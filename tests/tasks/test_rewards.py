"""Rewards in trl's form and ours, and mixtures of tasks."""

from collections import Counter

import pytest
from tasks.test_jsonl_tasks import GOOD, graded

from rung.core.errors import TaskError
from rung.core.words import Answer, Message
from rung.tasks.base import problems
from rung.tasks.load import absolute, load_task, packages, source_hash
from rung.tasks.sandbox import Grader

REWARDS = """
seen = []

def correct(prompts, completions, answer, **kwargs):
    seen.append((prompts, completions, answer, sorted(kwargs)))
    return [float(c == a) for c, a in zip(completions, answer)]

def short(completions, **kwargs):
    return [1.0 / (1 + len(c if isinstance(c, str) else c[0]["content"])) for c in completions]

def sometimes(prompts, completions, **kwargs):
    return [None if "?" in c else 0.5 for c in completions]

async def later(prompts, completions, log_metric, log_extra):
    log_extra("column", ["x"])
    log_metric("length", len(completions[0]))
    return [0.25]

def chat(prompts, completions, **kwargs):
    assert prompts == [[{"role": "user", "content": "q"}]] and kwargs["level"] == [3], (prompts, kwargs)
    return [completions == [[{"role": "assistant", "content": "hello"}]]]

def ours(problem, text, *, bonus=0.0):
    return text == problem.answer

def lost(problem, text):
    from rung.core.words import unknown
    return unknown("the judge is asleep")

def offline(problem, text): raise ConnectionError("the judge is far away")
def tokens(prompts, completions, completion_ids): return [0.0]
def another(prompts, completions, level): return [0.0]
def two(prompts, completions, **kwargs): return [0.0, 1.0]
def endless(prompts, completions, **kwargs): return [float("inf")]
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "r.py").write_text(REWARDS)
    return lambda *names: ", ".join(f"{tmp_path / 'r.py'}:{name}" for name in names)


def rewarded(data, rewards, *texts, row=None):
    task = load_task("rewards", {"data": data(row or {**GOOD, "level": 3}), "rewards": rewards})
    return [graded(task, 0, text) for text in texts]


def test_a_reward_is_the_weighted_sum_its_parts_are_kept_and_the_first_says_what_is_right(data, functions):
    right, wrong = rewarded(data, functions("correct", "short=0.5", "ours=-2"), "2", "333")
    assert (right.score, right.right, right.parts) == (1 + 0.25 - 2, True, {"correct": 1.0, "short": 0.5, "ours": 1.0})
    assert (wrong.score, wrong.right, wrong.parts) == (0.125, False, {"correct": 0.0, "short": 0.25, "ours": 0.0})


def test_none_does_not_apply_and_where_none_applies_the_grade_is_unknown(data, functions):
    left_out, both = rewarded(data, functions("correct", "sometimes"), "2?", "2")
    assert (left_out.score, left_out.parts) == (0.0, {"correct": 0.0})
    assert both.score == 1.5
    (nothing,) = rewarded(data, functions("sometimes"), "?")
    assert (nothing.known, nothing.error) == (False, "every reward function returned None: none applies to this answer")
    (lost,) = rewarded(data, functions("correct", "lost"), "2")
    assert not lost.known
    assert "r.py:lost: the judge is asleep" in lost.error


def test_the_first_reward_left_out_is_not_right(data, functions):
    (grade,) = rewarded(data, functions("sometimes", "ours"), "2?")
    assert not grade.right


def test_coroutines_and_conversations_are_handed_over_as_trl_does(data, functions):
    (grade,) = rewarded(data, functions("later"), "four")
    assert (grade.score, grade.parts) == (0.25, {"length": 4.0, "later": 0.25})
    row = {"prompt": [{"role": "user", "content": "q"}], "level": 3}
    assert [g.score for g in rewarded(data, functions("chat"), "hello", "bye", row=row)] == [1.0, 0.0]


def test_the_words_and_columns_are_those_that_trl_hands_over(data, functions, tmp_path):
    """By the source of trl's own GRPOTrainer: the names that it calls a reward function with."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    import inspect

    source = inspect.getsource(grpo.GRPOTrainer._calculate_rewards)
    assert "prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs" in source
    assert '["prompt", "completion", "completion_ids"]' in source
    given = {
        word for word in ("trainer_state", "log_extra", "log_metric", "environments") if f'kwargs["{word}"]' in source
    }
    assert given == {"trainer_state", "log_extra", "log_metric", "environments"}
    task = load_task(
        "rewards", {"data": data({"prompt": "1 + 1?", "answer": "2", "x": [1]}), "rewards": functions("correct")}
    )
    graded(task, 0, "2")
    seen = task._functions[0].function.__globals__["seen"]
    assert seen == [(["1 + 1?"], ["2"], ["2"], ["log_extra", "log_metric", "x"])]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tokens"], "asks for 'completion_ids', which Rung does not hand to a reward function"),
        (["another"], "asks for 'level', and the data has no such column"),
        (["corect"], "has no 'corect'. Did you mean 'correct'?"),
        (["correct=heavy"], "a reward is written FILE.py:NAME or FILE.py:NAME=WEIGHT, and this is"),
        (["correct=nan"], "a weight must be a finite number"),
        (["correct", "correct=2"], "is named twice"),
        ([], "needs a function in `rewards`"),
    ],
)
def test_functions_are_checked_before_a_run(names, message, data, functions):
    with pytest.raises(TaskError) as error:
        load_task("rewards", {"data": data(GOOD), "rewards": functions(*names)})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"), [("two", "one reward per completion"), ("endless", "must be a finite number")]
)
def test_what_is_no_reward_is_the_verifiers_failure(name, message, data, functions):
    with pytest.raises(TaskError, match=message):
        rewarded(data, functions(name), "2")


def test_a_reward_that_is_no_number_is_named_and_so_is_one_without_a_function(data, tmp_path):
    (tmp_path / "odd.py").write_text("def good(problem, text):\n    return 'good'\n")
    with pytest.raises(TaskError, match=r"a reward must be a number, and that of .*odd.py:good is 'good'"):
        rewarded(data, f"{tmp_path / 'odd.py'}:good", "2")
    with pytest.raises(
        TaskError, match=r"a reward names a file and a function in it, FILE.py:NAME, and this is 'odd.py'"
    ):
        load_task("rewards", {"data": data(GOOD), "rewards": "odd.py"})


def mixed(data, functions):
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(40)]
    return {
        "sums.task": "arithmetic",
        "sums.weight": 3,
        "sums.digits": 3,
        "mine.task": "rewards",
        "mine.data": data(*rows),
        "mine.rewards": functions("correct"),
        "long.task": "steps",
        "long.weight": 0.5,
        "long.largest": 9,
    }


def test_a_mixture_draws_its_parts_by_weight_each_with_all_its_problems(data, functions):
    """1000 draws, shares 3, 1 and 0.5 of 4.5: six standard deviations are missed once in 5e8 runs."""
    task = load_task("mixture", mixed(data, functions))
    draws = [task.problem((index * 2654435761) % len(task)) for index in range(1000)]
    counts = Counter(problem.task for problem in draws)
    for name, weight in (("sums", 3), ("mine", 1), ("long", 0.5)):
        share = weight / 4.5
        assert abs(counts[name] / 1000 - share) < 6 * (share * (1 - share) / 1000) ** 0.5
    assert len({problem.id for problem in draws if problem.task == "mine"}) == 40
    assert task.problem(77) == load_task("mixture", mixed(data, functions)).problem(77)


def test_a_mixture_hands_answers_to_the_part_they_belong_to_and_keeps_splits(data, functions):
    options = mixed(data, functions)
    task = load_task("mixture", options)
    some = {problem.task: problem for problem in problems(task, "train", 200)}
    answers = [
        Answer(problem=problem, text=text, stop="eos", num_tokens=1)
        for problem in some.values()
        for text in (problem.answer, "no")
    ]
    with Grader("mixture", options) as grader:
        grades = grader.grade(answers)
    assert [grade.right for grade in grades] == [True, False] * 3
    assert grades == task.grade(answers)
    held_out = {problem.id for problem in problems(task, "held_out", 50)}
    assert not held_out & {problem.id for problem in problems(task, "train", 200)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "arithmetic"}, "is written PART.OPTION (sums.task, sums.weight), and this is 'task'"),
        ({"a.digits": 2}, "the part a of a mixture needs a.task, the name of a task; it has digits"),
        ({"a.task": "arithmetic"}, "a mixture needs at least two parts"),
        (
            {"a.task": "arithmetic", "b.task": "arithmetic", "b.digit": 2},
            "the part b of the mixture: the task arithmetic has no option 'digit'",
        ),
        (
            {"a.task": "arithmetic", "b.task": "arithmetic", "b.weight": 0},
            "b.weight must be a positive number, and is 0",
        ),
    ],
)
def test_the_parts_of_a_mixture_are_checked(options, message):
    with pytest.raises(TaskError) as error:
        load_task("mixture", options)
    assert message in str(error.value)


def test_names_of_files_are_made_whole_and_their_text_is_part_of_a_runs_place(data, functions, tmp_path, monkeypatch):
    options = mixed(data, functions)
    monkeypatch.chdir(tmp_path)
    relative = {**options, "mine.data": "data.jsonl", "mine.rewards": "r.py:correct"}
    assert absolute("mixture", relative) == ("mixture", options)
    before = source_hash("mixture", options)
    (tmp_path / "r.py").write_text(REWARDS + "\n")
    assert source_hash("mixture", options) != before
    assert source_hash("arithmetic", {}) == source_hash("reasoning-gym:chain_sum", {}) == ""


def test_a_part_whose_verifier_fails_is_unknown_though_another_parts_works(data, functions):
    """No answer to its questions is known good, so that other answers of the batch say whether it works: its own."""
    rows = [{"question": f"{n}?"} for n in range(40)]
    options = {
        "sums.task": "arithmetic",
        "judged.task": "rewards",
        "judged.data": data(*rows),
        "judged.rewards": functions("offline"),
    }
    task = load_task("mixture", options)
    some = {problem.task: problem for problem in problems(task, "train", 200)}
    answers = [Answer(problem=some[name], text="7", stop="eos", num_tokens=1) for name in ("sums", "judged") * 2]
    with Grader("mixture", options) as grader:
        grades = grader.grade(answers)
    assert [grade.known for grade in grades] == [True, False] * 2
    assert "the judge is far away" in grades[1].error


def test_a_mixture_may_be_part_of_a_mixture():
    inner = {"task": "mixture", "one.task": "arithmetic", "one.digits": 1, "two.task": "steps"}
    options = {"sums.task": "arithmetic", **{f"both.{key}": value for key, value in inner.items()}}
    task = load_task("mixture", options)
    asked = problems(task, "train", 60)
    assert {problem.task for problem in asked} == {"sums", "both"}
    assert {problem.facts["part.part"] for problem in asked if problem.task == "both"} == {"one", "two"}
    answers = [Answer(problem=p, text=p.answer, stop="eos", num_tokens=1) for p in asked]
    assert all(grade.right for grade in task.grade(answers))
    assert [task.reply(problem, [*problem.messages, Message("assistant", "1")]) for problem in asked] == [None] * 60


KINDS = """
from rung.core.words import Grade, Message, Problem

class Kinds:
    def __len__(self):
        return 40

    def problem(self, index):
        kind = "odd" if index % 2 else "even"
        return Problem(id=str(index), messages=(Message("user", f"{index}?"),), task=kind, facts={"part": index})

    def reply(self, problem, messages):
        return None

    def grade(self, answers):
        given = [(a.problem.task, a.problem.facts) for a in answers]
        return [Grade(score=1.0, right=task == ("odd" if facts["part"] % 2 else "even")) for task, facts in given]
"""


def test_a_part_sees_its_problems_as_it_made_them(tmp_path):
    (tmp_path / "kinds.py").write_text(KINDS)
    task = load_task("mixture", {"a.task": f"{tmp_path / 'kinds.py'}:Kinds", "b.task": "arithmetic"})
    asked = [task.problem(index * len(task) // 80) for index in range(80)]
    mine = [Answer(problem=p, text="", stop="eos", num_tokens=1) for p in asked if p.task == "a"]
    assert len(mine) == 40
    assert all(grade.right for grade in task.grade(mine))


def test_the_packages_behind_a_task_are_named_and_files_that_are_gone_too(data, functions, tmp_path):
    named = {"a.task": "reasoning-gym:chain_sum", "b.task": "maths", "b.data": data(GOOD), "c.task": "arithmetic"}
    assert packages("mixture", named) == ("math-verify", "reasoning-gym")
    assert packages("maths", {"data": data(GOOD)}) == ("math-verify",)
    assert packages("arithmetic", {}) == packages("maths.py:reward", {}) == packages("mixture", mixed(data, functions))
    with pytest.raises(TaskError, match=r"gone\.jsonl, which the task maths is made of, cannot be read: No such file"):
        source_hash("maths", {"data": str(tmp_path / "gone.jsonl")})
