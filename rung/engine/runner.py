"""The tensors of one engine: builds layouts, runs the decoder, draws tokens.

Shapes are rounded up to buckets, so that kernels are prepared once and a row's arithmetic seldom depends on how many
rows are around it.  Filler rows are computed and ignored.  Where steps can be recorded, `graphs.py` makes them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from rung.core.records import FILLER, ROOT, Layout
from rung.core.shapes import Float, Int, Tensor
from rung.engine.graphs import CudaGraphs, Drawn, Recorder, StaticSteps, drawn, round_up, row_bucket
from rung.engine.sampling import Laws, draw
from rung.engine.scheduler import Copy
from rung.lm.protocols import Decoder, State, StaticDecoder

TOKEN_BUCKET = 64  # prompt tokens of one forward, and rows of a slot, are multiples of this


class Runner:
    """Owns the state.  Reads the decoder's parameters in place: updating them changes the next draw.

    recorder: of decoding steps; None on a CUDA device: its graphs.  A decoder without a static step needs none."""

    def __init__(self, decoder: Decoder, recorder: Recorder | None = None) -> None:
        self.decoder = decoder
        self.device = decoder.head_weight().device
        self.state: State | None = None
        self._rows = 0  # slots that the last step decoded
        if recorder is None and self.device.type == "cuda":
            recorder = CudaGraphs(self.device)
        self._record: Callable[[Any], StaticSteps] | None = None
        if recorder is not None and isinstance(decoder, StaticDecoder):
            self._record = partial(StaticSteps, decoder, recorder)
        self._steps: StaticSteps | None = None  # on this very state

    @torch.inference_mode()
    def reserve(self, active: int, prompts: int, rows: int) -> None:
        """Have an empty state of so many slots to decode in, and behind them to compute prompts in, of so many rows at
        least; allocates only where the last is too small."""
        old, slots = self.state, active + prompts
        if self._record is not None:
            slots = max(slots, row_bucket(active)) + 1  # the last one is the fillers'
        if old is None or slots > old.slots or rows > old.capacity:
            size = (slots, rows) if old is None else (max(slots, old.slots), max(rows, old.capacity))
            old = self.state = self._steps = None  # its memory goes first
            self.state = self.decoder.new_state(size[0], round_up(size[1], TOKEN_BUCKET))
            self._steps = None if self._record is None else self._record(self.state)
        self._state.free(torch.arange(self._state.slots))
        self._rows = 0

    def forget(self) -> None:
        """Drop the state: what is not finite came from it or went into it, and a recorded step reads dead rows too."""
        self.state = self._steps = None

    @torch.inference_mode()
    def copy(self, copies: Sequence[Copy]) -> None:
        pairs = [(copy.source, target) for copy in copies for target in copy.targets]
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self._state.fork(sources, targets)

    @torch.inference_mode()
    def prefill(self, prompts: Mapping[int, Sequence[int]], samples: Sequence[int], laws: Laws) -> list[Drawn]:
        """Compute prompts (slot -> token ids) in one forward, and draw the first tokens, samples[i] of the i-th prompt.

        What a prompt has in common with the one before it is computed once; only its last row goes to the head.
        """
        lengths, slots = [len(ids) for ids in prompts.values()], torch.tensor(list(prompts))
        limits = lengths if self.decoder.branches else [0] * len(lengths)
        trie, shared = Layout.trie(list(prompts.values()), limits, slots=list(prompts))
        filler = -len(trie) % TOKEN_BUCKET
        layout = Layout.concat([trie, _fillers(filler)])
        tokens = [token for ids, n in zip(prompts.values(), shared, strict=True) for token in ids[n:]] + [0] * filler
        self._state.free(slots)
        hidden_TD = self.decoder.forward(torch.tensor(tokens, device=self.device), layout, self._state)
        path_SN = torch.arange(max(lengths)).expand(len(lengths), -1)
        self._state.commit(slots, path_SN, torch.tensor(lengths))
        last_S = (torch.tensor(lengths) - torch.tensor(shared)).cumsum(0) - 1
        padded = torch.cat((last_S, last_S[:1].expand(row_bucket(len(last_S)) - len(last_S))))
        logits_SV = self.decoder.head(hidden_TD[padded.to(self.device)])
        of_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(samples))
        return self._draw(logits_SV[of_N.to(self.device)], torch.tensor(lengths)[of_N], laws)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], positions: Sequence[int], laws: Laws) -> list[Drawn]:
        """Feed one token to each of the slots 0 .. R - 1, at these positions; draw each slot's next token."""
        rows = len(tokens)
        if rows < self._rows:  # finished samples: their rows need not be kept
            self._state.free(torch.arange(rows, self._rows))
        self._rows = rows
        if self._steps is not None:
            return self._steps.draw(tokens, positions, laws)
        fillers = [0] * (row_bucket(rows) - rows)
        slot_R, root_R, first_R1, one_R = _step(rows)
        position_R = torch.tensor([*positions, *fillers])
        token_R = torch.tensor([*tokens, *fillers], device=self.device)
        hidden_RD = self.decoder.forward(token_R, Layout(root_R, slot_R, position_R), self._state)
        self._state.commit(slot_R[:rows], first_R1, one_R)
        return self._draw(self.decoder.head(hidden_RD)[:rows], position_R[:rows] + 1, laws)

    def _draw(self, logits_NV: Float[Tensor, "N V"], position_N: Int[Tensor, "N"], laws: Laws) -> list[Drawn]:
        return drawn(draw(logits_NV, position_N.to(self.device), laws).table())

    @property
    def _state(self) -> State:
        assert self.state is not None, "reserve() comes first"
        return self.state


@cache
def _step(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every step of so many rows shares: slots and parents (with filler), paths and counts of the commit."""
    bucket = row_bucket(rows)
    slot_R = torch.arange(bucket)
    slot_R[rows:] = FILLER
    return slot_R, torch.full((bucket,), ROOT), torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows).long()


def _fillers(count: int) -> Layout:
    return Layout(torch.full((count,), ROOT), torch.full((count,), FILLER), torch.zeros(count, dtype=torch.long))
