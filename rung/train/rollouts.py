"""Where samples come from: problems in, graded groups out.

Every sample has a key of its own, `derive_key(run seed, step, problem, draw)`, where `draw` counts the samples of a
problem within a step, refills and repeats included.  A group's tokens depend on nothing else but the weights.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rung.core.errors import TaskError
from rung.core.keys import derive_key
from rung.core.records import Completion, GroupRequest, Sampling
from rung.core.words import Answer, Grade, Problem
from rung.engine.engine import Engine
from rung.engine.types import EngineStats, WeightsRef
from rung.model.model import Model


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One group wanted: a problem, and the number of its first draw in this step."""

    step: int
    problem: Problem
    first_draw: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """What came back for an `Ask`: completions, their texts, and a grade of each."""

    ask: Ask
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]
    grades: tuple[Grade, ...]

    @property
    def rewards(self) -> list[float]:
        """Scores of the samples whose grade is known."""
        return [grade.score for grade in self.grades if grade.score is not None]


@runtime_checkable
class RolloutSource(Protocol):
    """In this process, or on many machines: advantages are the learner's business."""

    def submit(self, asks: Sequence[Ask], weights: WeightsRef) -> None: ...

    def poll(self) -> list[Group]: ...


GradeAll = Callable[[Sequence[tuple[Ask, int, tuple[int, ...], Answer]]], list[Grade]]


class LocalRollouts:
    """The engine of this process.  `grade` takes (ask, sample number, token ids, answer) of a whole batch at once."""

    def __init__(self, model: Model, engine: Engine, *, sampling: Sampling, samples: int, seed: int, grade: GradeAll):
        self.model, self.engine, self.grade = model, engine, grade
        self.sampling, self.samples, self.seed = sampling, samples, seed
        self.stats, self.seconds_grade = EngineStats(), 0.0
        self._waiting: list[tuple[Sequence[Ask], WeightsRef]] = []

    def submit(self, asks: Sequence[Ask], weights: WeightsRef) -> None:
        self._waiting.append((asks, weights))

    def poll(self) -> list[Group]:
        groups = []
        for asks, weights in self._waiting:
            groups += self._sample(asks, weights)
        self._waiting.clear()
        return groups

    def _sample(self, asks: Sequence[Ask], weights: WeightsRef) -> list[Group]:
        prompts = [prompt_of(self.model, ask.problem, self.sampling.max_tokens) for ask in asks]
        requests = [
            GroupRequest(prompt_ids=prompt, keys=self.keys(ask), sampling=self.sampling)
            for ask, prompt in zip(asks, prompts, strict=True)
        ]
        drawn, stats = self.engine.run(requests, weights=weights)
        self.stats += stats
        texts = [tuple(self.model.tokenizer.decode(c.token_ids) for c in group) for group in drawn]
        questions = [
            (ask, number, c.token_ids, answer_to(ask.problem, c, text))
            for ask, group, group_texts in zip(asks, drawn, texts, strict=True)
            for number, (c, text) in enumerate(zip(group, group_texts, strict=True))
        ]
        began = time.perf_counter()
        grades = iter(self.grade(questions))
        self.seconds_grade += time.perf_counter() - began
        return [
            Group(ask=a, prompt_ids=p, completions=tuple(g), texts=t, grades=tuple(next(grades) for _ in g))
            for a, p, g, t in zip(asks, prompts, drawn, texts, strict=True)
        ]

    def take_costs(self) -> dict[str, float]:
        """Seconds spent since the last call, as metrics."""
        stats, seconds_grade = self.stats, self.seconds_grade
        self.stats, self.seconds_grade = EngineStats(), 0.0
        return {
            "seconds_prefill": stats.seconds_prefill,
            "seconds_decode": stats.seconds_decode,
            "seconds_grade": seconds_grade,
        }

    def keys(self, ask: Ask) -> tuple[int, ...]:
        """Keys of a group's samples: no two requests of a run share one."""
        draws = range(ask.first_draw, ask.first_draw + self.samples)
        return tuple(derive_key(self.seed, ask.step, ask.problem.id, draw) for draw in draws)


def prompt_of(model: Model, problem: Problem, max_tokens: int) -> tuple[int, ...]:
    """The problem as token ids.  Raises TaskError where the model has no room for it and an answer."""
    ids, room = model.prompt_ids(problem.messages), model.decoder.max_positions
    if len(ids) + max_tokens > room:
        raise TaskError(
            f"a problem and its answer must fit the model's {room} positions, and "
            f"{problem.messages[-1].content[:60]!r} takes {len(ids)} tokens, with "
            f"{max_tokens} for the answer: shorten the problem, or lower max_tokens"
        )
    return ids


def answer_to(problem: Problem, completion: Completion, text: str) -> Answer:
    """A completion as the verifier sees it: strings and numbers."""
    tokens, key = len(completion.token_ids), completion.key
    return Answer(problem=problem, text=text, stop=completion.stop, num_tokens=tokens, key=key)


def asks_of(step: int, problems: Iterable[Problem], samples: int, drawn: Counter[str]) -> list[Ask]:
    """Asks for these problems; `drawn` counts the draws of each problem in this step, and is brought up to date."""
    asks = []
    for problem in problems:
        asks.append(Ask(step=step, problem=problem, first_draw=drawn[problem.id]))
        drawn[problem.id] += samples
    return asks
