"""The loops of exact planning over sparse rows, compiled by Numba; each has a twin in NumPy where it is called from.

One thread computes a number, in one order: the number of threads changes no bit.  Arguments are arrays of one
FiniteMDP; nothing is checked here.  Indices are unsigned in the hot loops: a signed one is compared with 0 each time,
for Python's sake, which makes these loops up to four times slower.
"""

import heapq
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange
from numpy import uint64


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Unwrapped first: the tests' shape checks wrap every function."""
    return njit(error_model="numpy", **options)(inspect.unwrap(function))


def _kept(function: Callable[..., Any], **options: Any) -> Any:
    """The machine code stays on disk, where there is a folder for it; else every process compiles anew."""
    try:
        return _compiled(function, cache=True, **options)
    except RuntimeError:
        return _compiled(function, **options)


def _kernel(function: Callable[..., Any]) -> Any:
    return _kept(function, parallel=True)


@_compiled
def _q(n, row_N1, next_M, weight_M, reward_N, gamma, v_S):
    total = 0.0
    for m in range(uint64(row_N1[uint64(n)]), uint64(row_N1[uint64(n + 1)])):
        total += weight_M[m] * v_S[uint64(next_M[m])]
    return reward_N[uint64(n)] + gamma * total


@_kernel
def sums(numbers_M, row_N1, total_N):
    """total_N = the sum over each row."""
    for n in prange(len(total_N)):
        total = 0.0
        for m in range(uint64(row_N1[n]), uint64(row_N1[n + 1])):
            total += numbers_M[m]
        total_N[n] = total


@_kernel
def q_values(row_N1, next_M, weight_M, reward_N, gamma, v_S, q_N):
    """q_N = reward + gamma P v."""
    for n in prange(len(q_N)):
        q_N[n] = _q(n, row_N1, next_M, weight_M, reward_N, gamma, v_S)


@_kernel
def backup(first_S1, row_N1, next_M, weight_M, reward_N, gamma, v_S, new_S, best_S):
    """new_S = max of q over the pairs of each state, best_S its first pair; terminal: 0 and -1."""
    for s in prange(len(new_S)):
        highest, best = -np.inf, -1
        for n in range(first_S1[s], first_S1[s + 1]):
            q = _q(n, row_N1, next_M, weight_M, reward_N, gamma, v_S)
            if q > highest:
                highest, best = q, n
        new_S[s], best_S[s] = (highest, best) if best >= 0 else (0.0, -1)


@_kernel
def follow(pair_S, row_N1, next_M, weight_M, reward_N, gamma, v_S, new_S):
    """new_S = q of the pair pair_S[s]; 0 where that is -1."""
    for s in prange(len(new_S)):
        n = pair_S[s]
        new_S[s] = _q(n, row_N1, next_M, weight_M, reward_N, gamma, v_S) if n >= 0 else 0.0


@_kernel
def gather_(taken_I, place_S, row_N1, next_M, weight_M, gamma, first_I1, place_K, value_K, diagonal_I):
    """The rows taken_I of I - gamma P side by side; entries as the model has them, a loop as 0 and on the diagonal."""
    for i in prange(len(taken_I)):
        n, k, own = taken_I[i], uint64(first_I1[i]), 1.0
        for m in range(uint64(row_N1[n] if n >= 0 else 0), uint64(row_N1[n + 1] if n >= 0 else 0)):
            place, weight = place_S[uint64(next_M[m])], gamma * weight_M[m]
            place_K[k], value_K[k] = place, -weight
            if place == i:
                own -= weight
                value_K[k] = 0.0
            k += uint64(1)
        diagonal_I[i] = own


@_kept
def times(first_I1, place_K, value_K, diagonal_I, x_I, out_I):
    """The matrix times x."""
    for i in range(len(x_I)):
        total = diagonal_I[i] * x_I[i]
        for k in range(uint64(first_I1[i]), uint64(first_I1[i + 1])):
            total += value_K[k] * x_I[uint64(place_K[k])]
        out_I[i] = total


@_kernel
def richardson(first_I1, place_K, value_K, diagonal_I, right_I, x_I, out_I):
    """out = x + right - the matrix times x; returns the largest change less the smallest."""
    least, most = np.inf, -np.inf
    for i in prange(len(x_I)):
        change = right_I[i] - diagonal_I[i] * x_I[i]
        for k in range(uint64(first_I1[i]), uint64(first_I1[i + 1])):
            change -= value_K[k] * x_I[uint64(place_K[k])]
        out_I[i] = x_I[i] + change
        least, most = min(least, change), max(most, change)
    return most - least


@_kept
def incomplete_lu_(first_I1, place_K, value_K, diagonal_I, at_I, relaxed):
    """Gauss' elimination in place, row by row, nothing filled in; at_I comes, and is left, full of -1."""
    for i in range(len(diagonal_I)):
        first, last = first_I1[i], first_I1[i + 1]
        for k in range(first, last):
            at_I[place_K[k]] = k
        for k in range(first, last):
            above = place_K[k]
            if above > i:
                break
            value_K[k] /= diagonal_I[above]
            for beside in range(first_I1[above], first_I1[above + 1]):
                place, change = place_K[beside], value_K[k] * value_K[beside]
                if place == i:
                    diagonal_I[i] -= change
                elif place > above and at_I[place] >= 0:
                    value_K[at_I[place]] -= change
                elif place > above:
                    diagonal_I[i] -= relaxed * change
        for k in range(first, last):
            at_I[place_K[k]] = -1


@_kept
def solve_lu(first_I1, place_K, value_K, diagonal_I, right_I, x_I):
    """L forwards, then U backwards."""
    for i in range(len(x_I)):
        total = right_I[i]
        for k in range(first_I1[i], first_I1[i + 1]):
            if place_K[k] > i:
                break
            total -= value_K[k] * x_I[place_K[k]]
        x_I[i] = total
    for i in range(len(x_I) - 1, -1, -1):
        total = x_I[i]
        for k in range(first_I1[i + 1] - 1, first_I1[i] - 1, -1):
            if place_K[k] < i:
                break
            total -= value_K[k] * x_I[place_K[k]]
        x_I[i] = total / diagonal_I[i]


@_compiled
def _renewed(s, first_S1, row_N1, next_M, weight_M, reward_N, gamma, v_S):
    """max over pairs of the value that a pair gives its own state for ever: loops to itself are summed up."""
    highest, best = -np.inf, -1
    for n in range(first_S1[s], first_S1[s + 1]):
        total, stay = 0.0, 0.0
        for m in range(row_N1[n], row_N1[n + 1]):
            if next_M[m] == s:
                stay += weight_M[m]
            else:
                total += weight_M[m] * v_S[next_M[m]]
        free = 1.0 - gamma * stay
        q = (reward_N[n] + gamma * total) / free if free > 1e-12 else reward_N[n] + gamma * (total + stay * v_S[s])
        if q > highest:
            highest, best = q, n
    return (highest, best) if best >= 0 else (0.0, -1)


@_kept
def sweep_(order_S, first_S1, row_N1, next_M, weight_M, reward_N, gamma, v_S, best_S):
    """Renew v_S in place, state by state in this order; loops to itself summed up."""
    for s in order_S:
        v_S[s], best_S[s] = _renewed(s, first_S1, row_N1, next_M, weight_M, reward_N, gamma, v_S)


@_compiled
def _best(s, first_S1, row_N1, next_M, weight_M, reward_N, gamma, v_S):
    """The largest q of a state; terminal: 0."""
    highest = -np.inf
    for n in range(first_S1[s], first_S1[s + 1]):
        highest = max(highest, _q(n, row_N1, next_M, weight_M, reward_N, gamma, v_S))
    return highest if highest > -np.inf else 0.0


@_kept
def renew_(first_S1, row_N1, next_M, weight_M, reward_N, gamma, into_S1, into_K, change_S, v_S, times):
    """Prioritised sweeping; a state may stand in the queue more than once."""
    queue = [(-change_S[s], s) for s in range(len(change_S)) if change_S[s] > 0]
    heapq.heapify(queue)
    for _ in range(times):
        if not len(queue):
            break
        s = heapq.heappop(queue)[1]
        v_S[s] = _best(s, first_S1, row_N1, next_M, weight_M, reward_N, gamma, v_S)
        for k in range(into_S1[s], into_S1[s + 1]):
            other = int(into_K[k])
            change = abs(_best(other, first_S1, row_N1, next_M, weight_M, reward_N, gamma, v_S) - v_S[other])
            if change > 0:
                heapq.heappush(queue, (-change, other))


@_kept
def distances_(state_N, row_N1, next_M, prob_M, ends_N, into_S1, into_M, queue_S, distance_S):
    """Breadth first from the ends backwards; distance_S comes with 0 in terminal states and -1 elsewhere.

    into_S1, into_M, queue_S: room for the reversed transitions and for the queue."""
    for n in range(len(state_N)):
        for m in range(row_N1[n], row_N1[n + 1]):
            into_S1[next_M[m] + 1] += prob_M[m] > 0
    for s in range(len(distance_S)):
        into_S1[s + 1] += into_S1[s]
    for n in range(len(state_N)):
        for m in range(row_N1[n], row_N1[n + 1]):
            if prob_M[m] > 0:
                into_M[into_S1[next_M[m]]] = state_N[n]
                into_S1[next_M[m]] += 1  # ends where the next state's begin
    first, last = 0, 0
    for s in range(len(distance_S)):
        if distance_S[s] == 0:
            queue_S[last] = s
            last += 1
    for n in range(len(state_N)):
        if ends_N[n] and distance_S[state_N[n]] < 0:
            distance_S[state_N[n]] = 1
            queue_S[last] = state_N[n]
            last += 1
    while first < last:
        s = queue_S[first]
        first += 1
        for m in range(into_S1[s - 1] if s else 0, into_S1[s]):
            if distance_S[into_M[m]] < 0:
                distance_S[into_M[m]] = distance_S[s] + 1
                queue_S[last] = into_M[m]
                last += 1


@_kept
def carve(rows, columns, order_S4, open_S4):
    """A perfect maze: walk from cell 0 to a neighbour not yet seen, in the cell's order; back where there is none."""
    seen = np.zeros(rows * columns, np.bool_)
    path, tried = np.empty(rows * columns, np.int64), np.zeros(rows * columns, np.int8)
    path[0], depth = 0, 1
    seen[0] = True
    while depth:
        cell = path[depth - 1]
        if tried[cell] == 4:
            depth -= 1
            continue
        side = order_S4[cell, tried[cell]]
        tried[cell] += 1
        row, column = cell // columns, cell % columns
        row, column = row + (side == 2) - (side == 0), column + (side == 1) - (side == 3)
        there = row * columns + column
        if 0 <= row < rows and 0 <= column < columns and not seen[there]:
            seen[there] = True
            open_S4[cell, side] = open_S4[there, (side + 2) % 4] = True
            path[depth] = there
            depth += 1


@_compiled
def _choose(q_A, pair_A, epsilon, coin, place):
    """`walk.epsilon_greedy` of one state."""
    highest, tied, legal = -np.inf, 0, 0
    for a in range(len(q_A)):
        if pair_A[a] >= 0:
            legal += 1
            if q_A[a] > highest:
                highest, tied = q_A[a], 0
            tied += q_A[a] == highest
    wanted = int(place * (legal if coin < epsilon else tied))
    for a in range(len(q_A)):
        if pair_A[a] >= 0 and (coin < epsilon or q_A[a] == highest):
            if wanted == 0:
                return a
            wanted -= 1
    return -1


@_kept
def q_learn_(
    pair_SA, below_PB, next_PB, reward_PB, discount_PB, ends_PB, below_S,
    noise_TW, s, age, steps, max_steps, size, epsilon, q_SA,
):  # fmt: skip
    """Q-learning along one walk, a row of noise for each step, until noise or steps end; s = -1: begin with the first.

    Returns state, age of its episode, and steps taken.  max_steps 0: episodes are not cut."""
    taken = 0
    for t in range(len(noise_TW)):
        word_W = noise_TW[t]
        if s < 0:
            s = np.searchsorted(below_S, word_W[1], side="right")
            continue
        if taken == steps:
            break
        a = _choose(q_SA[s], pair_SA[s], epsilon, word_W[2], word_W[3])
        n, b = pair_SA[s, a], 0
        while word_W[0] >= below_PB[n, b]:
            b += 1
        there, best = next_PB[n, b], -np.inf
        for other in range(q_SA.shape[1]):
            if pair_SA[there, other] >= 0 and q_SA[there, other] > best:
                best = q_SA[there, other]
        target = reward_PB[n, b] + discount_PB[n, b] * (best if best > -np.inf else 0.0)
        q_SA[s, a] += size * (target - q_SA[s, a])
        age, taken = age + 1, taken + 1
        if ends_PB[n, b] or age == max_steps:
            s, age = np.searchsorted(below_S, word_W[1], side="right"), 0
        else:
            s = there
    return s, age, taken
