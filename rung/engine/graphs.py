"""A decoding step as one replay: everything that varies is written into static tensors, everything else is recorded.

A step of a small model is some hundred short kernels; launched one by one, a GPU waits for Python between them.  So the
step (embedding, blocks, attention, head, draw) is recorded once for each of

    rows R          the row bucket
    rows C          of each slot that attention reads: the longest sequence, rounded up
    kind of laws    which of temperature, filters, top-k, top-p any row has

when the first step of that shape comes, and replayed from then on: one transfer in (tokens, slots, positions), one
launch, one transfer out (what was drawn).  Laws are written when the set of samples changes.  Lengths are counted on
the host; nothing inside a step asks the device.

A recording knows addresses: of the state, whose rows are settled, and of the weights, which change in place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from rung.core.records import Sampling
from rung.core.shapes import Float, Int, Tensor
from rung.engine.sampling import Laws, draw
from rung.lm.protocols import SettledState, StaticDecoder

ROW_BUCKETS = (1, 8, 16, 32, 64, 128)  # rows of one decoding step; beyond the last, its multiples
CONTEXT_BUCKET = 128  # rows of a slot that are read are a multiple of this, or of an eighth of themselves
WARM_UP = 3  # steps before a recording: libraries make their plans and workspaces in the first

Drawn = tuple[int, float, float, float]  # token, logp_sampled, logp_raw, gap
Step = Callable[[], Tensor]


@runtime_checkable
class Recorder(Protocol):
    """Makes a step cheap to repeat."""

    def record(self, step: Step) -> Step:
        """A function that does the operations of `step` again, on the same tensors, and returns what it returns."""


class CudaGraphs:
    """Records on a CUDA device.  All recordings share one pool of memory: one runs at a time, and only what it returns
    is read behind it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream(device)  # one: libraries keep a workspace for every stream

    def record(self, step: Step) -> Step:
        """Runs it WARM_UP times (a replay then writes the same again), and records it.  [PyTorch: CUDA semantics]"""
        with torch.cuda.device(self._device), _plain_kernels():
            here, aside = torch.cuda.current_stream(), self._aside
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    step()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What the recordings of one row bucket read."""

    token_slot_position_3R: Int[Tensor, "3 R"]
    laws: Laws


class StaticSteps:
    """The decoding steps on one state, recorded as they come.  The state's last slot is the fillers'."""

    def __init__(self, decoder: StaticDecoder, recorder: Recorder, state: SettledState) -> None:
        self._decoder, self._recorder, self._state = decoder, recorder, state
        self._device = decoder.head_weight().device
        self._step = decoder.static_step(state)
        self._inputs: dict[int, _Inputs] = {}
        self._recorded: dict[tuple[object, ...], Step] = {}
        self._laws: Laws | None = None  # that the inputs hold

    def draw(self, tokens: Sequence[int], positions: Sequence[int], laws: Laws) -> list[Drawn]:
        """Feed one token to each of the slots 0 .. R - 1, at these positions, which are their lengths; commit, and draw
        each slot's next token."""
        rows, bucket = len(tokens), row_bucket(len(tokens))
        fillers, trash = [0] * (bucket - rows), [self._state.slots - 1] * (bucket - rows)
        if bucket not in self._inputs:
            self._inputs[bucket] = self._room(bucket)
        inputs = self._inputs[bucket]
        inputs.token_slot_position_3R.copy_(
            torch.tensor([[*tokens, *fillers], [*range(rows), *trash], [*positions, *fillers]])
        )
        if laws is not self._laws:
            for static, column in zip(inputs.laws.columns, laws.columns, strict=True):
                static[:rows].copy_(column)
            self._laws = laws
        context = context_bucket(max(positions) + 1, self._state.capacity)
        key = (bucket, context, laws.kind)
        if key not in self._recorded:
            self._recorded[key] = self._recorder.record(self._drawing(inputs, context, laws))
        self._state.extend(rows)
        return drawn(self._recorded[key]())[:rows]

    def _room(self, bucket: int) -> _Inputs:
        zeros_3R = torch.zeros(3, bucket, dtype=torch.long, device=self._device)
        return _Inputs(zeros_3R, Laws.of([Sampling(max_tokens=1)] * bucket, [0] * bucket, self._device))

    def _drawing(self, inputs: _Inputs, context: int, laws: Laws) -> Step:
        of_kind = replace(
            inputs.laws, tempered=laws.tempered, filtered=laws.filtered, cut_k=laws.cut_k, cut_p=laws.cut_p
        )
        token_R, slot_R, position_R = inputs.token_slot_position_3R

        def step() -> Tensor:
            hidden_RD = self._step(token_R, slot_R, position_R, context)
            return draw(self._decoder.head(hidden_RD), position_R + 1, of_kind).table()

        return step


def drawn(table_N4: Float[Tensor, "N 4"]) -> list[Drawn]:
    """The rows of `Draws.table` on the host: the one transfer of a step."""
    return [(int(token), sampled, raw, gap) for token, sampled, raw, gap in table_N4.tolist()]


def row_bucket(rows: int) -> int:
    """The number of rows a step of `rows` is computed with."""
    return next((bucket for bucket in ROW_BUCKETS if bucket >= rows), round_up(rows, ROW_BUCKETS[-1]))


def context_bucket(rows: int, capacity: int) -> int:
    """How many rows of each slot a recorded step reads where the longest sequence has so many: an eighth too many at
    most, beyond some hundred, and at most eight numbers from a length to its double."""
    multiple = max(CONTEXT_BUCKET, 1 << max(rows.bit_length() - 4, 0))
    return min(round_up(rows, multiple), capacity)


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """No sorting of indices that are unique, no filling of fresh memory: what `use_deterministic_algorithms` adds.  A
    step has no operation whose result depends on it."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
