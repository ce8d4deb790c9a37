"""Episodes of several turns in whole runs: their streams, keys, bounds and records, and how they go on after a stop."""

import pytest
import torch
from train.games import game_recipe
from train.tiny import stop_after, tiny_folder, tiny_recipe, weights_of

import rung
from rung.core.errors import ConfigError, ModelError, TaskError
from rung.core.keys import derive_key
from rung.core.records import GroupRequest, Origin, Sampling
from rung.core.rundir import open_run
from rung.core.words import Grade, Message, Problem, Reply
from rung.engine.engine import Engine
from rung.report import page
from rung.tasks.sandbox import Grader
from rung.train import session as sessions
from rung.train.config import METHODS, Method, Optim, TaskSpec
from rung.train.data import sample_of
from rung.train.turns import Bounds, Opening, play


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Two steps of the game, uninterrupted."""
    return rung.train(game_recipe(folder, num_steps=2), folder=tmp_path_factory.mktemp("runs") / "game")


def test_a_tiny_model_learns_what_to_say_in_every_turn(folder, tmp_path):
    """The optimum is reward 1; at the start a letter has about one chance in 258."""
    changes = {"num_steps": 18, "samples_per_prompt": 16, "checkpoint_every": 18, "max_tokens": 2}
    done = rung.train(game_recipe(folder, options={"letters": "aa"}, **changes), folder=tmp_path / "run")
    rewards = [m["reward"] for m in open_run(done.folder).read("metrics") if m["kind"] == "train"]
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.95
    texts = {e["text"] for e in open_run(done.folder).read("evals") if e["step"] == 18}
    assert texts == {"assistant: aa\nuser: a\nassistant: aa"}


@pytest.mark.slow
def test_a_tiny_model_learns_to_say_another_letter_in_the_second_turn(folder, tmp_path):
    """One letter in both turns is worth 0.5, and only the environment's word tells the turns apart."""
    method = Method(advantage="mean", denominator="constant", entropy_coef=0.02)
    changes = {"num_steps": 60, "samples_per_prompt": 32, "max_tokens": 1, "method": method, "optim": Optim(lr=1e-2)}
    done = rung.train(game_recipe(folder, **changes), folder=tmp_path / "run")
    rewards = [m["reward"] for m in open_run(done.folder).read("metrics") if m["kind"] == "train"]
    assert rewards[-1] > 0.9


def test_a_run_records_whole_conversations(run, folder):
    samples = open_run(run.folder).read("samples")
    assert len(samples) == 2 * 4 * 4
    model = rung.load(folder)
    for sample in samples:
        first, second = sample["turns"]
        stream = sample["token_ids"]
        assert len(stream) == sum(turn["given"] + turn["sampled"] for turn in sample["turns"])
        assert first["given"] == 0
        said = [stream[: first["sampled"]], stream[first["sampled"] + second["given"] :]]
        texts = [model.tokenizer.decode(ids) for ids in said]
        assert sample["text"] == f"assistant: {texts[0]}\nuser: b\nassistant: {texts[1]}"
        between = model.tokenizer.decode(stream[first["sampled"] :][: second["given"]], skip_special_tokens=False)
        assert between == ("" if first["stop"] == "eos" else "</s>") + "<s>user b</s><s>"
        assert sample["end"] == "task"
    assert [m["turns"] for m in open_run(run.folder).read("metrics") if m["kind"] == "train"] == [2.0, 2.0]
    grades = open_run(run.folder).read("grades")
    assert [len([g for g in grades if kind in g]) for kind in ("reply", "grade")] == [32, 32]
    html = page.write(run.folder).read_text()
    assert "user: b\nassistant: " in html
    assert "answers an episode" in html
    assert all("assistant: " in e["text"] for e in open_run(run.folder).read("evals"))


def test_every_turn_is_drawn_under_a_key_of_its_own_from_the_whole_stream(run, folder):
    """Drawn again: the first turn under the key that it has in a run of one turn, the second under its number too."""
    model = rung.load(folder, dtype="fp32")
    engine = Engine(model.decoder, max_positions=256)
    sampling = Sampling(max_tokens=3, stop_ids=model.tokenizer.eos_ids)
    for sample in open_run(run.folder).read("samples")[:16]:  # of the first step, by the weights of the folder
        names = (0, sample["step"], sample["problem"], sample["draw"] + sample["sample"])
        assert sample["key"] == derive_key(*names)
        stream, at = list(model.prompt_ids([Message(*sample["prompt"].split(": "))])), 0
        for number, turn in enumerate(sample["turns"]):
            stream += sample["token_ids"][at : at + turn["given"]]
            at += turn["given"]
            key = derive_key(*names, *([number] if number else []))
            ((drawn,),), _ = engine.run([GroupRequest(prompt_ids=tuple(stream), keys=(key,), sampling=sampling)])
            assert list(drawn.token_ids) == sample["token_ids"][at : at + turn["sampled"]]
            assert drawn.stop == turn["stop"]
            stream, at = [*stream, *drawn.token_ids], at + turn["sampled"]


def test_sampler_and_learner_agree_on_every_turn(folder, tmp_path):
    """Weights that move by large steps; a token shifted by one between the turns would be 1e5 times over the limit."""
    done = rung.train(game_recipe(folder, num_steps=4, options={"letters": "abc"}), folder=tmp_path / "run")
    gaps = [m["gap_max"] for m in open_run(done.folder).read("metrics") if "gap_max" in m]
    assert gaps
    assert max(gaps) < 1e-4


def test_a_task_of_one_turn_is_sampled_to_the_bit_as_if_there_were_no_turns(folder, tmp_path):
    done = {}
    for turns in (1, 5):
        recipe = tiny_recipe(folder, max_turns=turns, method=METHODS["grpo"], num_steps=3)
        done[turns] = open_run(rung.train(recipe, folder=tmp_path / str(turns)).folder)
    for name in ("samples", "evals", "grades"):
        assert done[1].read(name) == done[5].read(name), name
    assert weights_of(done[1].folder) == weights_of(done[5].folder)
    assert all(len(s["turns"]) == 1 and s["end"] == "task" for s in done[1].read("samples"))


def test_a_reply_where_one_turn_was_asked_for_is_refused_before_anything_is_made(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"several turns, and max_turns is 1: set max_turns to how many answers"):
        rung.train(game_recipe(folder, max_turns=1), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="several turns, and max_turns is 1"):
        rung.evaluate(rung.load(folder), game_recipe(folder).task, problems=2)


TOOL = """
from rung.core.words import Grade, Message, Problem

class Tool:
    def __len__(self): return 40
    def problem(self, index): return Problem(id=str(index), messages=(Message("user", f"{index}"),), answer="0")
    def reply(self, problem, messages): return None if messages[-1].content in ("", "0") else [Message("user", "so?")]
    def grade(self, answers): return [Grade(score=0.0) for _ in answers]
"""


def test_a_reply_that_only_an_unusual_answer_gets_is_refused_as_soon_as_it_comes(folder, tmp_path):
    """A tool that is called by a mark looks like a task of one turn until the mark is written."""
    (tmp_path / "tool.py").write_text(TOOL)
    recipe = tiny_recipe(folder, task=TaskSpec(name=f"{tmp_path / 'tool.py'}:Tool"))
    with pytest.raises(ConfigError, match="several turns, and max_turns is 1"):
        rung.train(recipe, folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_turns": 0}, "max_turns must be at least 1"),
        ({"max_length": -1}, "max_length must be 0 .* or more"),
        ({"max_length": 9}, "must fit max_length's 9 positions"),
    ],
)
def test_limits_that_cannot_be_meant_are_refused_by_name(folder, tmp_path, changes, message):
    with pytest.raises((ConfigError, TaskError), match=message):
        rung.train(game_recipe(folder, **changes), folder=tmp_path / "run")


def limited(folder, *, samples=3, **bounds):
    """Episodes of a game of five letters under bounds, and what the grader was asked."""
    model, asked = rung.load(folder, dtype="fp32"), []
    task = game_recipe(folder, options={"letters": "abcde"}).task
    problem = Problem(id="p", messages=(Message("user", "a0"),), answer="a")
    opening = Opening(
        problem=problem,
        prompt_ids=model.prompt_ids(problem.messages),
        names=tuple((0, number) for number in range(samples)),
    )
    with Grader(task.name, task.options) as grader:

        def judge(questions):
            answers = [episode.answer(final=over) for _, _, episode, over in questions]
            asked.append([(answer.final, len(answer.messages)) for answer in answers])
            return grader.judge(answers)

        (graded,), _ = play(
            model,
            Engine(model.decoder, max_positions=256),
            [opening],
            sampling=Sampling(max_tokens=2, stop_ids=model.tokenizer.eos_ids),
            bounds=Bounds(**{"max_turns": 9, "max_length": 256} | bounds),
            judge=judge,
        )
    return opening, graded, asked


def test_an_episode_ends_when_the_task_says_so(folder):
    _, graded, asked = limited(folder)
    assert [(len(episode.turns), episode.end) for episode, _ in graded] == [(5, "task")] * 3
    assert asked == [[(False, 2 * turn)] * 3 for turn in range(1, 6)]


def test_an_episode_of_max_turns_is_graded_as_it_is(folder):
    _, graded, asked = limited(folder, max_turns=3)
    assert [(len(episode.turns), episode.end) for episode, _ in graded] == [(3, "turns")] * 3
    assert [final for batch in asked for final, _ in batch] == [False] * 6 + [True] * 3
    assert all(grade.known for _, grade in graded)


def test_an_episode_that_has_no_room_for_another_answer_is_graded_as_it_is(folder):
    """One position less than the third answer needs, and one turn fewer."""
    opening, graded, _ = limited(folder, samples=1)
    ((episode, _),) = graded
    used = len(opening.prompt_ids) + sum(
        len(turn.given_ids) + len(turn.completion.token_ids) for turn in episode.turns[:2]
    )
    needed = used + len(episode.turns[2].given_ids) + 2
    for length, turns in ((needed, 3), (needed - 1, 2)):
        _, ((short, grade),), asked = limited(folder, samples=1, max_length=length)
        assert (len(short.turns), short.end) == (turns, "room")
        assert short.turns == episode.turns[:turns]
        assert asked[-1] == [(True, 2 * turns)]
        assert grade.known


def test_the_stream_of_an_episode_is_trained_on_where_it_was_sampled_and_nowhere_else(folder):
    opening, graded, _ = limited(folder, samples=1)
    ((episode, _),) = graded
    sample = sample_of(
        opening.prompt_ids,
        episode.turns[0].completion,
        later=episode.turns[1:],
        problem_id="p",
        group_id=0,
        reward=0.0,
    )
    assert sample.token_ids.tolist() == [*opening.prompt_ids, *episode.token_ids]
    assert sample.prompt_length == len(opening.prompt_ids)
    sampled = [turn.completion for turn in episode.turns]
    assert sample.token_ids[sample.trainable].tolist() == [token for c in sampled for token in c.token_ids]
    logp = [value for c in sampled for value in c.logp_sampled]
    assert sample.streams["logp_sampled"][sample.trainable].tolist() == pytest.approx(logp)
    assert not sample.streams["logp_sampled"][~sample.trainable].any()
    kinds = {Origin(kind) for kind in sample.origin[~sample.trainable].tolist()}
    assert kinds == {Origin.PROMPT, Origin.TOOL, Origin.TEMPLATE}
    assert torch.equal(sample.trainable, sample.origin == Origin.SAMPLED)


KINDS = {
    "two turns": {},
    "a reference in the loss": {"method": Method(advantage="mean", kl="k3_loss", kl_coef=0.5)},
    "two updates a rollout": {"method": METHODS["grpo"], "updates_per_rollout": 2},
    "an environment that says another thing every time": {"options": {"letters": "abc", "moody": True}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_several_turns_is_interrupted_and_goes_on_bit_for_bit(folder, tmp_path, kind):
    recipe = game_recipe(folder, **{"num_steps": 4, "checkpoint_every": 2} | KINDS[kind])
    with pytest.raises(MemoryError):
        rung.train(recipe, folder=tmp_path / "run", listener=dies_after(3))
    before = [s for s in open_run(tmp_path / "run").read("samples") if s["step"] == 3]
    rung.resume(tmp_path / "run")
    assert [s for s in open_run(tmp_path / "run").read("samples") if s["step"] == 3] == before
    if kind == "an environment that says another thing every time":
        return  # step 4 was never judged before: it is another one
    rung.train(recipe, folder=tmp_path / "whole")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    for name in ("samples.jsonl", "evals.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def dies_after(step):
    """A listener in which the run dies, so that `step`, which no checkpoint holds, must be repeated."""

    def listener(news):
        if news.stage == "train" and news.done == step:
            raise MemoryError("killed")

    return listener


def test_a_resumed_run_asks_neither_verifier_nor_environment_again(folder, tmp_path, monkeypatch):
    recipe = game_recipe(folder, num_steps=4, checkpoint_every=2)
    with pytest.raises(MemoryError):
        rung.train(recipe, folder=tmp_path / "run", listener=dies_after(3))
    asked, judge = [], sessions.Grader.judge
    with monkeypatch.context() as patch:
        patch.setattr(sessions.Grader, "judge", lambda self, answers: asked.extend(answers) or judge(self, answers))
        rung.resume(tmp_path / "run")
    assert len(asked) == 2 * (16 + 5), "two turns of step 4, and of the last evaluation; step 3 was judged before"


def test_an_interrupted_run_of_several_turns_is_saved(folder, tmp_path):
    recipe = game_recipe(folder, num_steps=3, checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        rung.train(recipe, folder=tmp_path / "run", listener=stop_after(1))
    assert rung.resume(tmp_path / "run").summary["steps"] == 3


def test_an_evaluation_plays_every_problem_to_its_end(folder):
    found = rung.evaluate(rung.load(folder), game_recipe(folder).task, problems=3, max_tokens=2, max_turns=2)
    assert found.n == 3
    for answer in found.answers:
        assert [m.role for m in answer.earlier] == ["assistant", "user"]
        assert answer.earlier[1] == Message("user", "b")
        assert answer.num_tokens <= 4


def test_a_template_that_cannot_say_the_reply_ends_the_run_with_the_reason(folder, tmp_path):
    model = rung.load(folder)
    text = model.tokenizer
    text.template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="writes an answer 0 times"):
        rung.evaluate(model, game_recipe(folder).task, problems=1, max_tokens=2, max_turns=2)


def test_a_judge_s_words_reach_the_learner_in_order(folder):
    """Of three samples one ends at once, one goes on: grades stay with their samples."""
    model, seen = rung.load(folder, dtype="fp32"), []

    def judge(questions):
        seen.append([j for _, j, _, _ in questions])
        turn = len(seen)
        said = [Grade(score=float(10 * j + turn)) for j in seen[-1]]
        return [
            s if j != turn else Reply(messages=(Message("user", "on"),)) for j, s in zip(seen[-1], said, strict=True)
        ]

    problem = Problem(id="p", messages=(Message("user", "a"),))
    opening = Opening(problem=problem, prompt_ids=(1, 2), names=((0,), (1,), (2,)))
    (graded,), _ = play(
        model,
        Engine(model.decoder, max_positions=256),
        [opening],
        sampling=Sampling(max_tokens=2),
        bounds=Bounds(max_turns=3, max_length=256),
        judge=judge,
    )
    assert seen == [[0, 1, 2], [1]]
    assert [(grade.score, len(episode.turns)) for episode, grade in graded] == [(1.0, 1), (12.0, 2), (21.0, 1)]


def test_what_an_episode_may_hold_is_in_the_estimate(folder):
    one = rung.estimate(game_recipe(folder, max_turns=1, options={"letters": "a"}))
    four = rung.estimate(game_recipe(folder, max_turns=4, options={"letters": "a"}))
    short = rung.estimate(game_recipe(folder, max_turns=4, max_length=16, options={"letters": "a"}))
    cache = [next(line for line in found.lines if "cache" in line) for found in (one, four, short)]
    assert four.seconds > one.seconds
    assert four.bytes > short.bytes >= one.bytes, cache
