"""Held-out accuracy: prompt, token limit and parser are those of training; greedy unless told otherwise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rung.core.errors import ConfigError, TaskError
from rung.core.progress import Listener, Progress, silent
from rung.core.records import Sampling
from rung.core.words import Answer, Grade, Problem, Reply
from rung.engine.engine import Engine
from rung.model.model import Model
from rung.report.load import wilson
from rung.tasks.base import Split
from rung.tasks.base import problems as problems_of
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader, Limits
from rung.train.config import TaskSpec
from rung.train.rollouts import bounds_of, prompt_of
from rung.train.turns import Bounds, Opening, Question, play

CHUNK = 128  # problems between two pieces of news


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy with its 95 % Wilson interval over n problems of known grade; unknown grades are counted apart."""

    accuracy: float
    low: float
    high: float
    n: int
    unknown: int
    ended: float
    answers: tuple[Answer, ...]
    grades: tuple[Grade, ...]


def evaluate(
    model: Model,
    task: TaskSpec | str,
    *,
    problems: int = 500,
    split: Split = "held_out",
    max_tokens: int = 16,
    temperature: float = 0.0,
    max_turns: int = 1,
    max_length: int = 0,
    seed: int = 0,
    limits: Limits | None = None,
    listener: Listener = silent,
) -> Evaluation:
    """Accuracy of a model on a task (a name, or a TaskSpec where it takes options).

    max_turns: answers of an episode, at most;  max_length: its positions, 0 for as many as the model has

    Raises TaskError when the task cannot be loaded, has no problem, one that is too long for the model, or a verifier
    that grades no answer.
    """
    task = TaskSpec(name=task) if isinstance(task, str) else task
    asked = asked_of(
        task,
        problems=problems,
        split=split,
        seed=seed,
        max_tokens=max_tokens,
        temperature=temperature,
        max_turns=max_turns,
        max_length=max_length,
    )
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, stop_ids=model.tokenizer.eos_ids)
    engine = Engine(model.decoder, max_positions=model.decoder.max_positions)
    with Grader(task.name, task.options, limits) as grader:
        return evaluate_with(
            model,
            engine,
            asked,
            sampling,
            grader.judge,
            bounds=bounds_of(model, max_turns=max_turns, max_length=max_length),
            seed=seed,
            stage="evaluate",
            split=split,
            listener=listener,
        )


def asked_of(
    task: TaskSpec,
    *,
    problems: int,
    split: Split,
    seed: int,
    max_tokens: int,
    temperature: float,
    max_turns: int,
    max_length: int,
) -> list[Problem]:
    """The problems that `evaluate` asks; what it refuses without having seen a model is refused here."""
    counts = {"problems": problems, "max_tokens": max_tokens, "max_turns": max_turns}
    for name, value in {**counts, "max_length": max_length, "temperature": temperature}.items():
        if value < (name in counts):
            raise ConfigError(f"{name} must be at least {int(name in counts)}, not {value}.")
    return problems_of(load_task(task.name, task.options), split, problems, seed)


def evaluate_with(
    model: Model,
    engine: Engine,
    problems: Sequence[Problem],
    sampling: Sampling,
    judge: Callable[[Sequence[Answer]], Sequence[Grade | Reply]],
    *,
    bounds: Bounds,
    seed: int,
    stage: str,
    split: Split,
    listener: Listener = silent,
) -> Evaluation:
    """`evaluate` with an engine, problems and a judge that exist already; news carries `accuracy_SPLIT`."""
    openings = [
        Opening(
            problem=problem,
            prompt_ids=prompt_of(model, problem, sampling.max_tokens, bounds.max_length),
            names=((seed, "evaluate", problem.id),),
        )
        for problem in problems
    ]

    def ask(questions: Sequence[Question]) -> Sequence[Grade | Reply]:
        return judge([episode.answer(final=over) for _, _, episode, over in questions])

    answers: list[Answer] = []
    grades: list[Grade] = []
    for start in range(0, len(problems), CHUNK):
        chunk = openings[start : start + CHUNK]
        graded, _ = play(model, engine, chunk, sampling=sampling, bounds=bounds, judge=ask)
        answers += [episode.answer(final=True) for ((episode, _),) in graded]
        grades += [grade for ((_, grade),) in graded]
        known = [g.right for g in grades if g.known]
        news = {f"accuracy_{split}": sum(known) / len(known)} if known else {}
        listener(Progress(stage=stage, done=len(answers), total=len(problems), metrics=news))
    return summary(answers, grades)


def summary(answers: Sequence[Answer], grades: Sequence[Grade]) -> Evaluation:
    """Accuracy among the known grades.  Raises TaskError where there is none."""
    known = [g for g in grades if g.known]
    if not known:
        raise TaskError(f"the verifier graded none of {len(grades)} answers: {grades[-1].error}. Mend the task")
    right = sum(g.right for g in known)
    low, high = wilson(right, len(known))
    return Evaluation(
        accuracy=right / len(known),
        low=low,
        high=high,
        n=len(known),
        unknown=len(grades) - len(known),
        ended=sum(a.stop == "eos" for a in answers) / len(answers),
        answers=tuple(answers),
        grades=tuple(grades),
    )
