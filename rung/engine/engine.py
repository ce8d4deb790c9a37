"""Tokens out of a decoder: many prompts, many samples of each, one forward per step for all of them.

    engine = Engine(decoder, slots=64)
    completions, stats = engine.run([GroupRequest(prompt_ids=(1, 2), keys=(7, 8), sampling=Sampling(max_tokens=16))])

A sample's tokens are a function of (weights, prompt, sampling, key) alone: not of the batch around it, nor of the order
of calls, up to the rounding of matrix products of different shapes (docs/guide/engine.md).
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from time import perf_counter

import torch

from rung.core.errors import NonFiniteError, RequestError
from rung.core.records import Completion, GroupRequest
from rung.core.words import Stop
from rung.engine.graphs import Drawn, Recorder
from rung.engine.runner import Runner
from rung.engine.sampling import Laws
from rung.engine.scheduler import Scheduler, Seat, prompt_slots
from rung.engine.types import EngineStats, Event, WeightsRef
from rung.lm.protocols import Decoder

NAMELESS = WeightsRef()


class Engine:
    """Draws completions from one decoder, up to `slots` of them at a time.

    The key-value state is allocated by the first call and kept; a call that needs more slots or rows replaces it.
    The decoder's parameters are read where they are: change them in place, and the next call draws from the new ones.
    max_positions: the longest prompt plus completion that may be asked for (None: no limit).
    recorder: of decoding steps; None is CUDA's graphs where the decoder lies on such a device, and else no recording.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int = 64,
        max_positions: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if slots < 1:
            raise RequestError(f"an engine needs at least one slot; slots={slots} came. Give the largest batch wanted.")
        self.slots, self.max_positions = slots, max_positions
        self.runner = Runner(decoder, recorder)
        self._vocabulary = decoder.head_weight().shape[0]
        self._serving = False

    def run(
        self,
        requests: Sequence[GroupRequest],
        *,
        weights: WeightsRef = NAMELESS,
        on_event: Callable[[Event], None] | None = None,
    ) -> tuple[list[list[Completion]], EngineStats]:
        """All completions, in the order of requests and of their keys.  Raises RequestError, NonFiniteError."""
        done: dict[Seat, Completion] = {}
        events = self.stream(requests, weights=weights)
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                return [[done[i, j] for j in range(len(r.keys))] for i, r in enumerate(requests)], end.value
            if on_event is not None:
                on_event(event)
            if event.completion is not None:
                done[event.request, event.sample] = event.completion

    def stream(
        self, requests: Sequence[GroupRequest], *, weights: WeightsRef = NAMELESS
    ) -> Generator[Event, None, EngineStats]:
        """Every token as it is drawn; the generator returns the cost.  Closing it drops what is unfinished."""
        for index, request in enumerate(requests):
            _check(index, request, self._vocabulary, self.max_positions)
        return self._serve(requests, weights)

    def _serve(self, requests: Sequence[GroupRequest], weights: WeightsRef) -> Generator[Event, None, EngineStats]:
        if self._serving:
            raise RequestError("an engine serves one call at a time; finish or close the stream that is open.")
        samples = {(i, j): _Sample(i, j, r, weights) for i, r in enumerate(requests) for j in range(len(r.keys))}
        slots, stats = min(self.slots, len(samples)), EngineStats()
        schedule = Scheduler(
            [len(r.prompt_ids) for r in requests], [r.sampling.max_tokens for r in requests], slots=slots
        )
        decoding: list[_Sample] = []
        self._serving = True
        try:
            rows = max((len(r.prompt_ids) + r.sampling.max_tokens - 1 for r in requests), default=0)
            self.runner.reserve(slots, min(prompt_slots(slots), len(requests)), rows)
            while True:
                self.runner.copy(schedule.fill())
                if prompts := schedule.prompts():
                    fresh = [samples[i, j] for i in prompts for j in range(len(requests[i].keys))]
                    events, cost = self._prefill({slot: requests[i] for i, slot in prompts.items()}, fresh)
                    schedule.ready((s.request, s.sample) for s in fresh if not s.done)
                else:
                    self.runner.copy(schedule.compact())
                    active = [samples[seat] for seat in schedule.active if seat is not None]
                    if not active:
                        return stats
                    if active != decoding:
                        decoding, laws = active, _laws(active, self.runner.device)
                    events, cost = self._decode(decoding, laws)
                    schedule.retire(slot for slot, sample in enumerate(decoding) if sample.done)
                stats += cost
                yield from events
        except NonFiniteError:
            self.runner.forget()
            raise
        finally:
            self._serving = False

    def _prefill(
        self, prompts: Mapping[int, GroupRequest], fresh: Sequence["_Sample"]
    ) -> tuple[list[Event], EngineStats]:
        start = perf_counter()
        tokens = {slot: request.prompt_ids for slot, request in prompts.items()}
        drawn = self.runner.prefill(
            tokens, [len(request.keys) for request in prompts.values()], _laws(fresh, self.runner.device)
        )
        cost = EngineStats(
            seconds_prefill=perf_counter() - start,
            prompt_tokens=sum(len(ids) for ids in tokens.values()),
            sampled_tokens=len(fresh),
        )
        return [sample.take(one) for sample, one in zip(fresh, drawn, strict=True)], cost

    def _decode(self, rows: Sequence["_Sample"], laws: Laws) -> tuple[list[Event], EngineStats]:
        start = perf_counter()
        drawn = self.runner.decode([row.tokens[-1] for row in rows], [row.position - 1 for row in rows], laws)
        cost = EngineStats(
            seconds_decode=perf_counter() - start,
            sampled_tokens=len(rows),
            steps=1,
            row_steps=len(rows),
            context_steps=sum(row.position for row in rows),
        )
        return [row.take(one) for row, one in zip(rows, drawn, strict=True)], cost


class _Sample:
    """A completion that is being drawn."""

    def __init__(self, request: int, sample: int, asked: GroupRequest, weights: WeightsRef) -> None:
        self.request, self.sample, self.weights = request, sample, weights
        self.key, self.sampling = asked.keys[sample], asked.sampling
        self.position = len(asked.prompt_ids)  # of the next token to be drawn
        self.tokens: list[int] = []
        self.logp_sampled: list[float] = []
        self.logp_raw: list[float] = []
        self.done = False
        self._matches = asked.matcher() if asked.matcher is not None else _matches_nothing

    def take(self, drawn: Drawn) -> Event:
        """Append a token."""
        token, logp_sampled, logp_raw, gap = drawn
        if not math.isfinite(logp_raw):
            raise NonFiniteError(
                f"logits must be finite; a NaN or an infinity came at position {self.position} of request "
                f"{self.request}, sample {self.sample}, weights of version {self.weights.version}. Look for NaN there."
            )
        self.position += 1
        self.tokens.append(token)
        self.logp_sampled.append(logp_sampled)
        self.logp_raw.append(logp_raw)
        stop = self._stop(token)
        self.done = stop is not None
        completion = None if stop is None else self._completion(stop)
        return Event(self.request, self.sample, token, logp_sampled, logp_raw, gap, completion)

    def _stop(self, token: int) -> Stop | None:
        if token in self.sampling.stop_ids:
            return "eos"
        if self._matches(token):
            return "stop"
        return "length" if len(self.tokens) == self.sampling.max_tokens else None

    def _completion(self, stop: Stop) -> Completion:
        return Completion(
            token_ids=tuple(self.tokens),
            logp_sampled=tuple(self.logp_sampled),
            logp_raw=tuple(self.logp_raw),
            stop=stop,
            policy_version=self.weights.version,
            weights_hash=self.weights.hash,
            sampling=self.sampling,
            key=self.key,
        )


def _matches_nothing(_: int) -> bool:
    return False


def _laws(samples: Sequence[_Sample], device: torch.device) -> Laws:
    return Laws.of([sample.sampling for sample in samples], [sample.key for sample in samples], device)


def _check(index: int, request: GroupRequest, vocabulary: int, max_positions: int | None) -> None:
    """Refuse a request that cannot be served; the message says which, what was needed, what came, what to do."""
    prompt, s = request.prompt_ids, request.sampling
    length = len(prompt) + s.max_tokens
    bad_id = next((t for t in (*prompt, *s.stop_ids) if not 0 <= t < vocabulary), None)
    bad_key = next((key for key in request.keys if not 0 <= key < 1 << 64), None)
    rules = (
        (
            not prompt,
            "a prompt of at least one token is needed; an empty one came. Begin it with the model's first token.",
        ),
        (bad_id is not None, f"token ids lie in 0 .. {vocabulary - 1}; {bad_id} came. Use the model's own tokenizer."),
        (
            bad_key is not None,
            f"a key is a 64-bit number, 0 or more; {bad_key} came. Make it with rung.core.rng.derive_key.",
        ),
        (s.max_tokens < 1, f"max_tokens must be at least 1; {s.max_tokens} came. Ask for one token or more."),
        (
            max_positions is not None and length > max_positions,
            f"prompt and completion must fit the model's {max_positions} positions; {len(prompt)} + {s.max_tokens} "
            "came. Shorten the prompt or lower max_tokens.",
        ),
        (
            not 0 <= s.temperature < math.inf,
            f"temperature must be 0 (greedy) or positive and finite; {s.temperature} came. 1 is the model's own law.",
        ),
        (s.top_k < 0, f"top_k must be 0 (off) or the number of tokens to keep; {s.top_k} came."),
        (not 0 < s.top_p <= 1, f"top_p must lie in (0, 1], 1 being off; {s.top_p} came."),
        (not 0 <= s.min_p <= 1, f"min_p must lie in [0, 1], 0 being off; {s.min_p} came."),
    )
    for broken, sentence in rules:
        if broken:
            raise RequestError(f"request {index}: {sentence}")
