"""Policy iteration over PETSc: the rows of a model that no machine holds alone, spread over MPI ranks.

    mpiexec -n 2 python mine.py      # where mine.py calls solve(rows, gamma, num_states=...)

Every rank holds a stretch of states with their pairs; a product sends the values that its rows ask for.  Policies are
evaluated by BiCGSTAB from the last values, with incomplete factors of each rank's own block; PETSc's own options
(`-ksp_type gmres`, `-log_view`) work.  gamma times the weight of every row must be below 1.

Needs petsc4py (pip install petsc petsc4py, which compiles for long; Debian: python3-petsc4py), NumPy, SciPy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rung.core.errors import ConfigError, ModelError
from rung.mdp.checks import ROUNDING
from rung.mdp.finite import FiniteMDP, Floats, Ints, Rows, sums

GAIN = 1e-3  # how much closer than the last values each evaluation comes


@dataclass(frozen=True, eq=False, kw_only=True)
class Share:
    """What a rank knows in the end, about its states first .. first + len(v_S) - 1; |v_S - v*| <= error.

    products: with the matrix of a policy;  action_S: -1 where terminal"""

    first: int
    v_S: Floats
    lower_S: Floats
    upper_S: Floats
    action_S: Ints
    error: float
    iterations: int
    products: int


def solve(
    rows: Callable[[int, int], Rows],
    gamma: float,
    *,
    num_states: int,
    epsilon: float = 1e-6,
    max_iterations: int = 1000,
) -> Share:
    """v* to within epsilon, proved by bounds.  `rows(first, last)` makes the rows of states first .. last - 1.

    Every rank calls it, and gets its own share.  Raises ConfigError without petsc4py, ModelError for rows that are no
    probabilities, where gamma times a weight is not below 1, or where the bounds are not close in time."""
    problem = _Problem(rows, gamma, num_states)
    products = 0
    for count in range(1, max_iterations + 1):
        products += problem.evaluate()
        lower_S, upper_S, gap = problem.improve()
        if gap <= 2 * epsilon:
            return Share(
                first=problem.first,
                v_S=(lower_S + upper_S) / 2,
                lower_S=lower_S,
                upper_S=upper_S,
                action_S=problem.actions(),
                error=gap / 2,
                iterations=count,
                products=products,
            )
    raise ModelError(f"bounds are {gap:.3g} apart after {max_iterations} improvements; asked for {2 * epsilon:.3g}")


def rows_of(mdp: FiniteMDP) -> Callable[[int, int], Rows]:
    """The rows of a model that is here, as `solve` and `from_batches` ask for them."""

    def rows(first: int, last: int) -> Rows:
        pairs = slice(mdp.first_S1[first], mdp.first_S1[last])
        moves = slice(mdp.row_N1[pairs.start], mdp.row_N1[pairs.stop])
        return Rows(
            pairs_S=np.diff(mdp.first_S1[first : last + 1]),
            action_N=mdp.action_N[pairs],
            counts_N=np.diff(mdp.row_N1[pairs.start : pairs.stop + 1]),
            next_M=mdp.next_M[moves],
            prob_M=mdp.weight_M[moves],
            reward_N=mdp.reward_N[pairs],
        )

    return rows


class _Problem:
    """A rank's rows, its policy, and the distributed values."""

    def __init__(self, rows: Callable[[int, int], Rows], gamma: float, num_states: int) -> None:
        try:
            from petsc4py import PETSc
        except ModuleNotFoundError as error:
            raise ConfigError("petsc4py is not installed: pip install petsc petsc4py, or python3-petsc4py") from error
        self.petsc, self.gamma, self.num_states = PETSc, gamma, num_states
        rank, ranks = PETSc.COMM_WORLD.rank, PETSc.COMM_WORLD.size
        self.first, last = num_states * rank // ranks, num_states * (rank + 1) // ranks
        self.own = rows(self.first, last)
        if len(self.own.pairs_S) != last - self.first:
            raise ModelError(f"rows({self.first}, {last}) returned {len(self.own.pairs_S)} states")
        self.first_S1 = np.concatenate(([0], np.cumsum(self.own.pairs_S)))
        self.acting = self.own.pairs_S > 0
        self.pair_s = self.first_S1[:-1][self.acting]  # the policy: a pair for each acting state
        self.row_N1 = np.concatenate(([0], np.cumsum(self.own.counts_N)))
        self.matrix = self._local(self.own.prob_M, self.own.next_M, self.row_N1)
        self.all_pairs = self._spread(self.matrix)
        self.values, self.flow = self.all_pairs.createVecs()
        self.small, self.large = self._weights()
        self.unit = (
            2 + self._extremes(self.own.counts_N.astype(float))[1]
        ) * 2.3e-16  # fp64's part in a backup: see `certificates`
        self.largest_reward = max(1.0, *map(abs, self._extremes(self.own.reward_N)))

    def evaluate(self) -> int:
        """values <- about v_pi; returns products."""
        from scipy import sparse

        chosen = self.matrix[self.pair_s]
        counts = np.zeros(len(self.acting), np.int64)
        counts[self.acting] = np.diff(chosen.indptr)
        flow = self._local(chosen.data, chosen.indices, np.concatenate(([0], np.cumsum(counts))))
        system = self._spread(sparse.eye(*flow.shape, k=self.first, format="csr") - self.gamma * flow)
        right, gap = self.values.duplicate(), self.values.duplicate()
        right.array[self.acting] = self.own.reward_N[self.pair_s]
        system.mult(self.values, gap)
        gap.aypx(-1.0, right)  # right - system values
        solver = self.petsc.KSP().create()
        solver.setOperators(system)
        solver.setType("bcgs")
        solver.setPCSide(self.petsc.PC.Side.RIGHT)  # so that it stops by the residual itself
        solver.getPC().setType("bjacobi")
        solver.setInitialGuessNonzero(True)
        solver.setTolerances(rtol=1e-30, atol=max(GAIN * gap.norm(), 1e-13), max_it=10_000)
        solver.setFromOptions()
        solver.solve(right, self.values)
        done = int(solver.getIterationNumber())
        for used in (solver, system, right, gap):
            used.destroy()
        return 2 * done + 1

    def improve(self) -> tuple[Floats, Floats, float]:
        """The greedy policy, kept where it is tied, and bounds on v* (those of `certificates.discounted`)."""
        self.all_pairs.mult(self.values, self.flow)
        q_N = self.own.reward_N + self.gamma * self.flow.array
        next_S = np.zeros(len(self.acting))
        if len(self.pair_s):
            next_S[self.acting] = np.maximum.reduceat(q_N, self.first_S1[:-1][self.acting])
        own_s, best_s = q_N[self.pair_s], next_S[self.acting]
        greedy_n = np.flatnonzero(q_N == np.repeat(next_S, self.own.pairs_S))
        owner_n = np.repeat(np.arange(len(self.acting)), self.own.pairs_S)[greedy_n]
        first_s = greedy_n[np.unique(owner_n, return_index=True)[1]]
        better_s = best_s > own_s + 1e-12 * np.maximum(1.0, abs(best_s))
        self.pair_s = np.where(better_s, first_s, self.pair_s)
        slack = self.unit * max(self.largest_reward, *map(abs, self._extremes(next_S)))
        least, most = self._extremes(next_S - self.values.array)
        least, most = least - slack, most + slack
        lower = least * (self.large if least < 0 else self.small) - slack
        upper = most * (self.large if most > 0 else self.small) + slack
        return next_S + self.acting * lower, next_S + self.acting * upper, upper - lower

    def actions(self) -> Ints:
        action_S = np.full(len(self.acting), -1)
        action_S[self.acting] = self.own.action_N[self.pair_s]
        return action_S

    def _weights(self) -> tuple[float, float]:
        """b / (1 - b) of the smallest and the largest row."""
        weight_N = sums(self.own.prob_M, self.row_N1)
        (lightest, heaviest), (smallest, _) = self._extremes(weight_N), self._extremes(self.own.prob_M)
        if not (smallest >= 0 and heaviest <= 1 + ROUNDING):
            raise ModelError(
                f"a row's probabilities sum to {heaviest:.12g}, the smallest is {smallest:g}; at most 1, none below 0"
            )
        least, most = self.gamma * lightest, self.gamma * heaviest
        if not 0 <= most < 1:
            raise ModelError(f"gamma times the weight of a row is {most:g}; below 1 is needed over PETSc")
        return least / (1 - least), most / (1 - most)

    def _extremes(self, numbers: Floats) -> tuple[float, float]:
        """Smallest and largest over all ranks."""
        spread = self.petsc.Vec().createWithArray(np.ascontiguousarray(numbers, dtype=float))
        least, most = spread.min()[1], spread.max()[1]
        spread.destroy()
        return float(least), float(most)

    def _local(self, numbers: Floats, columns: Ints, starts: Ints) -> Any:
        """Rows of this rank over all states; entries that name a state twice are added up."""
        from scipy import sparse

        found = sparse.csr_matrix((numbers, columns, starts), shape=(len(starts) - 1, self.num_states), copy=True)
        found.sum_duplicates()
        return found

    def _spread(self, local: Any) -> Any:
        """A PETSc matrix with these rows here."""
        kind = self.petsc.IntType
        arrays = (local.indptr.astype(kind), local.indices.astype(kind), local.data)
        size = ((local.shape[0], None), (len(self.acting), self.num_states))
        return self.petsc.Mat().createAIJ(size=size, csr=arrays)
