"""A run from its first step to its report, on disk at every moment.

    train     a new run folder            resume    go on from the newest sound checkpoint, bit for bit

Order within a step: sample, grade (grades go to disk), learn, record; then, where due, evaluate and save.  Records of
steps after the checkpoint are cut on resume; grades are kept, and replayed.
"""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rung.core.checkpoint import Checkpoint, load_newest, save
from rung.core.config import diff
from rung.core.device import open_device
from rung.core.environment import LIBRARIES, environment
from rung.core.errors import NonFiniteError, RunError, TaskError
from rung.core.progress import Listener, Progress, silent
from rung.core.records import Sampling
from rung.core.rundir import RunDir, create, open_run
from rung.core.words import Answer, Message
from rung.lm.weights.sources import absolute_source
from rung.model.model import is_foreign
from rung.tasks.base import Split, problems
from rung.tasks.load import absolute, load_task, packages, source_hash
from rung.tasks.sandbox import isolation
from rung.train.checks import check_problems
from rung.train.config import GroupRL, TaskSpec
from rung.train.estimate import refuse_too_large
from rung.train.evaluate import Evaluation, evaluate_with
from rung.train.grpo import StepRecord, gap_notice, train_step
from rung.train.session import (
    PhaseLog,
    Session,
    check_recipe,
    fingerprint,
    open_session,
    save_results,
    self_test,
    start_weights,
    use_threads,
)
from rung.train.turns import Episode

SAME_PLACE = (
    *("rung", "noise_law", "torch", "torch_build", *LIBRARIES),
    *("cpu", "capability", "threads", "gpu", "task_source", "task_packages", "transformers"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.  summary: accuracy before and after with its interval, minutes, steps."""

    folder: Path
    summary: Mapping[str, Any]


def train(
    recipe: GroupRL, *, folder: str | Path | None = None, listener: Listener = silent, or_resume: bool = False
) -> Run:
    """Run a recipe in a new folder (default `runs/<name>`).

    or_resume: where the folder holds this recipe's run already, go on with it, or hand back its result.
    Raises ConfigError, TaskError, ModelError before anything is made, RunError where the folder is taken.
    """
    name, options = absolute(recipe.task.name, recipe.task.options)
    task = load_task(name, options)  # what is wrong with it is said before a model is fetched
    recipe = replace(recipe, model=absolute_source(recipe.model, listener), task=TaskSpec(name=name, options=options))
    check_recipe(recipe)
    folder = Path(folder or Path("runs") / recipe.name)
    if or_resume and (folder / "config.json").exists():
        if changed := diff(open_run(folder).config(GroupRL), recipe):
            raise RunError(
                f"{folder} holds a run of another configuration ({', '.join(changed)}): `rung resume {folder}` goes on "
                "with that one; choose another --name for this one."
            )
        return resume(folder, listener=listener)
    open_device(recipe.device)
    use_threads(recipe.threads)
    check_problems(recipe, task, listener)
    refuse_too_large(recipe, listener)
    return _go(create(folder, recipe, _place(recipe)), recipe, listener)


def resume(folder: str | Path, *, listener: Listener = silent, allow_changed: bool = False) -> Run:
    """Go on with a run, bit for bit; a finished one is handed back as it is.

    Raises RunError on another machine, thread count or version (of Rung, torch and what else makes tokens), or for an
    edited task file, unless `allow_changed`.
    """
    run = open_run(folder)
    recipe = run.config(GroupRL)
    if (finished := _summary(run, recipe)) is not None:
        return Run(folder=run.folder, summary=finished)
    check_recipe(recipe)
    open_device(recipe.device)
    use_threads(recipe.threads)
    before, now = run.environment(), _place(recipe)
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in SAME_PLACE
        if before.get(name) != now.get(name)
    ]
    if changed and not allow_changed:
        raise RunError(
            f"{run.folder} cannot be continued bit for bit here: {'; '.join(changed)}. "
            f"Resume it where it ran; to go on all the same: `{_command(run)}`"
        )
    refuse_too_large(recipe, listener)
    return _go(run, recipe, listener, moved=now if changed else None)


def _command(run: RunDir) -> str:
    """What goes on with a run although its task file or its place has changed."""
    return f"rung resume {shlex.quote(str(run.folder))} --allow-changed"


def _place(recipe: GroupRL) -> dict[str, Any]:
    """What a repetition bit for bit depends on beside the recipe: the machine, the task's own files, and the packages
    that make its problems or compute the model.

    Also how well the grading child is confined here, for the record.
    """
    task = recipe.task.name, recipe.task.options
    place = environment(recipe.device) | {"task_source": source_hash(*task), "grading": isolation(recipe.grading)}
    if needed := packages(*task):
        place["task_packages"] = {name: _version(name) for name in needed}
    if is_foreign(recipe.model, foreign=recipe.foreign):
        place["transformers"] = _version("transformers")
    return place


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _go(run: RunDir, recipe: GroupRL, listener: Listener, moved: Mapping[str, Any] | None = None) -> Run:
    with run.lock():
        if moved is not None:
            run.move(moved)
        checkpoint = load_newest(run.checkpoints)
        start = checkpoint.step if checkpoint else 0
        for warning in checkpoint.warnings if checkpoint else ():
            listener(Progress(stage="notice", text=warning))
        _cut_back(run, recipe, start, begun=checkpoint is not None)
        with PhaseLog(run) as phase, open_session(recipe, run, start + 1, phase, listener) as session:
            base = fingerprint(start_weights(session))
            if checkpoint:
                _restore(session, checkpoint, base, listener)
            self_test(session, listener)
            if session.grader.lacking:
                listener(Progress(stage="notice", text=session.grader.lacking))
            if not checkpoint:
                phase("baseline")
                _evaluate(run, session, 0, "held_out", recipe.eval_problems, "baseline", listener)
            _steps(run, session, start, base, phase, listener)
            if not (run.folder / "model").exists():  # it is written last of all
                phase.step = recipe.num_steps
                phase("evaluate")
                _evaluate(run, session, recipe.num_steps, "held_out", recipe.eval_problems, "evaluate", listener)
                phase("model")
                save_results(session, run)
        finished = _summary(run, recipe)
        assert finished is not None, "a run that came to its end has a first and a last evaluation"
        return Run(folder=run.folder, summary=finished)


def _cut_back(run: RunDir, recipe: GroupRL, start: int, *, begun: bool) -> None:
    """Remove what was recorded after the checkpoint, the last evaluation too where no model was written after it."""
    for log in ("metrics", "samples", "evals"):
        run.cut(log, start + 1 if begun else 0)
        if not (run.folder / "model").exists():
            run.drop(log, lambda r: r["step"] == recipe.num_steps and r.get("split") == "held_out")


def _steps(run: RunDir, session: Session, start: int, base: str, phase: PhaseLog, listener: Listener) -> None:
    recipe, began = session.recipe, time.perf_counter()
    for step in range(start + 1, recipe.num_steps + 1):
        phase.step = step
        try:
            record = train_step(session.trainer, step)
        except TaskError as error:
            session.journal.stop(step)
            raise TaskError(f"{error}: `{_command(run)}`") from error
        except NonFiniteError as error:
            config = shlex.quote(str(run.folder / "config.json"))
            again = f"`rung train {config} --name NEW --optim.lr {recipe.optim.lr / 2:g}`"
            raise NonFiniteError(f"{error}: {again}") from error
        metrics = record.metrics | session.rollouts.take_costs()
        phase("record")
        run.append("samples", _sample_records(step, record, session))
        run.append("metrics", [{"kind": "train", "step": step} | metrics])
        score = None
        if recipe.eval_every and step % recipe.eval_every == 0 and step < recipe.num_steps:
            phase("evaluate")
            score = _evaluate(
                run, session, step, "validation", recipe.validation_problems, "evaluate", listener
            ).accuracy
        saved = score is not None or step % recipe.checkpoint_every == 0 or step == recipe.num_steps
        if saved:  # what was measured is saved with its score, so that the best can be kept
            _save(run, session, step, base, score, phase, listener)
        left = (time.perf_counter() - began) / (step - start) * (recipe.num_steps - step)
        rate = metrics["tokens"] / max(metrics["seconds"], 1e-9)
        news = metrics | {"tokens_per_second": rate}
        try:
            if notice := gap_notice(metrics, session.model.decoder.head_weight().dtype):
                listener(Progress(stage="notice", text=f"step {step}: {notice}"))
            listener(Progress(stage="train", done=step, total=recipe.num_steps, metrics=news, seconds_left=left))
        except KeyboardInterrupt:
            if not saved:
                _save(run, session, step, base, None, phase, silent)
            raise


def _save(
    run: RunDir, session: Session, step: int, base: str, score: float | None, phase: PhaseLog, listener: Listener
) -> None:
    phase("checkpoint")
    listener(Progress(stage="checkpoint", done=step, total=session.recipe.num_steps))
    values = {
        "num_updates": session.learner.num_updates,
        "base": base,
        "watch": session.trainer.watch.state(),
    }
    save(run.checkpoints, step, session.learner.state(), values, score=score)
    phase("saved")


def _restore(session: Session, checkpoint: Checkpoint, base: str, listener: Listener) -> None:
    if checkpoint.values["base"] != base:
        raise RunError(
            f"the model {session.recipe.model!r} is not the one this run began with (its weights' fingerprint was "
            f"{checkpoint.values['base']}, is {base}): put the old one back."
        )
    files = {name: checkpoint.tensors(name) for name in ("masters", "adam_m", "adam_v")}
    session.learner.restore(files, num_updates=checkpoint.values["num_updates"])
    session.trainer.watch.restore(checkpoint.values["watch"])
    listener(Progress(stage="notice", text=f"resumed from step {checkpoint.step}"))


def _evaluate(
    run: RunDir, session: Session, step: int, split: Split, number: int, stage: str, listener: Listener
) -> Evaluation:
    began = time.perf_counter()
    sampling = Sampling(max_tokens=session.sampling.max_tokens, temperature=0.0, stop_ids=session.sampling.stop_ids)
    asked = problems(session.task, split, number, seed=0)
    try:
        result = evaluate_with(
            session.model,
            session.engine,
            asked,
            sampling,
            session.grader.judge,
            bounds=session.rollouts.bounds,
            seed=0,
            stage=stage,
            split=split,
            listener=listener,
        )
    except TaskError as error:
        raise TaskError(f"{error}, then resume the run: `{_command(run)}`") from error
    records = [
        {
            "step": step,
            "split": split,
            "problem": answer.problem.id,
            "prompt": transcript(answer.problem.messages),
            "text": conversation(answer),
            "answer": answer.problem.answer,
            "right": grade.right,
            "known": grade.known,
            "stop": answer.stop,
        }
        for answer, grade in zip(result.answers, result.grades, strict=True)
    ]
    run.append("evals", records)
    numbers = {name: getattr(result, name) for name in ("accuracy", "low", "high", "n", "unknown", "ended")}
    seconds = time.perf_counter() - began
    several = len({answer.problem.task for answer in result.answers}) > 1
    more = {"by_task": by_task(result)} if several else {}
    run.append("metrics", [{"kind": "eval", "step": step, "split": split, **numbers, "seconds": seconds, **more}])
    return result


def by_task(result: Evaluation) -> dict[str, float]:
    """Accuracy among the known grades of each task of a mixture; a task without any is left out."""
    right: dict[str, list[bool]] = {}
    for answer, grade in zip(result.answers, result.grades, strict=True):
        if grade.known:
            right.setdefault(answer.problem.task, []).append(grade.right)
    return {task: sum(found) / len(found) for task, found in right.items()}


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as a person reads it."""
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def conversation(answer: Answer) -> str:
    """What was said after the problem: the answer alone, or every turn of several."""
    return transcript([*answer.earlier, Message("assistant", answer.text)]) if answer.earlier else answer.text


def _sample_records(step: int, record: StepRecord, session: Session) -> list[dict[str, Any]]:
    advantages = {id(group): iter(samples) for group, samples in record.trained}
    out = []
    for group in record.groups:
        trained = advantages.get(id(group), iter(()))
        for number, (episode, grade) in enumerate(zip(group.episodes, group.grades, strict=True)):
            sample = next(trained, None) if grade.known else None
            out.append(
                {
                    "step": step,
                    "problem": group.ask.problem.id,
                    "draw": group.ask.first_draw,
                    "sample": number,
                    "key": episode.turns[0].completion.key,
                    "prompt": transcript(group.ask.problem.messages),
                    "text": conversation(episode.answer(final=True)),
                    "token_ids": list(episode.token_ids),
                    "turns": _turn_records(episode),
                    "stop": episode.last.stop,
                    "end": episode.end,
                    "score": grade.score,
                    "right": grade.right,
                    "known": grade.known,
                    "advantage": None if sample is None else float(sample.streams["advantage"][-1]),
                }
            )
    return out


def _turn_records(episode: Episode) -> list[dict[str, Any]]:
    """Of each answer: how many of `token_ids` were given before it, how many it has, and why it stopped."""
    return [
        {"given": len(turn.given_ids), "sampled": len(turn.completion.token_ids), "stop": turn.completion.stop}
        for turn in episode.turns
    ]


def _summary(run: RunDir, recipe: GroupRL) -> dict[str, Any] | None:
    """Before and after, once a run has both and its model is written; else None."""
    records = run.read("metrics")
    held_out = {r["step"]: r for r in records if r["kind"] == "eval" and r["split"] == "held_out"}
    if 0 not in held_out or recipe.num_steps not in held_out or not (run.folder / "model").exists():
        return None
    steps = [r for r in records if r["kind"] == "train"]
    shown = ("accuracy", "low", "high", "n")
    return {
        "before": {name: held_out[0][name] for name in shown},
        "after": {name: held_out[recipe.num_steps][name] for name in shown},
        "steps": len(steps),
        "minutes": sum(r["seconds"] for r in steps) / 60,
    }
