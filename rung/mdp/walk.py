"""Many walks through one finite model at once, a lane for each key.

What a lane meets is a function of its key and its own actions: every step of a lane has uniform numbers of its own
(`rung.core.rng`), whatever lanes are beside it.  Word 0 chooses the outcome, word 1 where a new episode begins, the
other WORDS - 2 belong to whoever chooses actions.  An episode that ended or was cut is followed by the next one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from rung.core.errors import ModelError
from rung.core.keys import derive_key, signed
from rung.core.rng import uniforms
from rung.core.shapes import Bool, Float, Int, Tensor
from rung.mdp.certificates import distances
from rung.mdp.finite import FiniteMDP, Numbers
from rung.objectives.returns import lambda_return

WORDS = 6  # uniform numbers of a step
BLOCK = 32  # steps whose numbers are computed together

Chooser = Callable[[Int[Tensor, "N"], Float[Tensor, "N W"]], Int[Tensor, "N"]]  # states and noise -> actions


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One transition of every lane.

    discount_N: gamma, and 0 where the episode ended;  same_N: False where it ended or was cut: the lane stands in a new
    episode's first state now, not in next_state_N"""

    state_N: Int[Tensor, "N"]
    action_N: Int[Tensor, "N"]
    reward_N: Float[Tensor, "N"]
    discount_N: Float[Tensor, "N"]
    next_state_N: Int[Tensor, "N"]
    same_N: Bool[Tensor, "N"]


@dataclass(frozen=True, eq=False)
class Tables:
    """A model as dense tables, for drawing: outcomes B of a pair, one more than its transitions (what is missing)."""

    pair_SA: Int[Tensor, "S A"]  # -1: illegal
    legal_SA: Bool[Tensor, "S A"]
    below_PB: Float[Tensor, "P B"]  # chance of an earlier outcome or this one; the last one's is infinite
    next_PB: Int[Tensor, "P B"]
    reward_PB: Float[Tensor, "P B"]
    discount_PB: Float[Tensor, "P B"]
    ends_PB: Bool[Tensor, "P B"]
    below_S: Float[Tensor, "S"]  # of the start distribution

    @staticmethod
    def of(mdp: FiniteMDP) -> "Tables":
        counts_N = mdp.counts_N
        pairs, width = mdp.num_pairs, int(counts_N.max(initial=0)) + 1
        owner_M = np.repeat(np.arange(pairs), counts_N)
        column_M = np.arange(len(owner_M)) - np.repeat(mdp.row_N1[:-1], counts_N)

        def spread(values_M: np.ndarray, rest: Numbers) -> Tensor:
            table = np.broadcast_to(np.asarray(rest)[..., None], (pairs, width)).copy()
            table[owner_M, column_M] = values_M
            return torch.from_numpy(table)

        chance_PB = spread(mdp.prob_M, 0.0).numpy()
        below_PB = chance_PB.cumsum(1)
        full_N = below_PB[:, -1] > 1 - 1e-9
        last = np.maximum(counts_N - 1, 0)
        below_PB[np.arange(width) >= np.where(full_N, last, counts_N)[:, None]] = np.inf
        keep_M = np.ones(len(mdp.prob_M)) if mdp.keep_M is None else mdp.keep_M
        ends_M = (keep_M == 0) | mdp.terminal_S[mdp.next_M]
        reward_M = mdp.reward_N[owner_M] if mdp.reward_M is None else mdp.reward_M
        pair_SA = mdp.table(np.arange(pairs), fill=-1).astype(np.int64)
        below_S = mdp.first_state_S.cumsum()
        below_S[np.flatnonzero(mdp.first_state_S)[-1] :] = np.inf
        return Tables(
            pair_SA=torch.from_numpy(pair_SA),
            legal_SA=torch.from_numpy(pair_SA >= 0),
            below_PB=torch.from_numpy(below_PB),
            next_PB=spread(mdp.next_M, 0).long(),
            reward_PB=spread(reward_M, mdp.reward_N if mdp.reward_M is None else 0.0),
            discount_PB=spread(np.where(ends_M, 0.0, mdp.gamma * keep_M), 0.0),
            ends_PB=spread(ends_M, True),
            below_S=torch.from_numpy(below_S),
        )


def keys(seed: int, lanes: int, *names: int | str) -> list[int]:
    """Keys of `lanes` walks of a run's seed."""
    return [derive_key(seed, *names, lane) for lane in range(lanes)]


class Walk:
    """Lanes that stand in `state_N`; `step` moves them.

    max_steps: an episode is cut after so many;  start_N: first states of the first episodes, drawn where not given.
    Raises ModelError where a terminal state is begun in, or an illegal action taken."""

    def __init__(
        self,
        mdp: FiniteMDP,
        lane_keys: Sequence[int],
        *,
        max_steps: int | None = None,
        start_N: Int[Tensor, "N"] | None = None,
    ) -> None:
        self.mdp, self.tables, self.max_steps = mdp, Tables.of(mdp), max_steps
        self.key_N = torch.tensor([signed(key) for key in lane_keys])
        self._epoch, self._time, self._block_NW = 0, 0, torch.empty(0)
        self.restart(start_N)

    def restart(self, start_N: Int[Tensor, "N"] | None = None) -> None:
        """Begin a new episode in every lane, with numbers that do not depend on how long the last ones were."""
        self._epoch, self._time = self._epoch + 1, 0
        self._draw()
        self.state_N = self._starts() if start_N is None else start_N
        self.age_N = torch.zeros_like(self.key_N)
        self._draw()
        if not bool(self.tables.legal_SA[self.state_N].any(-1).all()):
            raise ModelError("an episode cannot begin in a terminal state; give a start distribution without one")

    @cached_property
    def ends(self) -> bool:
        """Can an end be reached from every state?"""
        return bool((distances(self.mdp) >= 0).all())

    @property
    def moved(self) -> bool:
        """Has a step been taken since the last `restart`?"""
        return self._time > 2

    @property
    def noise_NW(self) -> Float[Tensor, "N W"]:
        """Uniform numbers for the choice of the next action."""
        return self._words_NW[:, 2:]

    def step(self, action_N: Int[Tensor, "N"]) -> Step:
        """Take these actions."""
        tables, state_N = self.tables, self.state_N
        pair_N = tables.pair_SA[state_N, action_N]
        if bool((pair_N < 0).any()):
            lane = int((pair_N < 0).int().argmax())
            self.mdp.pair(int(state_N[lane]), int(action_N[lane]))  # raises, with the names
        outcome_N = (self._words_NW[:, :1] >= tables.below_PB[pair_N]).sum(1)
        ends_N, next_state_N = tables.ends_PB[pair_N, outcome_N], tables.next_PB[pair_N, outcome_N]
        self.age_N += 1
        same_N = ~ends_N if self.max_steps is None else ~(ends_N | (self.age_N >= self.max_steps))
        taken = Step(
            state_N=state_N,
            action_N=action_N,
            reward_N=tables.reward_PB[pair_N, outcome_N],
            discount_N=tables.discount_PB[pair_N, outcome_N],
            next_state_N=next_state_N,
            same_N=same_N,
        )
        self.state_N = torch.where(same_N, next_state_N, self._starts())
        self.age_N.masked_fill_(~same_N, 0)
        self._draw()
        return taken

    def _starts(self) -> Int[Tensor, "N"]:
        return torch.searchsorted(self.tables.below_S, self._words_NW[:, 1].contiguous(), right=True)

    def _draw(self) -> None:
        """The numbers of the next step."""
        block, within = divmod(self._time, BLOCK)
        if not within:
            position_N = torch.full_like(self.key_N, self._epoch << 32 | block)
            self._block_NW = uniforms(self.key_N, position_N, torch.arange(BLOCK * WORDS))
        self._words_NW = self._block_NW[:, within * WORDS : (within + 1) * WORDS]
        self._time += 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Episode:
    """One episode of every lane, time-major; rows after a lane's own last one are not `alive`."""

    state_TN: Int[Tensor, "T N"]
    action_TN: Int[Tensor, "T N"]
    reward_TN: Float[Tensor, "T N"]
    discount_TN: Float[Tensor, "T N"]
    next_state_TN: Int[Tensor, "T N"]
    same_TN: Bool[Tensor, "T N"]
    alive_TN: Bool[Tensor, "T N"]

    @cached_property
    def return_TN(self) -> Float[Tensor, "T N"]:
        """What was still paid in the episode, discounted; after a cut nothing is to come."""
        return lambda_return(self.reward_TN, self.discount_TN, torch.zeros_like(self.reward_TN), 1.0, self.same_TN)


def episode(
    walk: Walk,
    choose: Chooser,
    *,
    start_N: Int[Tensor, "N"] | None = None,
    first_action_N: Int[Tensor, "N"] | None = None,
) -> Episode:
    """A new episode of every lane; lanes that are done early walk on unseen.

    Raises ModelError where no end can be reached from some state and the walk has no max_steps."""
    if walk.max_steps is None and not walk.ends:
        raise ModelError("from some state no end can be reached, so an episode may never end: give max_steps")
    if walk.moved or start_N is not None:
        walk.restart(start_N)
    alive_N = torch.ones(len(walk.key_N), dtype=torch.bool)
    steps: list[Step] = []
    alive: list[Tensor] = []
    while bool(alive_N.any()):
        first = first_action_N is not None and not steps
        action_N = first_action_N if first else choose(walk.state_N, walk.noise_NW)
        assert action_N is not None
        steps.append(walk.step(action_N))
        alive.append(alive_N)
        alive_N = alive_N & steps[-1].same_N
    columns = {name: torch.stack([getattr(step, name) for step in steps]) for name in Step.__dataclass_fields__}
    return Episode(**{f"{name[:-1]}TN": column for name, column in columns.items()}, alive_TN=torch.stack(alive))


def draw_soft_greedy(
    q_NA: Float[Tensor, "N A"], legal_NA: Bool[Tensor, "N A"], epsilon: float, noise_NW: Float[Tensor, "N W"]
) -> Int[Tensor, "N"]:
    """Any legal action with chance epsilon, else one with the largest q; equal ones alike."""
    masked_NA = q_NA.masked_fill(~legal_NA, -torch.inf)
    top_NA = masked_NA == masked_NA.amax(-1, keepdim=True)
    among_NA = torch.where(noise_NW[:, :1] < epsilon, legal_NA, top_NA)
    place_N1 = (noise_NW[:, 1] * among_NA.sum(-1)).long()[:, None]
    return (among_NA.cumsum(-1) > place_N1).int().argmax(-1)


def soft_greedy(q_NA: Float[Tensor, "N A"], legal_NA: Bool[Tensor, "N A"], epsilon: float) -> Float[Tensor, "N A"]:
    """The law of `draw_soft_greedy`."""
    masked_NA = q_NA.masked_fill(~legal_NA, -torch.inf)
    top_NA = ((masked_NA == masked_NA.amax(-1, keepdim=True)) & legal_NA).to(q_NA)
    any_NA = legal_NA.to(q_NA)
    share_NA = top_NA / top_NA.sum(-1, keepdim=True).clamp(min=1)
    return epsilon * any_NA / any_NA.sum(-1, keepdim=True).clamp(min=1) + (1 - epsilon) * share_NA


def follow(pi_SA: Float[Tensor, "S A"]) -> Chooser:
    """Draw from a table of probabilities."""
    below_SA = pi_SA.cumsum(-1)
    last_S1 = (pi_SA > 0).int().cumsum(-1).argmax(-1, keepdim=True)
    below_SA = torch.where(torch.arange(pi_SA.shape[1]) >= last_S1, torch.inf, below_SA)

    def choose(state_N: Tensor, noise_NW: Tensor) -> Tensor:
        return (noise_NW[:, :1] >= below_SA[state_N]).sum(-1)

    return choose
