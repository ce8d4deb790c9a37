"""Held-out accuracy: prompt, token limit and parser are those of training; greedy unless told otherwise."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rung.core.keys import derive_key
from rung.core.progress import Listener, Progress, silent
from rung.core.records import GroupRequest, Sampling
from rung.core.words import Answer, Grade, Problem
from rung.engine.engine import Engine
from rung.model.model import Model
from rung.report.load import wilson
from rung.tasks.base import Split
from rung.tasks.base import problems as problems_of
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader
from rung.train.config import TaskSpec
from rung.train.rollouts import answer_to

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
    task: TaskSpec,
    *,
    problems: int = 500,
    split: Split = "held_out",
    max_tokens: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    listener: Listener = silent,
) -> Evaluation:
    """Accuracy of a model on a task.  Raises TaskError when the task cannot be loaded or has too few problems."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, stop_ids=model.tokenizer.eos_ids)
    asked = problems_of(load_task(task.name, task.options), split, problems, seed)
    with Grader(task.name, task.options) as grader:
        return evaluate_with(
            model,
            Engine(model.decoder),
            asked,
            sampling,
            grader.grade,
            seed=seed,
            stage="evaluate",
            split=split,
            listener=listener,
        )


def evaluate_with(
    model: Model,
    engine: Engine,
    problems: Sequence[Problem],
    sampling: Sampling,
    grade: Callable[[Sequence[Answer]], list[Grade]],
    *,
    seed: int,
    stage: str,
    split: Split,
    listener: Listener = silent,
) -> Evaluation:
    """`evaluate` with an engine, problems and a grader that exist already; news carries `accuracy_SPLIT`."""
    answers: list[Answer] = []
    grades: list[Grade] = []
    for start in range(0, len(problems), CHUNK):
        chunk = problems[start : start + CHUNK]
        requests = [
            GroupRequest(
                prompt_ids=model.prompt_ids(problem.messages),
                keys=(derive_key(seed, "evaluate", problem.id),),
                sampling=sampling,
            )
            for problem in chunk
        ]
        drawn, _ = engine.run(requests)
        new = [
            answer_to(p, group[0], model.tokenizer.decode(group[0].token_ids))
            for p, group in zip(chunk, drawn, strict=True)
        ]
        answers += new
        grades += grade(new)
        right = sum(g.right for g in grades)
        news = {f"accuracy_{split}": right / len(answers)}
        listener(Progress(stage=stage, done=len(answers), total=len(problems), metrics=news))
    return summary(answers, grades)


def summary(answers: Sequence[Answer], grades: Sequence[Grade]) -> Evaluation:
    """Accuracy among the known grades."""
    known = [g for g in grades if g.known]
    right = sum(g.right for g in known)
    low, high = wilson(right, len(known)) if known else (0.0, 1.0)
    return Evaluation(
        accuracy=right / len(known) if known else math.nan,
        low=low,
        high=high,
        n=len(known),
        unknown=len(grades) - len(known),
        ended=sum(a.stop == "eos" for a in answers) / max(len(answers), 1),
        answers=tuple(answers),
        grades=tuple(grades),
    )
