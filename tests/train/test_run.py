"""Whole runs of a tiny model: what they learn, what they leave on disk, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from train.tiny import tiny_decoder, tiny_recipe, weights_of

import rung
from rung.core.errors import ConfigError, NonFiniteError, RunError, RungError
from rung.core.keys import derive_key
from rung.core.records import Completion, GroupRequest, Sampling, Turn
from rung.core.rundir import open_run
from rung.core.words import Grade, Problem
from rung.engine.engine import Engine
from rung.engine.types import WeightsRef
from rung.lm import linear
from rung.lm.block import Block
from rung.report import page
from rung.train import session as sessions
from rung.train.config import METHODS, Optim, TaskSpec
from rung.train.data import count, pack_one, sample_of
from rung.train.grpo import gap, refuse_stale
from rung.train.policy import LanguagePolicy
from rung.train.rollouts import Ask, Group
from rung.train.turns import Episode


def test_a_tiny_model_learns_to_answer_with_the_letter_that_is_rewarded(folder, tmp_path):
    """The optimum is reward 1; at the start the letter has about one chance in 258."""
    recipe = tiny_recipe(
        folder,
        num_steps=25,
        samples_per_prompt=16,
        eval_every=0,
        max_tokens=2,
        optim=Optim(lr=3e-2),
        checkpoint_every=25,
    )
    run = rung.train(recipe, folder=tmp_path / "run")
    metrics = [r for r in open_run(run.folder).read("metrics") if r["kind"] == "train"]
    assert metrics[0]["reward"] < 0.1
    assert metrics[-1]["reward"] > 0.95
    texts = [r["text"] for r in open_run(run.folder).read("evals") if r["step"] == 25]
    assert set(texts) == {"aa"}


def test_a_run_leaves_its_records(whole, folder):
    run = open_run(whole.folder)
    metrics = run.read("metrics")
    assert [(m["kind"], m["step"]) for m in metrics] == [
        ("eval", 0), ("train", 1), ("train", 2), ("train", 3), ("eval", 3), ("train", 4), ("train", 5), ("train", 6),
        ("eval", 6),
    ]  # fmt: skip
    assert [m.get("split") for m in metrics if m["kind"] == "eval"] == ["held_out", "validation", "held_out"]
    samples = run.read("samples")
    assert len(samples) == 6 * 4 * 4
    assert len({s["key"] for s in samples}) == len(samples), "two requests of a run share a key"
    for s in samples[:5]:
        assert s["key"] == derive_key(0, s["step"], s["problem"], s["draw"] + s["sample"])
    assert len(run.read("grades")) == len(samples)
    gaps = [m["gap_max"] for m in metrics if "gap_max" in m]  # where no group had a signal, nothing was computed
    assert gaps
    assert max(gaps) < 1e-4
    assert sorted(p.name for p in run.checkpoints.iterdir())[-1] == "step-00000006"
    assert whole.summary["steps"] == 6
    model = rung.load(whole.folder / "model")
    assert not torch.equal(model.decoder.norm.weight, rung.load(folder).decoder.norm.weight)


def test_the_report_finds_in_a_real_run_everything_that_it_reads(folder, tmp_path):
    heard = []
    recipe = tiny_recipe(folder, method=METHODS["grpo"], num_steps=2, eval_every=1)
    run = rung.train(recipe, folder=tmp_path / "run", listener=heard.append)
    rows = [r for r in open_run(run.folder).read("metrics") if r["kind"] == "train"]
    wanted = {name for _, _, metrics, _ in page.CHARTS for name in metrics}
    wanted |= {f"seconds_{phase}" for phase in page.PHASES} | {"seconds", "tokens", "unknown"}
    assert [(r["step"], wanted - set(r)) for r in rows] == [(1, set()), (2, set())]
    html = page.write(run.folder).read_text()
    assert "Not recorded in this run" not in html
    assert "The same held-out problems, before and after" in html
    assert "One group of samples" in html
    news = {(n.stage, name) for n in heard for name in n.metrics if n.stage in ("baseline", "evaluate")}
    assert news == {
        ("baseline", "accuracy_held_out"),
        ("evaluate", "accuracy_held_out"),
        ("evaluate", "accuracy_validation"),
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_runs_and_moves_towards_the_reward(folder, tmp_path, name):
    recipe = tiny_recipe(
        folder,
        method=METHODS[name],
        num_steps=8,
        samples_per_prompt=8,
        eval_every=0,
        optim=Optim(lr=3e-2),
        max_tokens=3,
    )
    run = rung.train(recipe, folder=tmp_path / "run")
    rewards = [r["reward"] for r in open_run(run.folder).read("metrics") if r["kind"] == "train"]
    assert rewards[-1] > rewards[0] + 0.1, rewards


def test_with_two_updates_a_rollout_the_second_is_clipped_against_the_learners_own_old_log_probs(folder, tmp_path):
    recipe = tiny_recipe(folder, method=METHODS["grpo"], updates_per_rollout=2, optim=Optim(lr=3e-2))
    run = rung.train(recipe, folder=tmp_path / "run")
    metrics = [r for r in open_run(run.folder).read("metrics") if r["kind"] == "train"]
    assert max(m["clip_share"] for m in metrics) > 0
    assert all(m["gap_max"] < 1e-4 for m in metrics), "the gap is measured before the first update"


def test_dynamic_sampling_replaces_groups_without_contrast_with_keys_of_their_own(folder, tmp_path):
    recipe = tiny_recipe(folder, method=replace(METHODS["dapo"], max_refills=2), num_steps=2)
    run = rung.train(recipe, folder=tmp_path / "run")
    samples = open_run(run.folder).read("samples")
    assert len(samples) > 2 * 4 * 4, "the letter is rare at the start: some groups have no contrast"
    assert len({s["key"] for s in samples}) == len(samples)
    groups = {}
    for s in samples:
        groups.setdefault((s["step"], s["problem"], s["draw"]), []).append(s)
    for group in groups.values():
        trained = group[0]["advantage"] is not None
        assert trained == (len({s["score"] for s in group}) > 1)


@pytest.mark.parametrize(
    ("field", "value"), [("top_k", 50), ("top_p", 0.9), ("min_p", 0.1), ("repetition_penalty", 1.1)]
)
def test_sampling_that_the_learner_does_not_score_is_refused_by_name(folder, tmp_path, field, value):
    with pytest.raises(ConfigError, match=rf"{field} = .* is refused in RL"):
        rung.train(tiny_recipe(folder, **{field: value}), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"updates_per_rollout": 5, "prompts_per_step": 4, "method": METHODS["grpo"]}, "cannot be more than"),
        ({"samples_per_prompt": 1}, "samples_per_prompt must be 2 or more"),
        ({"tokens_per_micro_batch": 10**9}, "needs about .* are free"),
        ({"task": TaskSpec(name="arithmetick")}, "arithmetic"),
        ({"device": "gpu"}, "no device 'gpu': needed cpu, cuda, or cuda:1"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_before_anything_is_made(folder, tmp_path, changes, message):
    with pytest.raises(RungError, match=message):
        rung.train(tiny_recipe(folder, **changes), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def drawn_samples(decoder, temperature):
    engine = Engine(decoder)
    prompts = [(1, 2, 3), (9, 8, 7, 6, 5)]
    sampling = Sampling(max_tokens=12, temperature=temperature, stop_ids=(257,))
    requests = [GroupRequest(prompt_ids=p, keys=tuple(range(10 * i, 10 * i + 4)), sampling=sampling) for i, p in enumerate(prompts)]  # fmt: skip  # noqa: E501
    groups, _ = engine.run(requests)
    return [
        sample_of(prompt, c, problem_id=str(i), group_id=i, reward=0.0)
        for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        for c in group
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_cached_sampling_and_the_packed_learner_agree_and_an_off_by_one_would_show(temperature):
    decoder = tiny_decoder()
    with torch.no_grad():
        for block in decoder.blocks:
            block.mixer.qkv.weight.mul_(6)  # attention that looks somewhere, so that positions matter
    samples = drawn_samples(decoder, temperature)
    batch = pack_one(samples, counts=count(samples))
    right = gap(batch, LanguagePolicy(decoder, temperature).scores(batch))
    assert right.max() < 1e-4
    layout = batch.layout
    shifted = replace(layout, position_T=torch.where(batch.trainable_T, layout.position_T + 1, layout.position_T))
    planted = gap(batch, LanguagePolicy(decoder, temperature).scores(replace(batch, layout=shifted)))
    assert planted.max() > 100 * right.max()
    assert planted.mean() > 100 * right.mean()
    cold = gap(batch, LanguagePolicy(decoder, 1.3 * temperature).scores(batch))
    assert cold.mean() > 100 * right.mean(), "a temperature on one side only must show"


def test_the_self_test_notices_a_sampler_with_weights_of_its_own(folder, tmp_path, monkeypatch):
    class Stale(sessions.Engine):
        def __init__(self, decoder, **options):
            super().__init__(sessions.frozen_copy(decoder), **options)

    monkeypatch.setattr(sessions, "Engine", Stale)
    with pytest.raises(RungError, match="self-test failed"):
        rung.train(tiny_recipe(folder), folder=tmp_path / "run")


@pytest.mark.skipif(
    not linear.keeps_blocks("cpu", torch.bfloat16), reason="this processor multiplies no bf16: nothing is kept"
)
def test_the_self_test_notices_blocks_of_a_weight_that_outlive_it(folder, tmp_path, monkeypatch):
    kept = linear.KeptBlocks._kept
    blind = lambda self, weight: self.blocks is not None or kept(self, weight)  # noqa: E731
    monkeypatch.setattr(linear.KeptBlocks, "_kept", blind)
    with pytest.raises(RungError, match="self-test failed"):
        rung.train(replace(tiny_recipe(folder), dtype="bf16"), folder=tmp_path / "run")


def test_a_refused_step_ends_the_run_with_the_command_of_another_one(folder, tmp_path, monkeypatch):
    def bad(*rest, **options):
        raise NonFiniteError("The loss is not finite")

    monkeypatch.setattr(sessions.Learner, "step", bad)
    config = tmp_path / "run" / "config.json"
    with pytest.raises(NonFiniteError, match=rf"not finite: `rung train {config} --name NEW --optim.lr 0.0015`$"):
        rung.train(tiny_recipe(folder), folder=tmp_path / "run")


def test_samples_of_other_weights_are_refused():
    completion = Completion(
        token_ids=(1,), logp_sampled=(0.0,), logp_raw=(0.0,), stop="length", policy_version=3, weights_hash="a",
        sampling=Sampling(max_tokens=1), key=0,
    )  # fmt: skip
    ask = Ask(step=1, problem=Problem(id="p", messages=()), first_draw=0)
    episode = Episode(problem=ask.problem, turns=(Turn(completion=completion),), text="")
    group = Group(ask=ask, prompt_ids=(1,), episodes=(episode,), grades=(Grade(score=1.0),))
    refuse_stale([group], WeightsRef(version=3, hash="a"))
    for other in (WeightsRef(version=4, hash="a"), WeightsRef(version=3, hash="b")):
        with pytest.raises(RunError, match="must sample with the weights"):
            refuse_stale([group], other)


def test_a_run_with_activation_checkpointing_has_the_bits_of_one_without(folder, tmp_path, monkeypatch):
    """Every block of a learner's pass is computed twice, so it was really on."""
    calls, forward = [0, 0], Block.forward

    def counted(self, *given):
        calls[torch.is_grad_enabled()] += 1
        return forward(self, *given)

    monkeypatch.setattr(Block, "forward", counted)
    rung.train(tiny_recipe(folder, num_steps=1, eval_every=0), folder=tmp_path / "kept")
    without, calls[1] = calls[1], 0
    recipe = tiny_recipe(folder, num_steps=1, eval_every=0, activation_checkpointing=True)
    run = rung.train(recipe, folder=tmp_path / "again")
    assert calls[1] == 2 * without > 0
    assert weights_of(run.folder) == weights_of(tmp_path / "kept")


def test_who_loads_a_model_beside_an_idle_gpu_is_told(folder, monkeypatch):
    said: list[str] = []
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        rung.load(folder, listener=lambda news: said.append(news.text))
    (told,) = filter(None, said)
    assert "the model is on the CPU: --device cuda" in told
