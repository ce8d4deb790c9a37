"""Which sample is computed where, and when: continuous batching without a tensor.  [Yu 2022, Orca]

A prompt is computed once, in a slot of its own (`slots`, `slots` + 1, ...), and its rows are copied to a decoding slot
for each of its samples, as slots come free.  Decoding slots are 0 .. R - 1 without holes: a finished sample's slot goes
to a sample that is ready, else to the last row.  Whenever a slot is free and no sample is ready, the next prompts are
computed together, more than are needed at once, so that later slots are filled without delay.

Requests with the larger token limit go first (longest processing time first [Graham 1969]), in order where limits are
equal.  The order changes no token.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PROMPT_TOKENS = 2048  # of one forward over prompts; a longer prompt goes alone

Seat = tuple[int, int]  # request and sample


@dataclass(frozen=True)
class Copy:
    """Copy a slot's rows to other slots."""

    source: int
    targets: tuple[int, ...]


class Scheduler:
    """`active[s]` is the sample that slot s decodes; None is a hole, which `fill` and `compact` close."""

    def __init__(self, prompt_lengths: Sequence[int], limits: Sequence[int], *, slots: int) -> None:
        self.slots, self._prompt_slots = slots, prompt_slots(slots)
        self.active: list[Seat | None] = []
        self._lengths = prompt_lengths
        self._waiting = deque(sorted(range(len(limits)), key=lambda request: -limits[request]))
        self._ready: deque[Seat] = deque()
        self._home: dict[int, int] = {}  # slot of a computed prompt

    def prompts(self) -> dict[int, int]:
        """Requests whose prompts are to be computed now, and the slot for each; empty where no sample is wanted."""
        free = self.slots - sum(seat is not None for seat in self.active)
        if self._ready or not free:
            return {}
        self._home, tokens = {}, 0
        while self._waiting and len(self._home) < self._prompt_slots:
            tokens += self._lengths[self._waiting[0]]
            if self._home and tokens > PROMPT_TOKENS:
                break
            self._home[self._waiting.popleft()] = self.slots + len(self._home)
        return self._home

    def ready(self, seats: Iterable[Seat]) -> None:
        """These samples of the prompts just computed have their first token and want a slot."""
        self._ready.extend(seats)

    def fill(self) -> list[Copy]:
        """Give free slots to samples that are ready; the copies are to be made at once."""
        holes = deque(slot for slot, seat in enumerate(self.active) if seat is None)
        targets: dict[int, list[int]] = {}
        while self._ready and (holes or len(self.active) < self.slots):
            if not holes:
                holes.append(len(self.active))
                self.active.append(None)
            seat, slot = self._ready.popleft(), holes.popleft()
            self.active[slot] = seat
            targets.setdefault(self._home[seat[0]], []).append(slot)
        return [Copy(source, tuple(slots)) for source, slots in targets.items()]

    def retire(self, slots: Iterable[int]) -> None:
        """The samples in these slots are finished."""
        for slot in slots:
            self.active[slot] = None

    def compact(self) -> list[Copy]:
        """Move the last rows into the holes that are left, in this order of copies."""
        copies = []
        while None in self.active:
            seat = self.active.pop()
            if seat is not None:
                hole = self.active.index(None)
                self.active[hole] = seat
                copies.append(Copy(len(self.active), (hole,)))
        return copies


def prompt_slots(slots: int) -> int:
    """How many prompts are computed ahead, each in a slot of its own behind the decoding ones."""
    return max(8, slots // 8)
