"""A finite Markov decision process, as a sparse matrix with one row for each legal pair of a state and an action.

    v(s) = max over the pairs n of s of   reward_N[n] + gamma * sum over the row m of n of   weight_M[m] v(next_M[m])

A state without pairs is terminal: its value is 0.  A row may sum to less than one: what is missing ends the episode.
So no absorbing states are needed, and gamma = 1 is a number like any other where every good policy ends.

Letters: S states, N pairs, M transitions, A actions.  [Puterman 1994, chapters 5 and 6; Bertsekas & Tsitsiklis 1991]
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.core.errors import ModelError
from rung.mdp.checks import check, room_for

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]  # next_M is best int32: half the memory to read
Index = int | np.integer
Numbers = NDArray[Any] | Sequence[Any] | float | int  # what NumPy makes an array of
Number = float | int
MANY = 100_000  # numbers from which on it pays to load compiled loops
Outcomes = Iterable[tuple[Any, ...]]  # probability, next state, reward, and a factor on gamma if it has one


@dataclass(frozen=True, eq=False, kw_only=True)
class FiniteMDP:
    """States 0 .. S-1; the pairs of state s are first_S1[s] .. first_S1[s+1] - 1, the transitions of pair n likewise.

    first_S1, row_N1:  where the pairs of a state and the transitions of a pair begin, [S + 1] and [N + 1]
    action_N:          the action of a pair, in 0 .. num_actions - 1; pairs that are not there are illegal
    next_M, prob_M:    where a transition leads, and its probability
    reward_N:          expected reward of a pair
    gamma:             discount, 0 .. 1
    reward_M:          reward of each transition, where samples differ within a pair; reward_N is then their mean
    keep_M:            factor on gamma of each transition; 0 ends the episode there, whatever the next state
    start_S:           distribution of the first state
    state_names, action_names:  for people; empty: numbers

    Raises ModelError, naming state and action, on whatever is not such a process.
    """

    first_S1: Ints
    action_N: Ints
    row_N1: Ints
    next_M: Ints
    prob_M: Floats
    reward_N: Floats
    gamma: float
    num_actions: int
    reward_M: Floats | None = None
    keep_M: Floats | None = None
    start_S: Floats | None = None
    state_names: Sequence[str] = ()
    action_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        check(self)

    @property
    def num_states(self) -> int:
        return len(self.first_S1) - 1

    @property
    def num_pairs(self) -> int:
        return len(self.action_N)

    @cached_property
    def weight_M(self) -> Floats:
        """Probability that a transition happens and the episode goes on; times gamma, what its next value counts."""
        return self.prob_M if self.keep_M is None else self.prob_M * self.keep_M

    @cached_property
    def state_N(self) -> Ints:
        """The state of each pair."""
        return np.repeat(np.arange(self.num_states), np.diff(self.first_S1))

    @cached_property
    def counts_N(self) -> Ints:
        """How many transitions each pair has."""
        return np.diff(self.row_N1)

    @cached_property
    def chance_N(self) -> Floats:
        """Sum of prob_M over each row: what is missing to 1 ends the episode without a transition."""
        return sums(self.prob_M, self.row_N1)

    @cached_property
    def weight_N(self) -> Floats:
        """Sum of weight_M over each row: the probability that the episode goes on."""
        return self.chance_N if self.keep_M is None else sums(self.weight_M, self.row_N1)

    @cached_property
    def lightest_and_heaviest(self) -> tuple[float, float]:
        """The smallest and the largest of weight_N; 1 and 0 without any."""
        return float(self.weight_N.min(initial=1.0)), float(self.weight_N.max(initial=0.0))

    @cached_property
    def largest_reward(self) -> float:
        """Of a pair, without its sign."""
        return float(abs(self.reward_N).max(initial=0.0))

    @cached_property
    def longest_row(self) -> int:
        """The most transitions of a pair."""
        return int(self.counts_N.max(initial=0))

    def mean_of(self, numbers_M: Floats) -> Floats:
        """Sum over each row of probability times a number, [N]."""
        return sums(self.prob_M * numbers_M, self.row_N1)

    @cached_property
    def terminal_S(self) -> NDArray[np.bool_]:
        """States without actions."""
        return np.diff(self.first_S1) == 0

    @cached_property
    def first_state_S(self) -> Floats:
        """start_S; where the model has none, all states with actions alike."""
        if self.start_S is not None:
            return self.start_S
        return ~self.terminal_S / max(int((~self.terminal_S).sum()), 1)

    def pair(self, state: Index, action: Index) -> int:
        """The number of a legal pair.  Raises ModelError where the action is illegal."""
        first, last = self.first_S1[state], self.first_S1[state + 1]
        found = np.flatnonzero(self.action_N[first:last] == action)
        if not len(found):
            legal = ", ".join(self.action_name(a) for a in self.action_N[first:last]) or "none: it is terminal"
            raise ModelError(f"{self.action_name(action)} is illegal in {self.state_name(state)}; legal: {legal}")
        return int(first + found[0])

    def table(self, values_N: Numbers, fill: Number = np.nan) -> Floats:
        """Numbers per pair as a table [S, A], `fill` where a pair is illegal."""
        table_SA = np.full((self.num_states, self.num_actions), fill, dtype=float)
        table_SA[self.state_N, self.action_N] = values_N
        return table_SA

    def with_gamma(self, gamma: float) -> "FiniteMDP":
        """The same process, discounted otherwise."""
        return replace(self, gamma=gamma)

    def state_name(self, state: Index) -> str:
        return f"state {self.state_names[int(state)]}" if len(self.state_names) else f"state {state}"

    def action_name(self, action: Index) -> str:
        return f"action {self.action_names[int(action)]}" if len(self.action_names) else f"action {action}"


def from_arrays(
    prob_SAS: Numbers,
    reward: Numbers,
    gamma: float,
    *,
    legal_SA: Numbers | None = None,
    keep_SAS: Numbers | None = None,
    start_S: Numbers | None = None,
) -> FiniteMDP:
    """From a dense table of probabilities and rewards on (s, a) or (s, a, s').

    A pair is legal where `legal_SA` says so; without it, everywhere.  keep_SAS: factor on gamma of each transition."""
    prob_SAS = np.asarray(prob_SAS, dtype=float)
    rewards = np.asarray(reward, dtype=float)
    if prob_SAS.ndim != 3 or prob_SAS.shape[0] != prob_SAS.shape[2]:
        raise ModelError(f"probabilities are an array [states, actions, states]; got shape {prob_SAS.shape}")
    if rewards.shape not in (prob_SAS.shape, prob_SAS.shape[:2]):
        raise ModelError(f"rewards have the shape {prob_SAS.shape[:2]} or {prob_SAS.shape}; got {rewards.shape}")
    states, actions, _ = prob_SAS.shape
    legal = np.ones((states, actions), bool) if legal_SA is None else np.asarray(legal_SA, dtype=bool)
    if legal.shape != (states, actions):
        raise ModelError(f"legal actions are an array of shape {(states, actions)}; got {legal.shape}")
    state_N, action_N = legal.nonzero()
    rows_NS = prob_SAS[state_N, action_N]
    pair_M, next_M = rows_NS.nonzero()
    prob_M = rows_NS[pair_M, next_M]
    row_N1 = _starts(pair_M, len(state_N))
    cells = (state_N[pair_M], action_N[pair_M], next_M)
    reward_M = rewards[cells] if rewards.ndim == 3 else None
    reward_N = rewards[state_N, action_N] if reward_M is None else sums(prob_M * reward_M, row_N1)
    return FiniteMDP(
        first_S1=_starts(state_N, states),
        action_N=action_N,
        row_N1=row_N1,
        next_M=next_M,
        prob_M=prob_M,
        reward_N=reward_N,
        reward_M=reward_M,
        keep_M=None if keep_SAS is None else np.asarray(keep_SAS, dtype=float)[cells],
        gamma=gamma,
        num_actions=actions,
        start_S=None if start_S is None else np.asarray(start_S, dtype=float),
    )


def from_dict(
    model: Mapping[Any, Mapping[Any, Outcomes]],
    gamma: float,
    *,
    start: Mapping[Any, Number] | None = None,
) -> FiniteMDP:
    """From {state: {action: [(probability, next state, reward), ...]}}; a fourth number is a factor on gamma.

    States are the keys, in their order; a next state that is no key, None among them, is terminal."""
    return from_function(lambda state: model.get(state, {}), list(model), gamma, start=start)


def from_function(
    outcomes: Callable[[Any], Mapping[Any, Outcomes]],
    states: Sequence[Hashable],
    gamma: float,
    *,
    start: Mapping[Any, Number] | None = None,
) -> FiniteMDP:
    """From a function of a state that returns {action: [(probability, next state, reward), ...]}.

    A fourth number is a factor on gamma.  Begins with `states`, and goes on with all that can be reached from them."""
    number = {state: index for index, state in enumerate(dict.fromkeys(states))}
    actions: dict[Hashable, int] = {}
    found = list(number)
    pairs_S, action_N, counts_N = [], [], []
    next_M, prob_M, reward_M, keep_M = [], [], [], []
    for state in found:  # grows while it is walked
        rows = outcomes(state)
        pairs_S.append(len(rows))
        for action, row in rows.items():
            action_N.append(actions.setdefault(action, len(actions)))
            row = list(row)
            counts_N.append(len(row))
            for probability, successor, reward, *keep in row:
                if successor not in number:
                    number[successor] = len(found)
                    found.append(successor)
                next_M.append(number[successor])
                prob_M.append(float(probability))
                reward_M.append(float(reward))
                keep_M.append(float(keep[0]) if keep else 1.0)
    row_N1 = np.concatenate(([0], np.cumsum(counts_N, dtype=np.int64)))
    prob, rewards = np.array(prob_M), np.array(reward_M)
    start_S = None
    if start is not None:
        start_S = np.zeros(len(found))
        for state, probability in start.items():
            if state not in number:
                raise ModelError(f"the start distribution names the state {state!r}, which the model does not have")
            start_S[number[state]] = probability
    return FiniteMDP(
        first_S1=np.concatenate(([0], np.cumsum(pairs_S, dtype=np.int64))),
        action_N=np.array(action_N, dtype=np.int64),
        row_N1=row_N1,
        next_M=np.array(next_M, dtype=np.int64),
        prob_M=prob,
        reward_N=sums(prob * rewards, row_N1),
        reward_M=rewards,
        keep_M=None if all(keep == 1 for keep in keep_M) else np.array(keep_M),
        gamma=gamma,
        num_actions=len(actions),
        start_S=start_S,
        state_names=[str(state) for state in found],
        action_names=[str(action) for action in actions],
    )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A batch of consecutive states for `from_batches`: how many pairs each has, and their rows, as in FiniteMDP."""

    pairs_S: Ints
    action_N: Ints
    counts_N: Ints  # transitions of each pair
    next_M: Ints
    prob_M: Floats
    reward_N: Floats
    reward_M: Floats | None = None
    keep_M: Floats | None = None


def from_batches(
    batches: Iterable[Rows], gamma: float, *, num_states: int, num_actions: int, start_S: Floats | None = None
) -> FiniteMDP:
    """From batches of rows, for models that no dense table holds; states in order, `num_states` in all.

    Raises ModelError before the first batch is asked for where even one transition a state cannot fit in memory."""
    room_for(num_states, pairs=1, outcomes=1)
    parts = list(batches)
    seen = sum(len(part.pairs_S) for part in parts)
    if seen != num_states:
        raise ModelError(f"the batches hold {seen} states; {num_states} were announced")

    def joined(name: str) -> Any:
        found = [getattr(part, name) for part in parts]
        return None if any(array is None for array in found) else np.concatenate(found)

    return FiniteMDP(
        first_S1=np.concatenate(([0], np.cumsum(joined("pairs_S"), dtype=np.int64))),
        action_N=joined("action_N"),
        row_N1=np.concatenate(([0], np.cumsum(joined("counts_N"), dtype=np.int64))),
        next_M=joined("next_M"),
        prob_M=joined("prob_M"),
        reward_N=joined("reward_N"),
        reward_M=joined("reward_M"),
        keep_M=joined("keep_M"),
        start_S=start_S,
        gamma=gamma,
        num_actions=num_actions,
    )


def from_gymnasium(env: Any, gamma: float) -> FiniteMDP:
    """From a toy-text environment of Gymnasium, by its table `env.unwrapped.P` and its `initial_state_distrib`.

    A transition that the environment calls terminated ends the episode, whatever its next state."""
    table = getattr(env.unwrapped, "P", None)
    if table is None:
        raise ModelError(
            f"{env} has no table P of its transitions; FrozenLake, Taxi and CliffWalking have one, and Blackjack "
            "is rung.mdp.zoo.blackjack"
        )
    states, actions = len(table), len(table[0])
    rows = [table[s][a] for s in range(states) for a in range(actions)]
    row_N1 = np.concatenate(([0], np.cumsum([len(row) for row in rows])))
    prob_M, next_M, reward_M, ended_M = (
        np.array(column) for column in zip(*(o for row in rows for o in row), strict=True)
    )
    reward_M = reward_M.astype(float)
    start = getattr(env.unwrapped, "initial_state_distrib", None)
    return FiniteMDP(
        first_S1=np.arange(0, states * actions + 1, actions),
        action_N=np.tile(np.arange(actions), states),
        row_N1=row_N1,
        next_M=next_M,
        prob_M=prob_M,
        reward_N=sums(prob_M * reward_M, row_N1),
        reward_M=reward_M,
        keep_M=1.0 - ended_M,
        gamma=gamma,
        num_actions=actions,
        start_S=None if start is None else np.asarray(start, dtype=float),
    )


def sums(numbers_M: Floats, row_N1: Ints, *, twin: bool = False) -> Floats:
    """Sum over each row; an empty row gives 0."""
    total_N = np.zeros(len(row_N1) - 1)
    if len(numbers_M) > MANY and not twin:
        from rung.mdp.kernels import sums

        sums(numbers_M, row_N1, total_N)
        return total_N
    filled_N = np.diff(row_N1) > 0
    if filled_N.any():
        total_N[filled_N] = np.add.reduceat(numbers_M, row_N1[:-1][filled_N])
    return total_N


def _starts(owner_N: NDArray[np.integer], owners: int) -> Ints:
    """Where the entries of each owner begin, for owners in order."""
    return np.concatenate(([0], np.cumsum(np.bincount(owner_N, minlength=owners), dtype=np.int64)))
