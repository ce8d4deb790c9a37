"""Episodes: sample an answer, ask the environment, sample on; each turn of all samples goes through the engine at once.

A sample is one stream of tokens that only grows: what was sampled stays as it is, and what the template and the
environment say between two answers is appended (`rung.text.turns`).  An episode ends when the environment has nothing
more to say, or at a limit.

A sample's key names its first answer; answer t of it, from 1, has the key `derive_key(*names, t)`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rung.core.errors import ConfigError
from rung.core.keys import derive_key
from rung.core.records import Completion, GroupRequest, Origin, Sampling, Turn
from rung.core.words import Answer, Grade, Message, Problem, Reply
from rung.engine.engine import NAMELESS, Engine
from rung.engine.types import EngineStats, WeightsRef
from rung.model.model import Model
from rung.text.turns import between

End = Literal["task", "turns", "room"]  # the task said so; max_turns; the next answer would not fit
GOES_ON = (
    "the task replies to an answer, so that an episode has several turns, and max_turns is 1: set max_turns to how "
    "many answers an episode may have (--max-turns)."
)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """max_turns: answers of an episode;  max_length: positions of its stream, prompt included."""

    max_turns: int
    max_length: int


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A problem to be answered: its prompt, and the names that each sample's key is derived from."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    names: tuple[tuple[int | str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One sample: its answers with what stands between them, and why it ended.

    text: the last answer;  earlier: what was said between the problem and it
    """

    problem: Problem
    turns: tuple[Turn, ...]
    text: str
    earlier: tuple[Message, ...] = ()
    end: End = "task"

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything behind the prompt."""
        return tuple(token for turn in self.turns for token in (*turn.given_ids, *turn.completion.token_ids))

    @property
    def last(self) -> Completion:
        return self.turns[-1].completion

    @property
    def num_sampled(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    @property
    def cut(self) -> bool:
        """Whether a limit on tokens or positions ended an answer, or the episode, before its end."""
        return self.end == "room" or any(turn.completion.stop == "length" for turn in self.turns)

    def answer(self, *, final: bool) -> Answer:
        """The episode so far as the task sees it: strings and numbers."""
        return Answer(
            problem=self.problem,
            text=self.text,
            stop=self.last.stop,
            num_tokens=self.num_sampled,
            key=self.turns[0].completion.key,
            earlier=self.earlier,
            final=final,
        )


Seat = tuple[int, int]  # number of an opening, and of a sample of it
Question = tuple[int, int, Episode, bool]  # a seat, the episode so far, and whether it is over whatever the task says
Judge = Callable[[Sequence[Question]], Sequence[Grade | Reply]]


def play(
    model: Model,
    engine: Engine,
    openings: Sequence[Opening],
    *,
    sampling: Sampling,
    bounds: Bounds,
    judge: Judge,
    weights: WeightsRef = NAMELESS,
) -> tuple[list[list[tuple[Episode, Grade]]], EngineStats]:
    """Episodes with their grades, in the order of openings and names, and what sampling cost.

    Raises ConfigError where the environment replies and one turn is all that was asked for; ModelError where the chat
    template cannot say what it replied.
    """
    requests = [
        GroupRequest(prompt_ids=o.prompt_ids, keys=tuple(derive_key(*n) for n in o.names), sampling=sampling)
        for o in openings
    ]
    drawn, stats = engine.run(requests, weights=weights)
    seats = [(i, j) for i, opening in enumerate(openings) for j in range(len(opening.names))]
    going = {(i, j): _first(model, openings[i].problem, drawn[i][j]) for i, j in seats}
    ended: dict[Seat, tuple[Episode, Grade]] = {}

    def ask(episodes: Mapping[Seat, Episode], end: End) -> dict[Seat, Reply]:
        """Grades are kept, with the reason that an episode has to end; replies are handed back."""
        said = judge([(*seat, episode, end != "task") for seat, episode in episodes.items()]) if episodes else ()
        replies = {}
        for (seat, episode), what in zip(episodes.items(), said, strict=True):
            if isinstance(what, Grade):
                ended[seat] = replace(episode, end=end), what
            else:
                replies[seat] = what
        return replies

    for turn in range(1, bounds.max_turns + 1):
        replies = ask(going, "turns" if turn == bounds.max_turns > 1 else "task")
        if replies and bounds.max_turns == 1:  # a task of one turn is asked all the same: it must not go on
            raise ConfigError(GOES_ON)
        longer = {seat: _asked(model, going[seat], reply) for seat, reply in replies.items()}
        prompts = {seat: (*openings[seat[0]].prompt_ids, *next_.stream) for seat, next_ in longer.items()}
        fits = [seat for seat in longer if len(prompts[seat]) + sampling.max_tokens <= bounds.max_length]
        ask({seat: going[seat] for seat in longer if seat not in fits}, "room")
        keys = {(i, j): derive_key(*openings[i].names[j], turn) for i, j in fits}
        requests = [GroupRequest(prompt_ids=prompts[s], keys=(keys[s],), sampling=sampling) for s in fits]
        drawn, cost = engine.run(requests, weights=weights) if requests else ([], EngineStats())
        stats += cost
        going = {seat: _answered(model, longer[seat], c) for seat, (c,) in zip(fits, drawn, strict=True)}
    return [[ended[i, j] for j in range(len(opening.names))] for i, opening in enumerate(openings)], stats


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """An episode that goes on, and what was put behind its last answer."""

    episode: Episode
    words: tuple[Message, ...]
    given_ids: tuple[int, ...]
    given_origin: tuple[Origin, ...]

    @property
    def stream(self) -> tuple[int, ...]:
        return (*self.episode.token_ids, *self.given_ids)


def _first(model: Model, problem: Problem, completion: Completion) -> Episode:
    text = model.tokenizer.decode(completion.token_ids)
    return Episode(problem=problem, turns=(Turn(completion=completion),), text=text)


def _asked(model: Model, episode: Episode, reply: Reply) -> _Asked:
    messages = episode.answer(final=False).messages
    end = episode.last.token_ids[-1] if episode.last.stop == "eos" else None
    ids, origin = between(model.tokenizer, messages, reply.messages, end=end)
    words = (*episode.earlier, Message("assistant", episode.text), *reply.messages)
    return _Asked(episode=episode, words=words, given_ids=ids, given_origin=origin)


def _answered(model: Model, asked: _Asked, completion: Completion) -> Episode:
    turn = Turn(completion=completion, given_ids=asked.given_ids, given_origin=asked.given_origin)
    return replace(
        asked.episode,
        turns=(*asked.episode.turns, turn),
        text=model.tokenizer.decode(completion.token_ids),
        earlier=asked.words,
    )
