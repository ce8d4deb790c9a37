"""(I - gamma P_pi) x = b for one policy of a large model: Krylov methods behind an incomplete LU.

States are eliminated farthest from an end first.  Values flow from the ends outwards, so most of a row lies in U, and
on a tree, such as a perfect maze, the incomplete factors are the whole ones.  What would fill an empty place is left
out, and most of it taken off the diagonal instead, which keeps the factors right for values that hardly change from
state to state.                     [Meijerink & van der Vorst 1977; Gustafsson 1978; Axelsson & Lindskog 1986: relaxed]

I: places in the order of elimination;  K: entries of the matrix off its diagonal.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rung.mdp.finite import FiniteMDP, Floats, Ints

RELAXED = 0.8  # of what is dropped goes to the diagonal; below 1 the factors of a policy that ends stay regular
SMALL = 3_000  # states up to which a sparse LU is faster than anything iterative
LONG_ROWS = 32  # mean entries of a row beyond which even an incomplete factorisation costs more than it saves


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """The rows of a matrix, one a state, in an order of elimination.

    order_I: the state at each place;  first_I1: where the entries of a row begin, [S + 1];  diagonal_I: the diagonal
    place_K, value_K: column and value of the entries off the diagonal; those of one place add up
    """

    order_I: Ints
    first_I1: Ints
    place_K: Ints
    value_K: Floats
    diagonal_I: Floats


def rows_of(mdp: FiniteMDP, pair_S: Ints, order_I: Ints, *, twin: bool = False) -> Rows:
    """I - gamma P of the policy that takes pair pair_S[s] in state s (-1: terminal), gathered in this order."""
    states, place_S = mdp.num_states, np.empty(mdp.num_states, np.int64)
    place_S[order_I] = np.arange(states)
    if twin:
        matrix = np.eye(states)
        for s in np.flatnonzero(pair_S >= 0):
            row = slice(mdp.row_N1[pair_S[s]], mdp.row_N1[pair_S[s] + 1])
            np.subtract.at(matrix[place_S[s]], place_S[mdp.next_M[row]], mdp.gamma * mdp.weight_M[row])
        return _rows(order_I, matrix)
    taken_I = pair_S[order_I]
    first_I1, diagonal_I = np.zeros(states + 1, np.int64), np.empty(states)
    np.cumsum(np.where(taken_I >= 0, mdp.counts_N[taken_I], 0), out=first_I1[1:])
    place_K, value_K = np.empty(first_I1[-1], np.int32), np.empty(first_I1[-1])
    arrays = (mdp.row_N1, mdp.next_M, mdp.weight_M, float(mdp.gamma))
    _kernels().gather_(taken_I, place_S, *arrays, first_I1, place_K, value_K, diagonal_I)
    return Rows(order_I=order_I, first_I1=first_I1, place_K=place_K, value_K=value_K, diagonal_I=diagonal_I)


def times(rows: Rows, x_I: Floats, *, twin: bool = False) -> Floats:
    """The matrix times a vector; both are in the order of elimination."""
    if twin:
        return _matrix(rows) @ x_I
    out_I = np.empty_like(x_I)
    _kernels().times(rows.first_I1, rows.place_K, rows.value_K, rows.diagonal_I, x_I, out_I)
    return out_I


def richardson(rows: Rows, right_I: Floats, x_I: Floats, *, twin: bool = False) -> tuple[Floats, float]:
    """One sweep, x + right - matrix x; and by how much its largest change exceeds the smallest."""
    if twin:
        change_I = right_I - times(rows, x_I, twin=True)
        return x_I + change_I, float(np.ptp(change_I))
    out_I = np.empty_like(x_I)
    arrays = (rows.first_I1, rows.place_K, rows.value_K, rows.diagonal_I)
    return out_I, _kernels().richardson(*arrays, right_I, x_I, out_I)


def incomplete_lu(rows: Rows, relaxed: float = RELAXED, *, twin: bool = False) -> Rows:
    """L - I and U in one: entries before their own place are L's, the others and the diagonal U's.

    No entry that the matrix lacks; of what would fill one, `relaxed` goes to the diagonal."""
    if twin:
        matrix = _matrix(rows).toarray()
        kept = matrix != 0
        for i in range(len(matrix)):
            for k in np.flatnonzero(kept[i, :i]):
                matrix[i, k] /= matrix[k, k]
                change_I = matrix[i, k] * np.where(np.arange(len(matrix)) > k, matrix[k], 0.0)
                matrix[i] -= np.where(kept[i], change_I, 0.0)
                matrix[i, i] -= relaxed * change_I[~kept[i]].sum()
        return _rows(rows.order_I, matrix)
    beside = _beside(rows)
    beside.sum_duplicates()  # and ascending in each row
    beside.eliminate_zeros()
    factors = Rows(
        order_I=rows.order_I,
        first_I1=beside.indptr,
        place_K=beside.indices,
        value_K=beside.data,
        diagonal_I=rows.diagonal_I.copy(),
    )
    at_I = np.full(len(rows.order_I), -1, np.int64)
    arrays = (factors.first_I1, factors.place_K, factors.value_K, factors.diagonal_I)
    _kernels().incomplete_lu_(*arrays, at_I, relaxed)
    return factors


def solve_lu(factors: Rows, right_I: Floats, *, twin: bool = False) -> Floats:
    """x with L U x = right, for the factors of `incomplete_lu`."""
    if twin:
        matrix = _matrix(factors).toarray()
        lower = np.tril(matrix, -1) + np.eye(len(matrix))
        return np.linalg.solve(np.triu(matrix), np.linalg.solve(lower, right_I))
    x_I = np.empty_like(right_I)
    _kernels().solve_lu(factors.first_I1, factors.place_K, factors.value_K, factors.diagonal_I, right_I, x_I)
    return x_I


def krylov(
    rows: Rows, right_S: Floats, start_S: Floats, method: str = "bicgstab", *, gain: float = 1e-3
) -> tuple[Floats, int]:
    """x with the matrix times x near `right_S`, and the products that it took.

    method: "bicgstab" or "gmres", from start_S; gain: of the residual at the start, by which to end"""
    from scipy.sparse.linalg import LinearOperator, bicgstab, gmres

    products, size = 0, (len(right_S), len(right_S))

    def product(x_I: Floats) -> Floats:
        nonlocal products
        products += 1
        return times(rows, x_I)

    def operator(function: Callable[[Floats], Floats]) -> LinearOperator:
        return LinearOperator(size, matvec=function, dtype=float)

    right_I, start_I = right_S[rows.order_I], start_S[rows.order_I]
    residual = float(np.linalg.norm(right_I - product(start_I)))
    lost = 1e-15 * float(np.linalg.norm(right_I) + 2 * np.linalg.norm(start_I))
    precondition = None
    if len(rows.place_K) <= LONG_ROWS * len(right_S):
        factors = incomplete_lu(rows)
        precondition = operator(lambda x_I: solve_lu(factors, x_I))
    options = {"x0": start_I, "M": precondition, "rtol": 0.0, "atol": max(lost, gain * residual, 1e-300)}
    if method == "gmres":
        x_I, _ = gmres(operator(product), right_I, maxiter=200, **options)
    else:
        x_I, _ = bicgstab(operator(product), right_I, maxiter=2000, **options)
    x_S = np.empty_like(x_I)
    x_S[rows.order_I] = x_I
    return x_S, products


def _beside(rows: Rows):  # type: ignore[no-untyped-def]
    """A copy of the entries off the diagonal as a SciPy matrix."""
    from scipy.sparse import csr_array

    arrays = (rows.value_K, rows.place_K, rows.first_I1)
    return csr_array(arrays, (len(rows.order_I), len(rows.order_I)), copy=True)


def _matrix(rows: Rows):  # type: ignore[no-untyped-def]
    from scipy.sparse import diags_array

    return diags_array(rows.diagonal_I, format="csr") + _beside(rows)


def _rows(order_I: Ints, matrix: NDArray[np.float64]) -> Rows:
    """Of a dense matrix."""
    row_K, place_K = (matrix - np.diag(matrix.diagonal())).nonzero()
    return Rows(
        order_I=order_I,
        first_I1=np.searchsorted(row_K, np.arange(len(matrix) + 1)),
        place_K=place_K,
        value_K=matrix[row_K, place_K],
        diagonal_I=matrix.diagonal().copy(),
    )


def _kernels():  # type: ignore[no-untyped-def]
    from rung.mdp import kernels

    return kernels
