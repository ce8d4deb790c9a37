"""Nouns made of strings and numbers.  No torch: a grading child process imports these alone.

A task never sees a token.  A grade is right, wrong or *unknown*: unknown means that the verifier failed, and it is
never counted as a zero.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
Stop = Literal["eos", "stop", "length"]  # eos: an end token was emitted; stop: a stop string matched; length: cut off


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a task asks.

    id:       names the problem's content: equal content has an equal id, in every run
    messages: the conversation so far, ending with the turn to be answered
    answer:   the known-good answer, or None where only a verifier can judge
    facts:    anything the task needs to grade the answer (strings and numbers)
    """

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    task: str = ""
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for one problem: the text, why it ended, and its length in tokens (end token included).

    key:     the sample's own number, which names its draws; no two samples of a run share it
    earlier: what was said between the problem and `text`, where the episode has several turns: answers and replies
    final:   whether the episode ends with this answer, whatever the task's `reply` would say

    In an episode of several turns, text and stop are those of the last one, and num_tokens counts all that was sampled.
    """

    problem: Problem
    text: str
    stop: Stop
    num_tokens: int
    key: int = 0
    earlier: tuple[Message, ...] = ()
    final: bool = True

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation, from the problem to this answer."""
        return spoken((*self.problem.messages, *self.earlier, Message("assistant", self.text)))


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A verifier's judgement.

    score: the reward; None means *unknown* (the verifier failed), which is never a zero
    right: whether the answer counts as correct in an accuracy
    parts: named contributions to the score, for the record
    error: why the grade is unknown, or how the answer made the verifier fail
    """

    score: float | None
    right: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def known(self) -> bool:
        return self.score is not None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The environment's next turn: the episode goes on."""

    messages: tuple[Message, ...]


def spoken(messages: Iterable[Message]) -> tuple[Message, ...]:
    """A conversation in which an answer and the opening that was written for it are one message."""
    said: list[Message] = []
    for message in messages:
        if said and said[-1].role == message.role == "assistant":
            message = Message("assistant", said.pop().content + message.content)
        said.append(message)
    return tuple(said)


def unknown(error: str) -> Grade:
    """The grade of an answer whose verifier failed."""
    return Grade(score=None, error=error)
