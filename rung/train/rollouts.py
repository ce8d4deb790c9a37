"""Where samples come from: problems in, graded groups out.

Every sample has a key of its own, `derive_key(run seed, step, problem, draw)`, where `draw` counts the samples of a
problem within a step, refills and repeats included; the keys of its later turns are derived from the same names
(`rung.train.turns`).  A group's tokens depend on nothing else but the weights and what the environment says.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rung.core.errors import TaskError
from rung.core.records import Completion, Sampling
from rung.core.words import Answer, Grade, Problem, Reply
from rung.engine.engine import Engine
from rung.engine.types import EngineStats, WeightsRef
from rung.model.model import Model
from rung.train.turns import Bounds, Episode, Opening, Question, play


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One group wanted: a problem, and the number of its first draw in this step."""

    step: int
    problem: Problem
    first_draw: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """What came back for an `Ask`: episodes, and a grade of each."""

    ask: Ask
    prompt_ids: tuple[int, ...]
    episodes: tuple[Episode, ...]
    grades: tuple[Grade, ...]

    @property
    def rewards(self) -> list[float]:
        """Scores of the samples whose grade is known."""
        return [grade.score for grade in self.grades if grade.score is not None]

    @property
    def completions(self) -> list[Completion]:
        """Everything that was sampled, every turn of every episode."""
        return [turn.completion for episode in self.episodes for turn in episode.turns]


@runtime_checkable
class RolloutSource(Protocol):
    """In this process, or on many machines: advantages are the learner's business."""

    def submit(self, asks: Sequence[Ask], weights: WeightsRef) -> None: ...

    def poll(self) -> list[Group]: ...


JudgeAll = Callable[[Sequence[tuple[Ask, int, tuple[int, ...], Answer]]], Sequence[Grade | Reply]]


class LocalRollouts:
    """The engine of this process.

    judge takes (ask, sample number, token ids behind the prompt, answer) of a whole batch at once
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        *,
        sampling: Sampling,
        bounds: Bounds,
        samples: int,
        seed: int,
        judge: JudgeAll,
    ):
        self.model, self.engine, self.judge = model, engine, judge
        self.sampling, self.bounds, self.samples, self.seed = sampling, bounds, samples, seed
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
        openings = [
            Opening(problem=ask.problem, prompt_ids=self._prompt(ask.problem), names=self.names(ask)) for ask in asks
        ]

        def judge(questions: Sequence[Question]) -> Sequence[Grade | Reply]:
            began = time.perf_counter()
            said = self.judge([(asks[i], j, e.token_ids, e.answer(final=over)) for i, j, e, over in questions])
            self.seconds_grade += time.perf_counter() - began
            return said

        graded, stats = play(
            self.model,
            self.engine,
            openings,
            sampling=self.sampling,
            bounds=self.bounds,
            judge=judge,
            weights=weights,
        )
        self.stats += stats
        return [
            Group(
                ask=ask,
                prompt_ids=opening.prompt_ids,
                episodes=tuple(episode for episode, _ in group),
                grades=tuple(grade for _, grade in group),
            )
            for ask, opening, group in zip(asks, openings, graded, strict=True)
        ]

    def _prompt(self, problem: Problem) -> tuple[int, ...]:
        return prompt_of(self.model, problem, self.sampling.max_tokens, self.bounds.max_length)

    def take_costs(self) -> dict[str, float]:
        """Seconds spent since the last call, as metrics."""
        stats, seconds_grade = self.stats, self.seconds_grade
        self.stats, self.seconds_grade = EngineStats(), 0.0
        return {
            "seconds_prefill": stats.seconds_prefill,
            "seconds_decode": stats.seconds_decode,
            "seconds_grade": seconds_grade,
        }

    def names(self, ask: Ask) -> tuple[tuple[int | str, ...], ...]:
        """What the keys of a group's samples are derived from: no two requests of a run share one."""
        draws = range(ask.first_draw, ask.first_draw + self.samples)
        return tuple((self.seed, ask.step, ask.problem.id, draw) for draw in draws)


def prompt_of(model: Model, problem: Problem, max_tokens: int, room: int) -> tuple[int, ...]:
    """The problem as token ids.  Raises TaskError where `room` positions do not hold it and an answer."""
    ids = model.prompt_ids(problem.messages)
    if len(ids) + max_tokens > room:
        whose = "the model's" if room == model.decoder.max_positions else "max_length's"
        raise TaskError(
            f"a problem and its answer must fit {whose} {room} positions, and "
            f"{problem.messages[-1].content[:60]!r} takes {len(ids)} tokens, with "
            f"{max_tokens} for the answer: shorten the problem, or lower max_tokens"
        )
    return ids


def bounds_of(model: Model, *, max_turns: int, max_length: int) -> Bounds:
    """Bounds of an episode; max_length 0 stands for the model's positions."""
    room = model.decoder.max_positions
    return Bounds(max_turns=max_turns, max_length=min(max_length or room, room))


def asks_of(step: int, problems: Iterable[Problem], samples: int, drawn: Counter[str]) -> list[Ask]:
    """Asks for these problems; `drawn` counts the draws of each problem in this step, and is brought up to date."""
    asks = []
    for problem in problems:
        asks.append(Ask(step=step, problem=problem, first_draw=drawn[problem.id]))
        drawn[problem.id] += samples
    return asks
