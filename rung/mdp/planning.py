"""Exact planning: every method is a generator of iterates, and `solve` runs one until its bounds are as close as asked.

    value iteration        v <- T v                                                            [Bellman 1957]
    policy iteration       v <- v_pi of the greedy policy, by a direct or a Krylov solve       [Howard 1960]
    truncated              v <- T_pi^m v of the greedy policy ("modified policy iteration")    [Puterman & Shin 1978]
    Gauss-Seidel           v <- T v in place, nearest to an end first, loops summed up         [Bertsekas 2012, 2.2]
    prioritized            the state whose value would change most, first                      [Moore & Atkeson 1993]

At gamma = 1 "the best" is the best of the policies that end, and values rise towards it from those of one that does.
A product is one pass over the rows of all pairs, or of one policy where it says so.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from rung.core.errors import ConfigError, ModelError, nearest
from rung.mdp.certificates import Bounds, Certifier, distances, ending_pairs, factor, one_hot, rounding
from rung.mdp.finite import FiniteMDP, Floats, Ints, sums
from rung.mdp.linear import LONG_ROWS, SMALL, krylov, richardson, rows_of
from rung.mdp.operators import backup, follow, leading, q_values, renew_, sweep_, ties

LARGEST_TRUNCATION = 400  # sweeps
SPREAD = 1e-3  # of the changes of a backup: where sweeps of its policy end
ENDING = ("policy", "krylov", "gmres")


@dataclass(frozen=True, eq=False, kw_only=True)
class Iterate:
    """Where a method stands: values, the pairs that its policy takes (-1: terminal), bounds on v*, and the work so far.

    products: passes over all pairs' rows;  policy_products: passes over one policy's rows"""

    v_S: Floats
    pair_S: Ints
    bounds: Bounds
    residual: float  # largest |T v - v|
    products: int
    policy_products: int


Method = Callable[[FiniteMDP], Iterator[Iterate]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Solution:
    """What `solve` returns; |v_S - v*| <= error everywhere.

    pair_S:     an optimal policy as pairs;  action_S: as actions (-1: terminal)
    optimal_N:  which pairs are optimal, ties within what the bounds can tell
    """

    v_S: Floats
    pair_S: Ints
    action_S: Ints
    optimal_N: np.ndarray
    lower_S: Floats
    upper_S: Floats
    error: float
    residual: float
    method: str
    iterations: int
    products: int
    policy_products: int
    seconds: float


def solve(
    mdp: FiniteMDP,
    method: str | Method = "auto",
    *,
    epsilon: float | None = 1e-6,
    max_iterations: int = 1_000_000,
    listener: Callable[[Iterate], None] | None = None,
) -> Solution:
    """v* to within epsilon, proved by bounds; with an optimal policy.

    method: a name of METHODS, or a generator of iterates such as partial(truncated_policy_iteration, sweeps=5)
    epsilon: None: as close as a method comes that ends by itself ("policy", "krylov", "gmres")

    Raises ConfigError for an unknown method, ModelError where gamma is 1 and no end can be reached, or where the bounds
    are not close enough after `max_iterations`, or when all that is left is rounding."""
    name, iterates = _method(choose(mdp) if method == "auto" else method)
    if epsilon is not None and not epsilon > 0:
        raise ConfigError(f"epsilon is a positive number; got {epsilon}")
    if epsilon is None and isinstance(method, str) and name not in ENDING:
        raise ConfigError(f"{name} goes on without end: give epsilon, or one of {', '.join(ENDING)}")
    wanted = 0.0 if epsilon is None else 2 * epsilon
    began, last, count, gap = time.perf_counter(), None, 0, np.inf
    for count, last in enumerate(iterates(mdp), start=1):
        if listener is not None:
            listener(last)
        stuck = last.bounds.gap >= gap and last.residual <= rounding(mdp, last.v_S)
        gap = last.bounds.gap
        if gap <= wanted or count >= max_iterations or (stuck and epsilon is not None):
            break
    assert last is not None
    if epsilon is not None and last.bounds.gap > wanted:
        raise ModelError(
            f"{name} has bounds {last.bounds.gap:.3g} apart after {count} iterations; asked for {wanted:.3g}. More "
            "iterations or another method may do; fp64 itself cannot tell values closer than its rounding times the "
            "expected length"
        )
    v_S = last.bounds.middle_S
    q_N = q_values(mdp, v_S)
    optimal_N = ties(mdp, q_N, tolerance=max(2 * last.bounds.gap, 1e-9 * max(1.0, float(abs(v_S).max()))))
    return Solution(
        v_S=v_S,
        pair_S=last.pair_S,
        action_S=_actions(mdp, last.pair_S),
        optimal_N=optimal_N,
        lower_S=last.bounds.lower_S,
        upper_S=last.bounds.upper_S,
        error=last.bounds.gap / 2,
        residual=last.residual,
        method=name,
        iterations=count,
        products=last.products,
        policy_products=last.policy_products,
        seconds=time.perf_counter() - began,
    )


def _method(method: str | Method) -> tuple[str, Method]:
    if not isinstance(method, str):
        return getattr(getattr(method, "func", method), "__name__", "your method"), method
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}. {nearest(method, METHODS)}")
    return method, METHODS[method]


def _actions(mdp: FiniteMDP, pair_S: Ints) -> Ints:
    action_S = np.full(mdp.num_states, -1)
    action_S[pair_S >= 0] = mdp.action_N[pair_S[pair_S >= 0]]
    return action_S


def value_iteration(mdp: FiniteMDP, v_S: Floats | None = None) -> Iterator[Iterate]:
    """v <- T v; from `v_S` if given."""
    work = _Work(mdp)
    v_S = work.certify.start() if v_S is None else v_S
    while True:
        next_S, pair_S = work.backup(v_S)
        yield work.iterate(v_S, next_S, pair_S)
        v_S = next_S


def policy_iteration(
    mdp: FiniteMDP, pair_S: Ints | None = None, *, v_S: Floats | None = None, krylov: str | None = None
) -> Iterator[Iterate]:
    """v <- v_pi of the greedy policy, which stays as it is where it is tied; v_S: where the first Krylov solve begins.

    krylov: "bicgstab" or "gmres", each solve a thousand times closer than the last; "": sparse LU; by default as the
    model is large or small.  Ends when the policy stays, and a Krylov solve gains no more.  Raises ModelError where
    gamma is 1 and a loop pays for ever."""
    work = _Work(mdp)
    pair_S = work.first_policy() if pair_S is None else pair_S
    krylov = ("bicgstab" if mdp.num_states > SMALL else "") if krylov is None else krylov
    v_S, before = work.certify.start() if v_S is None else v_S, np.inf
    while True:
        v_S = work.krylov(pair_S, v_S, krylov) if krylov else work.evaluate(pair_S)
        next_S, greedy_S = work.backup(v_S)
        own_S = follow(mdp, pair_S, v_S)
        better_S = next_S > own_S + 1e-12 * np.maximum(1.0, abs(next_S))
        clear = not krylov and float((next_S - own_S).max()) > 1e-9 * max(1.0, float(abs(v_S).max()))
        better_S &= work.ends(np.where(better_S, greedy_S, pair_S), certain=clear)
        last = work.iterate(v_S, next_S, np.where(better_S, greedy_S, pair_S))
        yield last
        if not better_S.any() and (not krylov or last.residual >= before / 2):
            return
        before = last.residual
        pair_S = np.where(better_S, greedy_S, pair_S)


def truncated_policy_iteration(
    mdp: FiniteMDP, sweeps: int | None = None, v_S: Floats | None = None
) -> Iterator[Iterate]:
    """v <- T_pi^sweeps v of the greedy policy, from `v_S` if given; by default until the sweeps change values little.

    That is until their changes spread SPREAD times as wide as those of the backup before."""
    work = _Work(mdp)
    natural_I, followed_S = np.arange(mdp.num_states), None
    v_S = work.certify.start() if v_S is None else v_S
    while True:
        next_S, pair_S = work.backup(v_S)
        yield work.iterate(v_S, next_S, pair_S)
        wanted, v_S = SPREAD * float(np.ptp(next_S - v_S)), next_S
        if followed_S is None or not np.array_equal(pair_S, followed_S):
            rows, reward_S, followed_S = rows_of(mdp, pair_S, natural_I), work.rewards(pair_S), pair_S
        for _ in range(LARGEST_TRUNCATION if sweeps is None else sweeps):
            v_S, spread = richardson(rows, reward_S, v_S)
            work.policy_products += 1
            if sweeps is None and spread <= wanted:
                break


def gauss_seidel(mdp: FiniteMDP) -> Iterator[Iterate]:
    """In place, states nearest to an end first (their distance counted in transitions), loops to itself summed up."""
    work, scratch_S = _Work(mdp), np.full(mdp.num_states, -1)
    v_S = work.certify.start()
    distance_S = distances(mdp)
    order_S = np.argsort(np.where(distance_S < 0, mdp.num_states, distance_S), kind="stable")
    while True:
        for _ in range(8):
            sweep_(mdp, order_S, v_S, scratch_S)
        work.products += 8
        next_S, pair_S = work.backup(v_S)
        yield work.iterate(v_S, next_S, pair_S)
        v_S = next_S


def choose(mdp: FiniteMDP) -> str:
    """The method that "auto" stands for: policy iteration where an end can be reached from everywhere, from a policy
    that goes there, by Krylov if the model is large; else truncated, which lives off how fast states mix.

    "policy" too for a small model with gamma = 1: it alone notices a loop that pays for ever."""
    small, short = mdp.num_states <= SMALL, len(mdp.next_M) <= LONG_ROWS * mdp.num_pairs
    if (mdp.gamma == 1 and small) or (short and (distances(mdp) >= 0).all()):
        return "policy" if small else "krylov"
    return "truncated"


def automatic(mdp: FiniteMDP) -> Iterator[Iterate]:
    """Whatever `choose` says."""
    return METHODS[choose(mdp)](mdp)


def prioritized_sweeping(mdp: FiniteMDP) -> Iterator[Iterate]:
    """The state whose value would change most is renewed first; then those that lead to it are looked at again."""
    work, into_S1, into_M = _Work(mdp), *leading(mdp)
    v_S = work.certify.start()
    next_S, pair_S = work.backup(v_S)
    while True:
        yield work.iterate(v_S, next_S, pair_S)
        v_S = v_S.copy()
        renew_(mdp, into_S1, into_M, abs(next_S - v_S), v_S, mdp.num_states)
        next_S, pair_S = work.backup(v_S)


def evaluate(mdp: FiniteMDP, pi_N: Floats) -> Floats:
    """v_pi by a sparse direct solve of (I - gamma P_pi) v = r_pi.  Raises ModelError if gamma is 1 and it never ends.

    `solve(operators.under(mdp, policy), method)` does it by every other method, with bounds."""
    return factor(mdp, pi_N).solve(sums(pi_N * mdp.reward_N, mdp.first_S1))


class _Work:
    """Counts products, and makes iterates."""

    def __init__(self, mdp: FiniteMDP) -> None:
        self.mdp, self.products, self.policy_products = mdp, 0, 0
        self.certify = Certifier(mdp)

    def backup(self, v_S: Floats) -> tuple[Floats, Ints]:
        self.products += 1
        return backup(self.mdp, v_S)

    @cached_property
    def distance_S(self) -> Ints:
        return distances(self.mdp)

    @cached_property
    def order_I(self) -> Ints:
        """Farthest from an end first: how `linear` likes its rows."""
        return np.argsort(-self.distance_S, kind="stable")

    def rewards(self, pair_S: Ints) -> Floats:
        return np.where(pair_S >= 0, self.mdp.reward_N[pair_S], 0.0)

    def first_policy(self) -> Ints:
        if (self.distance_S >= 0).all():
            return ending_pairs(self.mdp, distance_S=self.distance_S)
        return np.where(self.mdp.terminal_S, -1, self.mdp.first_S1[:-1])

    def ends(self, pair_S: Ints, *, certain: bool) -> bool:
        """Does this policy end?  If it does not and its gain is certain, a loop pays, which is an error."""
        if self.certify.contracts:
            return True
        endless_S = distances(self.mdp, allowed_N=one_hot(self.mdp, pair_S) > 0) < 0
        if endless_S.any() and certain:
            where = self.mdp.state_name(int(endless_S.argmax()))
            raise ModelError(f"gamma is 1, and a loop through {where} pays for ever: values are infinite")
        return not endless_S.any()

    def evaluate(self, pair_S: Ints) -> Floats:
        return evaluate(self.mdp, one_hot(self.mdp, pair_S))

    def krylov(self, pair_S: Ints, v_S: Floats, method: str) -> Floats:
        v_S, products = krylov(rows_of(self.mdp, pair_S, self.order_I), self.rewards(pair_S), v_S, method)
        self.policy_products += products
        return v_S

    def iterate(self, v_S: Floats, next_S: Floats, pair_S: Ints) -> Iterate:
        found, pair_S = self.certify(v_S, next_S, pair_S)
        residual = float(np.abs(next_S - v_S).max())
        return Iterate(
            v_S=v_S,
            pair_S=pair_S,
            bounds=found,
            residual=residual,
            products=self.products,
            policy_products=self.policy_products,
        )


METHODS: dict[str, Method] = {
    "auto": automatic,
    "value": value_iteration,
    "policy": policy_iteration,
    "krylov": partial(policy_iteration, krylov="bicgstab"),
    "gmres": partial(policy_iteration, krylov="gmres"),
    "truncated": truncated_policy_iteration,
    "gauss-seidel": gauss_seidel,
    "prioritized": prioritized_sweeping,
}
