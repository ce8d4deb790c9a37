"""What goes in and out of the engine besides the nouns of `core.records`: weights named, events, and time spent."""

from dataclasses import dataclass, fields

from rung.core.records import Completion


@dataclass(frozen=True, kw_only=True)
class WeightsRef:
    """Which weights draw: the number of optimiser steps behind them, and their fingerprint."""

    version: int = 0
    hash: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """One token, as soon as it is drawn.

    request, sample: indices into the requests of the call, and into that request's keys
    logp_sampled, logp_raw: as in `Completion`;  gap: as in `sampling.Draws`
    completion: the whole sample, on its last token
    """

    request: int
    sample: int
    token: int
    logp_sampled: float
    logp_raw: float
    gap: float
    completion: Completion | None = None


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What a call cost; sums under +.  Outputs only: nothing reads them to decide.

    prompt_tokens: of all prompts; a beginning that several share counts in each
    steps: decoding forwards;  row_steps: tokens they drew (steps x rows that were in use)
    context_steps: cached rows they had to read, over all samples: with the weights, the least that memory must deliver
    A sample's first token comes from its prompt's forward, so sampled_tokens is row_steps + number of samples.
    """

    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    prompt_tokens: int = 0
    sampled_tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    context_steps: int = 0

    def __add__(self, other: "EngineStats") -> "EngineStats":
        return EngineStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})
