"""Whole runs of a tiny model: what they learn, what they leave on disk, and that stopping them changes nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.tiny import tiny_decoder, tiny_folder, tiny_recipe

import rung
from rung.core.errors import ConfigError, NonFiniteError, RunError, RungError, TaskError
from rung.core.keys import derive_key
from rung.core.records import Completion, GroupRequest, Sampling
from rung.core.rundir import create, open_run
from rung.core.words import Grade, Problem, unknown
from rung.engine.engine import Engine
from rung.engine.types import WeightsRef
from rung.lm import linear
from rung.lm.weights import hf
from rung.report import page
from rung.report.load import read_run
from rung.tasks.load import load_task
from rung.train import estimate as estimates
from rung.train import run as runs
from rung.train import session as sessions
from rung.train.config import METHODS, Method, Optim, TaskSpec
from rung.train.data import count, pack_one, sample_of
from rung.train.grpo import gap, refuse_stale
from rung.train.policy import LanguagePolicy
from rung.train.rollouts import Ask, Group


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run."""
    return rung.train(tiny_recipe(folder), folder=tmp_path_factory.mktemp("runs") / "whole")


def weights_of(run_folder: Path) -> bytes:
    return (run_folder / "model" / "model.safetensors").read_bytes()


def stop_after(step: int, stage: str = "train"):
    """A listener that does what Ctrl-C does once `step` is done."""

    def listener(news):
        if news.stage == stage and news.done == step:
            raise KeyboardInterrupt

    return listener


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


KINDS = {
    "bf16": {"dtype": "bf16"},
    "a reference in the loss": {"method": Method(advantage="mean", kl="k3_loss", kl_coef=0.5)},
    "dapo, with refills": {"method": replace(METHODS["dapo"], max_refills=2), "optim": Optim(lr=3e-3)},
    "two updates a rollout": {"method": METHODS["grpo"], "updates_per_rollout": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_any_kind_is_interrupted_and_goes_on_bit_for_bit(folder, tmp_path, kind):
    """The steps of 3e-2 move the weights so far that a reference copied after restoring is another one."""
    recipe = tiny_recipe(folder, **{"num_steps": 4, "eval_every": 0, "optim": Optim(lr=3e-2)} | KINDS[kind])
    rung.train(recipe, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        rung.train(recipe, folder=tmp_path / "run", listener=stop_after(3))
    rung.resume(tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    for name in ("samples.jsonl", "evals.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    steps = [[m for m in open_run(tmp_path / r).read("metrics") if m["kind"] == "train"] for r in ("run", "whole")]
    seconds = {name for m in steps[0] for name in m if name.startswith("seconds")}
    assert [{**m, **dict.fromkeys(seconds)} for m in steps[0]] == [{**m, **dict.fromkeys(seconds)} for m in steps[1]]
    if kind == "dapo, with refills":
        assert steps[0][3]["refills"] == 1, "the step after the resume needed none"


@pytest.mark.parametrize("step", [1, 2, 5])
def test_an_interrupted_run_goes_on_bit_for_bit(whole, folder, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        rung.train(tiny_recipe(folder), folder=tmp_path / "run", listener=stop_after(step))
    run = rung.resume(tmp_path / "run")
    assert weights_of(run.folder) == weights_of(whole.folder)
    assert (run.folder / "samples.jsonl").read_bytes() == (whole.folder / "samples.jsonl").read_bytes()
    assert (run.folder / "evals.jsonl").read_bytes() == (whole.folder / "evals.jsonl").read_bytes()


def test_a_measured_step_is_saved_with_its_own_score_however_checkpoints_fall(whole, folder, tmp_path):
    """Checkpoints fall on steps 2, 4 and 6, the measurement on step 3."""
    scores = scores_of(whole.folder)
    (measured,) = (m["accuracy"] for m in open_run(whole.folder).read("metrics") if m.get("split") == "validation")
    assert scores == {3: measured, 4: None, 6: None}
    with pytest.raises(KeyboardInterrupt):
        rung.train(tiny_recipe(folder), folder=tmp_path / "run", listener=stop_after(3))
    assert scores_of(tmp_path / "run") == {2: None, 3: measured}


def scores_of(run_folder: Path) -> dict:
    manifests = [json.loads(path.read_text()) for path in (run_folder / "checkpoints").glob("*/manifest.json")]
    return {manifest["step"]: manifest["score"] for manifest in manifests}


def test_ctrl_c_during_a_notice_of_a_step_saves_the_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "GAP_ALARM", -1.0)
    with pytest.raises(KeyboardInterrupt):
        rung.train(tiny_recipe(folder), folder=tmp_path / "run", listener=stop_after(0, "notice"))
    assert set(scores_of(tmp_path / "run")) == {1}


def test_what_was_recorded_after_the_checkpoint_is_cut_and_its_grades_are_replayed(
    whole, folder, tmp_path, monkeypatch
):
    """The last checkpoint is of step 4, and the run dies when step 6 is to be saved."""

    def dies(folder, step, *rest, **options):
        if step == 6:
            raise MemoryError("killed")
        return save(folder, step, *rest, **options)

    save = runs.save
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save", dies)
        with pytest.raises(MemoryError):
            rung.train(tiny_recipe(folder), folder=tmp_path / "run")
    assert {r["step"] for r in open_run(tmp_path / "run").read("samples")} == {1, 2, 3, 4, 5, 6}
    asked, grade = [], sessions.Grader.grade
    with monkeypatch.context() as patch:
        patch.setattr(sessions.Grader, "grade", lambda self, answers: asked.extend(answers) or grade(self, answers))
        run = rung.resume(tmp_path / "run")
    assert len(asked) == 5, "the answers of the last evaluation alone: those of steps 5 and 6 were graded before"
    assert weights_of(run.folder) == weights_of(whole.folder)
    assert (run.folder / "samples.jsonl").read_bytes() == (whole.folder / "samples.jsonl").read_bytes()


def test_a_run_that_dies_while_its_model_is_written_is_not_finished_and_measures_anew(
    whole, folder, tmp_path, monkeypatch
):
    """The last evaluation is on disk by then, and the checkpoint before it is of the same step."""

    def dies(*rest):
        raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "write_shard", dies)
        with pytest.raises(MemoryError):
            rung.train(tiny_recipe(folder), folder=tmp_path / "run")
    assert (tmp_path / "run" / "evals.jsonl").read_bytes() == (whole.folder / "evals.jsonl").read_bytes()
    assert not read_run(tmp_path / "run").finished
    run = rung.resume(tmp_path / "run")
    assert weights_of(run.folder) == weights_of(whole.folder)
    for name in ("samples.jsonl", "evals.jsonl"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    kinds = [[(m["kind"], m["step"]) for m in open_run(r.folder).read("metrics")] for r in (run, whole)]
    assert kinds[0] == kinds[1]
    assert read_run(run.folder).finished


def test_a_finished_run_is_handed_back_untouched(whole, folder):
    before = {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*") if p.is_file() and p.name != "lock"}
    again = rung.train(tiny_recipe(folder), folder=whole.folder, or_resume=True)
    assert again.summary == whole.summary
    assert before == {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*") if p.is_file() and p.name != "lock"}


def test_a_run_of_another_configuration_is_not_resumed_in_its_place(whole, folder):
    with pytest.raises(RunError, match="another configuration"):
        rung.train(tiny_recipe(folder, seed=1), folder=whole.folder, or_resume=True)
    with pytest.raises(RunError, match="exists already"):
        rung.train(tiny_recipe(folder), folder=whole.folder)


def test_another_machine_is_refused_unless_allowed(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        rung.train(tiny_recipe(folder), folder=tmp_path / "run", listener=stop_after(2))
    place = tmp_path / "run" / "environment.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"threads": 7}))
    with pytest.raises(RunError, match=r"threads was 7, is 1.*--allow-changed"):
        rung.resume(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        rung.resume(tmp_path / "run", allow_changed=True, listener=stop_after(4))
    now = json.loads(place.read_text())
    assert now["threads"] == 1
    assert [earlier["threads"] for earlier in now["earlier"]] == [7]
    assert rung.resume(tmp_path / "run").summary["steps"] == 6, "the new machine is the run's own"
    place.write_text(json.dumps(now | {"threads": 7}))
    assert rung.resume(tmp_path / "run").summary["steps"] == 6, "a finished run is handed back anywhere"


def test_a_run_that_is_going_keeps_the_record_of_where_it_goes(whole, folder, tmp_path):
    run = create(tmp_path / "run", tiny_recipe(folder), open_run(whole.folder).environment() | {"threads": 7})
    with run.lock(), pytest.raises(RunError, match="is in use by process"):
        rung.resume(run.folder, allow_changed=True)
    assert run.environment()["threads"] == 7


@pytest.mark.parametrize("name", ["rung", "torch", "numba", "llvmlite", "tokenizers"])
def test_another_version_of_what_makes_tokens_is_refused(whole, folder, tmp_path, name):
    """A bf16 token is the work of Numba's compiler, and a prompt that of the tokenizer."""
    run = create(tmp_path / "run", tiny_recipe(folder), open_run(whole.folder).environment() | {name: "0.0.1"})
    with pytest.raises(RunError, match=rf"{name} was '0\.0\.1', is "):
        rung.resume(run.folder)


def test_a_task_file_that_was_edited_is_refused_unless_allowed(folder, tmp_path):
    source = tmp_path / "mine.py"
    source.write_bytes((folder.parent / "letters.py").read_bytes())
    recipe = tiny_recipe(folder, task=TaskSpec(name=f"{source}:reward"))
    with pytest.raises(KeyboardInterrupt):
        rung.train(recipe, folder=tmp_path / "run", listener=stop_after(2))
    source.write_text(source.read_text().replace('"a"', '"b"'))
    with pytest.raises(RunError, match=r"task_source was.*--allow-changed"):
        rung.resume(tmp_path / "run")
    assert rung.resume(tmp_path / "run", allow_changed=True).summary["steps"] == 6


def test_a_run_begun_with_relative_paths_is_resumed_from_another_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    recipe = tiny_recipe(Path(folder.name), task=TaskSpec(name="letters.py:reward"))
    with pytest.raises(KeyboardInterrupt):
        rung.train(recipe, folder=tmp_path / "run", listener=stop_after(2))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert rung.resume(tmp_path / "run").summary["steps"] == 6


def test_another_base_model_is_refused(folder, tmp_path):
    mine = tiny_folder(tmp_path / "model", seed=3)
    with pytest.raises(KeyboardInterrupt):
        rung.train(tiny_recipe(mine), folder=tmp_path / "run", listener=stop_after(2))
    (mine / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(RunError, match="fingerprint"):
        rung.resume(tmp_path / "run")


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
    ],
)
def test_a_recipe_that_cannot_run_is_refused_before_anything_is_made(folder, tmp_path, changes, message):
    with pytest.raises(RungError, match=message):
        rung.train(tiny_recipe(folder, **changes), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


BROKEN_TASK = """
problems = [{"prompt": f"{n}", "answer": "y"} for n in range(40)]

def reward(problem, text):
    raise OSError("no licence")
"""


def test_a_verifier_that_fails_stops_the_run_and_says_why(folder, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN_TASK)
    recipe = tiny_recipe(folder, task=TaskSpec(name=f"{tmp_path / 'broken.py'}:reward"))
    command = f"`rung resume {tmp_path / 'run'} --allow-changed`"
    with pytest.raises(TaskError, match=rf"no licence.*Mend the task, then resume the run: {command}$"):
        rung.train(recipe, folder=tmp_path / "run")
    (tmp_path / "broken.py").write_text(BROKEN_TASK.replace('raise OSError("no licence")', "return 0.5"))
    with pytest.raises(RunError, match=rf"task_source was .* {command}$"):
        rung.resume(tmp_path / "run")
    run = rung.resume(tmp_path / "run", allow_changed=True)
    assert all(sample["score"] == 0.5 for sample in open_run(run.folder).read("samples")), "it was not asked again"


def test_a_verifier_that_was_slow_once_is_not_asked_again_after_a_kill(folder, tmp_path, monkeypatch):
    """A grade of step 5, which is killed before it is saved, timed out: the step is repeated as it was."""
    grade, batches = sessions.Grader.grade, []

    def slow(self, answers):
        batches.append(len(answers))
        late = len(answers) == 16 and batches.count(16) == 5
        return [unknown("slow")] * late + grade(self, answers)[late:]

    def killed(news):
        if news.stage == "train" and news.done == 5:
            raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(sessions.Grader, "grade", slow)
        with pytest.raises(MemoryError):
            rung.train(tiny_recipe(folder), folder=tmp_path / "run", listener=killed)
    before = [sample for sample in open_run(tmp_path / "run").read("samples") if sample["step"] == 5]
    assert [sample["known"] for sample in before].count(False) == 1
    run = rung.resume(tmp_path / "run")
    assert [sample for sample in open_run(run.folder).read("samples") if sample["step"] == 5] == before


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


def test_the_self_test_notices_blocks_of_a_weight_that_outlive_it(folder, tmp_path, monkeypatch):
    kept = linear.KeptBlocks._kept
    blind = lambda self, weight: self.blocks is not None or kept(self, weight)  # noqa: E731
    monkeypatch.setattr(linear.KeptBlocks, "_kept", blind)
    if not linear._worthwhile("cpu", torch.bfloat16):
        pytest.skip("this processor multiplies no bf16: nothing is kept")
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
    group = Group(ask=ask, prompt_ids=(1,), completions=(completion,), texts=("",), grades=(Grade(score=1.0),))
    refuse_stale([group], WeightsRef(version=3, hash="a"))
    for other in (WeightsRef(version=4, hash="a"), WeightsRef(version=3, hash="b")):
        with pytest.raises(RunError, match="must sample with the weights"):
            refuse_stale([group], other)


def test_a_run_that_no_longer_fits_is_not_resumed(whole, folder, tmp_path, monkeypatch):
    run = create(tmp_path / "run", tiny_recipe(folder), open_run(whole.folder).environment())
    monkeypatch.setattr(estimates, "available_memory", lambda: 1e6)
    with pytest.raises(ConfigError, match=r"needs about .* GB, and 0\.0 GB are free"):
        rung.resume(run.folder)


def test_long_prompts_need_a_longer_cache_and_more_time(folder, tmp_path):
    (tmp_path / "long.py").write_text(
        (folder.parent / "letters.py").read_text().replace("say a", "say a " * 9 + "say a")
    )
    short = tiny_recipe(folder)
    long = replace(short, task=TaskSpec(name=f"{tmp_path / 'long.py'}:reward"))
    model = rung.load(folder)
    tasks = [load_task(recipe.task.name, {}) for recipe in (short, long)]
    lengths = [max(estimates.prompt_lengths(model, [t.problem(i) for i in range(40)])) for t in tasks]
    assert lengths[1] == lengths[0] + 9 * len("say a ")
    caches = [estimates.memory(short, model.decoder.config, n)["key-value cache"] for n in lengths]
    assert caches[1] / caches[0] == (lengths[1] + 5) / (lengths[0] + 5)
    assert math.isclose(
        sum(estimates.memory(long, model.decoder.config, lengths[1]).values()), rung.estimate(long).bytes
    )


@pytest.mark.parametrize(
    ("version", "groups"),
    [
        ("0::/a/b", {"a": ("5000000", "3000000", "inactive_file 1000000")}),
        ("0::/the/hosts/name", {"": ("5000000", "3000000", "inactive_file 1000000")}),
        ("7:cpu:/x\n4:memory:/a", {"a": ("5000000", "2500000", "total_inactive_file 500000")}),
        ("0::/a", {"": ("4000000", "1000000", ""), "a": ("max", "1", "")}),
        ("0::/a", {"a": ("max", "1000000", "")}),
        ("0::/", {}),
    ],
)
def test_a_containers_limit_counts_as_the_memory_there_is(tmp_path, version, groups):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(version + "\n")
    first = "memory:" in version
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
    for group, texts in groups.items():
        place = tmp_path / "sys/fs/cgroup" / ("memory" if first else "") / group
        place.mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names, "memory.stat"), texts, strict=True):
            (place / name).write_text(text + "\n" * bool(text))
    limited = any(texts[0] != "max" for texts in groups.values())
    assert estimates.available_memory(tmp_path) == (3_000_000 if limited else 8_192_000)


def test_an_estimate_grows_with_what_is_asked(folder):
    small, large = rung.estimate(tiny_recipe(folder)), rung.estimate(tiny_recipe(folder, tokens_per_micro_batch=8192))
    assert large.bytes > small.bytes
    assert math.isfinite(small.seconds)
    assert any("free" in line for line in small.lines)
    with_reference = rung.estimate(tiny_recipe(folder, method=Method(kl="k3_loss", kl_coef=0.1)))
    assert with_reference.bytes > small.bytes
