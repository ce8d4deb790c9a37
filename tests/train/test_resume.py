"""A run that was stopped, however it was, goes on as if it never had been; and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.tiny import stop_after, tiny_folder, tiny_recipe, weights_of

import rung
from rung.core.errors import RunError, TaskError
from rung.core.rundir import create, open_run
from rung.core.words import unknown
from rung.lm.weights import hf
from rung.report.load import read_run
from rung.train import grpo
from rung.train import run as runs
from rung.train import session as sessions
from rung.train.config import METHODS, Method, Optim, TaskSpec

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
    monkeypatch.setitem(grpo.GAP_LIMITS, torch.float32, {"gap_max": -1.0})
    with pytest.raises(KeyboardInterrupt):
        rung.train(tiny_recipe(folder), folder=tmp_path / "run", listener=stop_after(0, "notice"))
    assert set(scores_of(tmp_path / "run")) == {1}


@pytest.mark.parametrize(
    ("dtype", "metrics", "told"),
    [
        (torch.float32, {"gap_mean": 1e-6, "gap_max": 9e-5}, ""),
        (torch.float32, {"gap_mean": 1e-6, "gap_max": 2e-4}, "gap_max 0.0002 (limit 0.0001)"),
        (torch.bfloat16, {"gap_mean": 0.03, "gap_max": 1.3}, ""),
        (torch.bfloat16, {"gap_mean": 0.06, "gap_max": 1.3}, "gap_mean 0.06 (limit 0.05)"),
        (torch.bfloat16, {"gap_mean": 0.03, "gap_max": 5.0}, "gap_max 5 (limit 4)"),
        (torch.bfloat16, {}, ""),
    ],
)
def test_a_distance_of_sampler_and_learner_beyond_rounding_is_told(dtype, metrics, told):
    notice = grpo.gap_notice(metrics, dtype)
    assert bool(notice) == bool(told)
    assert told in notice


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
    asked, judge = [], sessions.Grader.judge
    with monkeypatch.context() as patch:
        patch.setattr(sessions.Grader, "judge", lambda self, answers: asked.extend(answers) or judge(self, answers))
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
    judge, batches = sessions.Grader.judge, []

    def slow(self, answers):
        batches.append(len(answers))
        late = len(answers) == 16 and batches.count(16) == 5
        return [unknown("slow")] * late + judge(self, answers)[late:]

    def killed(news):
        if news.stage == "train" and news.done == 5:
            raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(sessions.Grader, "judge", slow)
        with pytest.raises(MemoryError):
            rung.train(tiny_recipe(folder), folder=tmp_path / "run", listener=killed)
    before = [sample for sample in open_run(tmp_path / "run").read("samples") if sample["step"] == 5]
    assert [sample["known"] for sample in before].count(False) == 1
    run = rung.resume(tmp_path / "run")
    assert [sample for sample in open_run(run.folder).read("samples") if sample["step"] == 5] == before
