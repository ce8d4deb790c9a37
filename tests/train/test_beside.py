"""What the default recipe is measured beside: the variants of its task, supervision, and the command as a whole."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from train.tiny import tiny_folder, tiny_recipe

from bench import beside
from bench.beside_tasks import AnyNumber, CoinFlips, FourShots
from rung.core.keys import derive_key
from rung.core.records import Completion, Sampling, Turn
from rung.core.words import Answer
from rung.tasks.arithmetic import Arithmetic, last_number
from rung.tasks.base import split_of
from rung.tasks.sandbox import Grader
from rung.train.config import TaskSpec
from rung.train.run import train
from rung.train.turns import Episode

OPTIONS = {"prompt": "{expression}", "opening": "{expression} ="}


@pytest.fixture
def run(tmp_path):
    """A finished run of one step on sums, with a tiny model."""
    task = TaskSpec(name="arithmetic", options=OPTIONS)
    recipe = tiny_recipe(tiny_folder(tmp_path / "model"), name="sums", task=task, num_steps=1, eval_every=0)
    train(recipe, folder=tmp_path / "sums")
    return recipe, tmp_path / "sums"


def _answers(task, text, stop="eos", count=1):
    return [Answer(problem=task.problem(index), text=text, stop=stop, num_tokens=3) for index in range(count)]


def test_the_lenient_parser_takes_any_number_however_the_text_ends():
    task = AnyNumber("arithmetic")
    assert task.problem(0).answer == "20"
    cases = {"20": True, "20 or 21": True, "is 21, no, 020.0 or": True, "21": False, "120": False, "": False}
    assert {text: task.grade(_answers(task, text, "length"))[0].right for text in cases} == cases


def test_solved_examples_are_four_right_sums_of_the_training_part_before_the_question():
    task, plain = FourShots("arithmetic", system="s", **OPTIONS), Arithmetic(system="s", **OPTIONS)
    for index in (0, 17, 4000):
        problem, alone = task.problem(index), plain.problem(index)
        assert (problem.id, problem.answer) == (alone.id, alone.answer)
        assert problem.messages[:1] + problem.messages[-2:] == alone.messages
        shots = problem.messages[1:-2]
        assert [m.role for m in shots] == ["user", "assistant"] * 4
        for asked, solved in zip(shots[::2], shots[1::2], strict=True):
            left, right = map(int, asked.content.split(" + "))
            assert solved.content == f"{asked.content} = {left + right}"
            assert split_of(plain.problem((left - 10) + 90 * (right - 10))) == "train"


def test_a_task_with_working_has_variants_too():
    """The lenient parser looks for the sum, not for the working; an example is answered with its working."""
    options = {"largest": 9, "terms": 3, "examples": 0}
    problem = FourShots("steps", **options).problem(3)
    plain = FourShots("steps", **options).task.problem(3)
    assert problem.messages[-1] == plain.messages[-1]
    assert all(m.content.count("=") == 2 and "Answer:" in m.content for m in problem.messages[1:-1:2])
    total = last_number(plain.answer)
    asked = Answer(problem=problem, text=f"I say {total}, or so", stop="length", num_tokens=3)
    assert AnyNumber("steps", **options).grade([asked])[0].right
    assert not AnyNumber("steps", **options).grade([replace(asked, text=f"{total}1")])[0].right


def test_coin_flips_are_even_differ_between_equal_answers_and_leave_the_accuracy_alone():
    task = CoinFlips("arithmetic")
    answers = _answers(task, "20", count=400)
    grades = task.grade([replace(answer, key=derive_key(0, n)) for n, answer in enumerate(answers)])
    assert 160 < sum(g.score for g in grades) < 240
    assert [g.right for g in grades] == [a.problem.answer == "20" for a in answers]


def test_in_a_run_equal_answers_to_one_problem_get_coins_of_their_own_and_the_same_ones_again():
    """Through the grading child, which grades one answer at a time: 200 even coins lie within 100 +- 30, to 2e-5."""
    name = f"{beside.beside_tasks.__file__}:CoinFlips"
    (answer,) = _answers(CoinFlips("arithmetic"), "20")
    answers = [replace(answer, key=derive_key(0, 1, answer.problem.id, n)) for n in range(200)]
    with Grader(name, {"of": "arithmetic"}) as grader:
        grades = grader.grade(answers)
        assert grader.grade(answers[::-1]) == grades[::-1]
    assert 70 < sum(g.score for g in grades) < 130
    neighbours = sum(a.score == b.score for a, b in itertools.pairwise(grades))
    assert 70 < neighbours < 130


def test_every_sample_is_graded_under_its_own_key():
    completion = Completion(
        token_ids=(1, 2), logp_sampled=(0.0,) * 2, logp_raw=(0.0,) * 2, stop="eos", policy_version=0, weights_hash="",
        sampling=Sampling(max_tokens=2), key=123,
    )  # fmt: skip
    episode = Episode(problem=Arithmetic().problem(0), turns=(Turn(completion=completion),), text="20")
    assert episode.answer(final=True).key == 123


def test_supervision_raises_the_likelihood_of_the_right_answer(run):
    recipe, _ = run
    tutor = beside.Tutor(recipe, num_steps=12)
    problem = tutor.task.problem(5)
    prompt = tutor.model.prompt_ids(problem.messages)
    answer = tutor.model.tokenizer.encode(f" {problem.answer}")
    answer.append(tutor.model.tokenizer.eos_ids[0])

    def likelihood():
        with torch.no_grad():
            logits_BTV = tutor.model.logits(torch.tensor([[*prompt, *answer]]))
        logp_TV = logits_BTV[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logp_TV.gather(1, torch.tensor(answer)[:, None]).sum().item()

    tutor.learner.optim = beside.replace(tutor.learner.optim, lr=3e-3, warmup=0)
    before = likelihood()
    tutor.teach()
    assert likelihood() > before + 2


def test_the_whole_command_prints_and_records_every_line(run, monkeypatch, tmp_path, capsys):
    _, folder = run
    seen = []
    monkeypatch.setattr(beside, "record", seen.append)
    monkeypatch.setattr(sys, "argv", ["beside", str(folder)])
    beside.main()
    out = capsys.readouterr().out
    assert len(seen) == 11
    assert all(one["what"].removeprefix("beside sums: ") in out for one in seen)
    assert all(one["n"] == 5 for one in seen)
    assert (tmp_path / "sums-random-rewards" / "model").is_dir()
    seen.clear()
    monkeypatch.setattr(sys, "argv", ["beside", str(folder), "--only", "random"])
    beside.main()
    assert [one["what"] for one in seen] == ["beside sums: the same recipe with random rewards"]
