"""Bounds on v* that hold whatever produced the value they start from (up to the rounding of fp64).

Discounted: with d = T v - v and b = gamma times the weight of a row,

    T v + b/(1-b) min d  <=  v*  <=  T v + b/(1-b) max d                                   [MacQueen 1966; Porteus 1971]

where b is the largest or the smallest of all rows, whichever is on the safe side; d is widened by what fp64 may have
rounded off a backup.

gamma = 1: v* is the best value of all policies that end.  Let w solve w = 1 + P_pi w, the expected number of steps of a
policy pi.  If v + c w >= T(v + c w) for some c >= 0, then v + c w bounds the value of every policy that ends: a
monotone map that contracts in the norm weighted by w.                                     [Bertsekas & Tsitsiklis 1991]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rung.core.errors import ModelError
from rung.mdp.finite import FiniteMDP, Floats, Ints, sums
from rung.mdp.linear import SMALL, krylov, rows_of, times
from rung.mdp.operators import backup, greedy, modulus, policy_matrix, q_values, ties

NEAR_ONE = 1e-12  # rows that sum to less than 1 by no more than this do not contract: their sum is a rounded 1
BLUR = 1e-13  # of the largest value: a gain by so little is none, where nothing contracts
FLAT = 0.01  # progress of a pair, in steps, below which even such a gain counts
LONGEST = 1e12  # expected steps beyond which nothing is left of fp64


@dataclass(frozen=True, eq=False)
class Bounds:
    """lower_S <= v* <= upper_S; `gap` is their largest distance."""

    lower_S: Floats
    upper_S: Floats

    @property
    def gap(self) -> float:
        return float((self.upper_S - self.lower_S).max())

    @property
    def middle_S(self) -> Floats:
        """Off by at most gap / 2."""
        return (self.lower_S + self.upper_S) / 2


class Certifier:
    """Bounds on v* of one model, from any values."""

    def __init__(self, mdp: FiniteMDP) -> None:
        self.mdp, self.contracts = mdp, contracts(mdp)
        self.ending_S = None if self.contracts else ending_pairs(mdp)
        self._known: tuple[bytes, Floats] | None = None  # the last policy, and its expected steps

    def start(self) -> Floats:
        """Values to begin with: 0, or at gamma = 1 those of a policy that ends, from where iterates can only rise."""
        if self.ending_S is None:
            return np.zeros(self.mdp.num_states)
        return followed(self.mdp, self.ending_S, np.where(self.ending_S >= 0, self.mdp.reward_N[self.ending_S], 0.0))

    def __call__(self, v_S: Floats, next_S: Floats, pair_S: Ints) -> tuple[Bounds, Ints]:
        """From v, T v and a policy that is greedy for v: bounds, and the policy that reaches the lower one.

        That is `pair_S`; at gamma = 1, where it does not end, one that takes tied pairs and ends."""
        if self.ending_S is None:
            return discounted(self.mdp, v_S, next_S), pair_S
        for proper_S in self._that_may_end(v_S, pair_S):
            try:
                return undiscounted(self.mdp, v_S, proper_S, self._steps(proper_S)), proper_S
            except ModelError:
                continue
        raise ModelError("no policy ends soon enough for fp64 to tell its value")

    def _that_may_end(self, v_S: Floats, pair_S: Ints) -> Iterator[Ints]:
        assert self.ending_S is not None
        yield pair_S
        tied_N = ties(self.mdp, q_values(self.mdp, v_S))
        if (distances(self.mdp, allowed_N=tied_N) >= 0).all():
            yield ending_pairs(self.mdp, tied_N)
        yield self.ending_S

    def _steps(self, pair_S: Ints) -> Floats:
        name = pair_S.tobytes()
        if self._known is None or self._known[0] != name:
            self._known = name, expected_steps(self.mdp, pair_S)
        return self._known[1]


def bounds(mdp: FiniteMDP, v_S: Floats) -> Bounds:
    """Bounds on v* from any v that is 0 in terminal states."""
    return Certifier(mdp)(v_S, *backup(mdp, v_S))[0]


def contracts(mdp: FiniteMDP) -> bool:
    """Is gamma times the weight of every row below 1?"""
    return modulus(mdp) < 1 - NEAR_ONE


def rounding(mdp: FiniteMDP, *values: Floats) -> float:
    """What fp64 may round off the backup of these values: half a unit of the last place for each of its operations."""
    largest = max(1.0, mdp.largest_reward, *(float(abs(v).max(initial=0.0)) for v in values))
    return (2 + mdp.longest_row) * 2.3e-16 * largest


def discounted(mdp: FiniteMDP, v_S: Floats, next_S: Floats) -> Bounds:
    """From v and T v, where every row's weight times gamma is below 1; v is 0 in terminal states."""
    if not mdp.num_pairs:
        return Bounds(next_S, next_S)
    change_S, slack = next_S - v_S, rounding(mdp, v_S, next_S)
    small, large = (mdp.gamma * w / (1 - mdp.gamma * w) for w in mdp.lightest_and_heaviest)
    least, most = float(change_S.min()) - slack, float(change_S.max()) + slack
    lower = least * (large if least < 0 else small) - slack
    upper = most * (large if most > 0 else small) + slack
    acting = ~mdp.terminal_S
    return Bounds(next_S + acting * lower, next_S + acting * upper)


def undiscounted(mdp: FiniteMDP, v_S: Floats, pair_S: Ints, steps_S: Floats | None = None) -> Bounds:
    """From v and a policy that ends from every state; infinite where v is not yet good enough to prove anything.

    steps_S: the policy's `expected_steps`, where they are known already."""
    steps_S = expected_steps(mdp, pair_S) if steps_S is None else steps_S
    acting = ~mdp.terminal_S
    flow_N = sums(mdp.weight_M * steps_S[mdp.next_M], mdp.row_N1)
    progress_N = steps_S[mdp.state_N] - mdp.gamma * flow_N  # 1 for the policy's own pairs
    gain_N = q_values(mdp, v_S) - v_S[mdp.state_N]
    lost, blur = rounding(mdp, v_S), BLUR * max(1.0, float(abs(v_S).max()))
    forward_N = progress_N > 1e-14 * np.maximum(1.0, steps_S[mdp.state_N])
    flat_N = forward_N & (progress_N < FLAT)
    clear_N = np.where(abs(gain_N) <= blur, 0.0, gain_N)
    least = min(0.0, float(clear_N[pair_S[acting]].min(initial=0.0)))
    lower_S = v_S + 1.001 * steps_S * (least - blur)  # `expected_steps` are right to a thousandth
    upper_S = np.where(acting, np.inf, 0.0)
    for gains_N in (np.where(flat_N, gain_N + lost, clear_N), clear_N):
        factor = float((gains_N[forward_N] / progress_N[forward_N]).max(initial=0.0))
        if (gains_N[~forward_N] <= factor * progress_N[~forward_N]).all():
            upper_S = np.where(acting, v_S + steps_S * (factor + blur), 0.0)
            break
        if clear_N.max(initial=0.0) > 0:  # else no pair gains at all: v is as good as v*, whatever loops are free
            break
    return Bounds(lower_S, upper_S)


def factor(mdp: FiniteMDP, pi_N: Floats) -> Any:
    """The sparse LU of I - gamma P_pi.

    Raises ModelError, naming a state, where gamma is 1 and the policy does not end from it."""
    from scipy.sparse import eye_array
    from scipy.sparse.linalg import splu

    if not contracts(mdp):
        _that_end(mdp, pi_N)
    try:
        return splu((eye_array(mdp.num_states) - policy_matrix(mdp, pi_N)[0]).tocsc())
    except RuntimeError as error:
        raise ModelError("the policy ends so rarely that fp64 cannot tell it from one that never does") from error


def expected_steps(mdp: FiniteMDP, pair_S: Ints) -> Floats:
    """Steps until the end under the policy pair_S, [S]; 0 in terminal states.  Raises ModelError if it never comes."""
    acting_S = (pair_S >= 0).astype(float)
    steps_S = followed(mdp, pair_S, acting_S)
    natural_I = np.arange(mdp.num_states)
    error_S = times(rows_of(mdp, pair_S, natural_I), steps_S) - acting_S
    if not (
        np.isfinite(steps_S).all() and steps_S.min() >= 0 and steps_S.max() < LONGEST and abs(error_S).max() < 1e-3
    ):
        raise ModelError("the policy's expected length is so large that fp64 loses it")
    return steps_S


def followed(mdp: FiniteMDP, pair_S: Ints, reward_S: Floats) -> Floats:
    """What following the policy pair_S collects of these rewards: by a sparse LU, or by Krylov where S is large.

    Raises ModelError where gamma is 1 and the policy does not end."""
    pi_N = one_hot(mdp, pair_S)
    if mdp.num_states > SMALL:
        rows = rows_of(mdp, pair_S, np.argsort(-_that_end(mdp, pi_N), kind="stable"))
        x_S = krylov(rows, reward_S, np.zeros(mdp.num_states), gain=1e-12)[0]
        lost_I = times(rows, x_S[rows.order_I]) - reward_S[rows.order_I]
        if abs(lost_I).max() <= 1e-9 * max(1.0, float(abs(reward_S).max())):
            return x_S
    return factor(mdp, pi_N).solve(reward_S)


def _that_end(mdp: FiniteMDP, pi_N: Floats) -> Ints:
    """`distances` under a policy.  Raises ModelError, naming a state, where gamma is 1 and it does not end from it."""
    distance_S = distances(mdp, allowed_N=pi_N > 0)
    if not contracts(mdp) and (distance_S < 0).any():
        where = mdp.state_name(int((distance_S < 0).argmax()))
        raise ModelError(f"gamma is 1, and the policy does not end from {where}: its value is not defined")
    return distance_S


def one_hot(mdp: FiniteMDP, pair_S: Ints) -> Floats:
    """The policy that takes pair pair_S[s] in state s (-1: terminal), as probabilities [N]."""
    pi_N = np.zeros(mdp.num_pairs)
    pi_N[pair_S[pair_S >= 0]] = 1.0
    return pi_N


def ending_pairs(mdp: FiniteMDP, allowed_N: np.ndarray | None = None, *, distance_S: Ints | None = None) -> Ints:
    """A policy that ends from every state: of the allowed pairs the likeliest to lead nearer to an end.

    [S], -1 where terminal.  distance_S: `distances` of the allowed pairs, where they are known already.
    Raises ModelError, naming a state, where no end can be reached from it."""
    distance_S = distances(mdp, allowed_N=allowed_N) if distance_S is None else distance_S
    stuck = distance_S < 0
    if stuck.any():
        state = int(stuck.argmax())
        raise ModelError(
            f"gamma is 1, and from {mdp.state_name(state)} no end can be reached ({int(stuck.sum())} such states): "
            "values would be infinite or undefined. Use gamma < 1, average_reward, or end the episode somewhere "
            '(a grid ends at its target with target="end", rung solve --model.target end)'
        )
    own_M = np.repeat(distance_S[mdp.state_N], mdp.counts_N)
    nearer_M = np.where(distance_S[mdp.next_M] < own_M, mdp.weight_M, 0.0)
    chance_N = 1 - mdp.weight_N + sums(nearer_M, mdp.row_N1)
    return greedy(mdp, chance_N if allowed_N is None else np.where(allowed_N, chance_N, -np.inf))[1]


def distances(mdp: FiniteMDP, *, allowed_N: np.ndarray | None = None, twin: bool = False) -> Ints:
    """Fewest transitions of allowed pairs from each state to an end; 0: terminal, -1: none can be reached."""
    prob_M = mdp.prob_M if allowed_N is None else mdp.prob_M * np.repeat(allowed_N, mdp.counts_N)
    distance_S = np.where(mdp.terminal_S, 0, -1)
    ends_N = mdp.chance_N < 1 - NEAR_ONE
    if mdp.keep_M is not None:
        ends_N |= sums(((prob_M > 0) & (mdp.keep_M < 1)).astype(float), mdp.row_N1) > 0
    if allowed_N is not None:
        ends_N &= allowed_N
    if not (ends_N.any() or mdp.terminal_S.any()):
        return distance_S
    if not twin:
        from rung.mdp.kernels import distances_

        into_S1, into_M = np.zeros(mdp.num_states + 1, np.int64), np.empty(len(mdp.next_M), np.int64)
        queue_S = np.empty(mdp.num_states, np.int64)
        distances_(mdp.state_N, mdp.row_N1, mdp.next_M, prob_M, ends_N, into_S1, into_M, queue_S, distance_S)
        return distance_S
    reached, steps = distance_S == 0, 0
    while steps == 0 or reached.any():
        steps += 1
        leading_N = sums(((prob_M > 0) & reached[mdp.next_M]).astype(float), mdp.row_N1) > 0
        leading_N |= ends_N & (steps == 1)
        reached = np.zeros(mdp.num_states, bool)
        reached[mdp.state_N[leading_N]] = True
        reached &= distance_S < 0
        distance_S[reached] = steps
    return distance_S
