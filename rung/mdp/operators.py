"""The Bellman operators of a finite MDP.

    expectation   (T_pi v)(s) = sum over a of pi(a|s) q(s, a),   q = reward + gamma P v
    optimality    (T v)(s)    = max over a of q(s, a)

Both are monotone, and contract by gamma times the largest weight of a row.  [Puterman 1994, 6.2]

Numba's loops (`kernels.py`) do the work; with `twin=True` the same numbers come from NumPy and SciPy.
"""

import heapq
from dataclasses import replace

import numpy as np

from rung.core.errors import ModelError
from rung.mdp.finite import FiniteMDP, Floats, Ints, Numbers, sums

TIE = 1e-9  # q values of one state that differ by less, relative to the largest value, are equal


def q_values(mdp: FiniteMDP, v_S: Floats, *, twin: bool = False) -> Floats:
    """q of every pair, [N]."""
    if twin:
        return mdp.reward_N + mdp.gamma * sums(mdp.weight_M * v_S[mdp.next_M], mdp.row_N1)
    q_N = np.empty(mdp.num_pairs)
    _kernels().q_values(*_rows(mdp), mdp.reward_N, float(mdp.gamma), v_S, q_N)
    return q_N


def backup(mdp: FiniteMDP, v_S: Floats, *, twin: bool = False) -> tuple[Floats, Ints]:
    """T v, and the first pair of each state that reaches it (-1: terminal)."""
    if twin:
        return greedy(mdp, q_values(mdp, v_S, twin=True))
    new_S, best_S = np.empty(mdp.num_states), np.empty(mdp.num_states, np.int64)
    _kernels().backup(mdp.first_S1, *_rows(mdp), mdp.reward_N, float(mdp.gamma), v_S, new_S, best_S)
    return new_S, best_S


def follow(mdp: FiniteMDP, pair_S: Ints, v_S: Floats, *, twin: bool = False) -> Floats:
    """T_pi v of the policy that takes pair pair_S[s] in state s."""
    if twin:
        return np.where(pair_S >= 0, q_values(mdp, v_S, twin=True)[pair_S], 0.0)
    new_S = np.empty(mdp.num_states)
    _kernels().follow(pair_S, *_rows(mdp), mdp.reward_N, float(mdp.gamma), v_S, new_S)
    return new_S


def sweep_(mdp: FiniteMDP, order_S: Ints, v_S: Floats, best_S: Ints, *, twin: bool = False) -> None:
    """One Gauss-Seidel sweep in place: states in this order see what was renewed before them.

    The chance to stay is summed up: q = (reward + gamma * rest) / (1 - gamma P(s|s, a))."""
    if not twin:
        arrays = (mdp.first_S1, *_rows(mdp), mdp.reward_N, float(mdp.gamma))
        return _kernels().sweep_(order_S, *arrays, v_S, best_S)
    for s in order_S:
        pairs = range(mdp.first_S1[s], mdp.first_S1[s + 1])
        q_n = []
        for n in pairs:
            row = slice(mdp.row_N1[n], mdp.row_N1[n + 1])
            loop = mdp.next_M[row] == s
            stay = mdp.gamma * mdp.weight_M[row][loop].sum()
            rest = mdp.reward_N[n] + mdp.gamma * mdp.weight_M[row][~loop] @ v_S[mdp.next_M[row][~loop]]
            q_n.append(rest / (1 - stay) if stay < 1 - 1e-12 else rest + stay * v_S[s])
        v_S[s], best_S[s] = (max(q_n), pairs[int(np.argmax(q_n))]) if q_n else (0.0, -1)
    return None


def leading(mdp: FiniteMDP) -> tuple[Ints, Ints]:
    """The states that lead to each state: where its own begin, [S + 1], and all of them side by side."""
    owner_M = np.repeat(mdp.state_N, mdp.counts_N)
    to_K, from_K = np.divmod(np.unique(mdp.next_M.astype(np.int64) * mdp.num_states + owner_M), mdp.num_states)
    return np.searchsorted(to_K, np.arange(mdp.num_states + 1)), from_K


def renew_(
    mdp: FiniteMDP, into_S1: Ints, into_K: Ints, change_S: Floats, v_S: Floats, times: int, *, twin: bool = False
) -> None:
    """So many times: v(s) <- (T v)(s) where that is known to change most; then a look at the states that lead there.

    into_S1, into_K: of `leading`;  change_S: what is known about each state's change"""
    if not twin:
        arrays = (mdp.first_S1, *_rows(mdp), mdp.reward_N, float(mdp.gamma))
        return _kernels().renew_(*arrays, into_S1, into_K, change_S, v_S, times)

    def renewed(s: int) -> float:
        q_n = q_values(mdp, v_S, twin=True)[mdp.first_S1[s] : mdp.first_S1[s + 1]]
        return float(q_n.max()) if len(q_n) else 0.0

    queue = [(-float(change), s) for s, change in enumerate(change_S) if change > 0]
    heapq.heapify(queue)
    for _ in range(times):
        if not queue:
            break
        _, s = heapq.heappop(queue)
        v_S[s] = renewed(s)
        for other in into_K[into_S1[s] : into_S1[s + 1]].tolist():
            change = abs(renewed(other) - v_S[other])
            if change > 0:
                heapq.heappush(queue, (-float(change), other))
    return None


def greedy(mdp: FiniteMDP, q_N: Floats) -> tuple[Floats, Ints]:
    """The largest q of each state and its first pair; terminal: 0 and -1."""
    best_S = np.full(mdp.num_states, -1)
    highest_S = np.zeros(mdp.num_states)
    acting = ~mdp.terminal_S
    highest_S[acting] = np.maximum.reduceat(q_N, mdp.first_S1[:-1][acting]) if acting.any() else 0.0
    is_best = np.flatnonzero(q_N == highest_S[mdp.state_N])[::-1]
    best_S[mdp.state_N[is_best]] = is_best  # written backwards: the first one stays
    return highest_S, best_S


def ties(mdp: FiniteMDP, q_N: Floats, tolerance: float | None = None) -> np.ndarray:
    """Which pairs are greedy, [N] of bool: all whose q is within `tolerance` of their state's largest."""
    highest_S, _ = greedy(mdp, q_N)
    if tolerance is None:
        tolerance = TIE * max(1.0, float(np.abs(q_N).max(initial=0.0)))
    return q_N >= highest_S[mdp.state_N] - tolerance


def modulus(mdp: FiniteMDP) -> float:
    """The factor by which T contracts in the largest difference: gamma times the largest weight of a row."""
    return mdp.gamma * mdp.lightest_and_heaviest[1]


def policy_of(mdp: FiniteMDP, policy: Numbers) -> Floats:
    """A policy as probabilities per pair, [N].

    policy: actions [S] (anything in terminal states), a table [S, A], or probabilities per pair [N].
    Raises ModelError where a policy takes an illegal action or a state's probabilities do not sum to 1."""
    given = np.asarray(policy)
    if given.shape == (mdp.num_states,) and np.issubdtype(given.dtype, np.integer):
        pi_N = (mdp.action_N == given[mdp.state_N]).astype(float)
    elif given.shape == (mdp.num_states, mdp.num_actions):
        pi_N = given[mdp.state_N, mdp.action_N].astype(float)
    elif given.shape == (mdp.num_pairs,):
        pi_N = given.astype(float)
    else:
        raise ModelError(
            f"a policy is actions [{mdp.num_states}], a table [{mdp.num_states}, {mdp.num_actions}] or probabilities "
            f"of the {mdp.num_pairs} pairs; got {given.dtype} of shape {given.shape}"
        )
    total_S = sums(pi_N, mdp.first_S1)
    if not (pi_N >= 0).all():
        pair = int((~(pi_N >= 0)).argmax())
        where = f"{mdp.state_name(mdp.state_N[pair])}, {mdp.action_name(mdp.action_N[pair])}"
        raise ModelError(f"the policy's probability of {where} is {pi_N[pair]}; it must be 0 or more")
    wrong = (abs(total_S - 1) > 1e-8) & ~mdp.terminal_S
    if wrong.any():
        state = int(wrong.argmax())
        raise ModelError(
            f"the policy's probabilities of legal actions in {mdp.state_name(state)} sum to {total_S[state]:.9g}, not 1"
        )
    return pi_N


def policy_matrix(mdp: FiniteMDP, pi_N: Floats):  # type: ignore[no-untyped-def]
    """gamma P_pi as a SciPy CSR matrix [S, S], and the expected reward of each state [S]."""
    from scipy import sparse

    owner_M = np.repeat(mdp.state_N, mdp.counts_N)
    weight_M = mdp.gamma * mdp.weight_M * np.repeat(pi_N, mdp.counts_N)
    shape = (mdp.num_states, mdp.num_states)
    return sparse.csr_array((weight_M, (owner_M, mdp.next_M)), shape=shape), sums(pi_N * mdp.reward_N, mdp.first_S1)


def under(mdp: FiniteMDP, policy: Numbers) -> FiniteMDP:
    """The model in which nothing is left to choose: every state has the one action of following the policy.

    Whatever solves it evaluates the policy, with the same bounds: `solve(under(mdp, policy), "krylov")`."""
    pi_N = policy_of(mdp, policy)
    counts_N, acting = mdp.counts_N, ~mdp.terminal_S
    missing_N = 1 - mdp.chance_N
    leaks = np.flatnonzero(missing_N > 1e-12)  # what ends without a transition gets one of its own, that keeps nothing
    owner_M = np.r_[np.repeat(mdp.state_N, counts_N), mdp.state_N[leaks]]
    rewards_N = mdp.reward_N if mdp.reward_M is None else np.zeros(mdp.num_pairs)
    reward_M = np.repeat(mdp.reward_N, counts_N) if mdp.reward_M is None else mdp.reward_M
    keep_M = np.ones(len(mdp.prob_M)) if mdp.keep_M is None else mdp.keep_M
    order_M = np.argsort(owner_M, kind="stable")
    return replace(
        mdp,
        first_S1=np.concatenate(([0], np.cumsum(acting))),
        action_N=np.zeros(int(acting.sum()), np.int64),
        row_N1=np.concatenate(([0], np.cumsum(np.bincount(owner_M, minlength=mdp.num_states)[acting]))),
        next_M=np.r_[mdp.next_M, mdp.state_N[leaks]][order_M],
        prob_M=np.r_[mdp.prob_M * np.repeat(pi_N, counts_N), (missing_N * pi_N)[leaks]][order_M],
        keep_M=np.r_[keep_M, np.zeros(len(leaks))][order_M],
        reward_N=sums(pi_N * mdp.reward_N, mdp.first_S1)[acting],
        reward_M=np.r_[reward_M, rewards_N[leaks]][order_M],
        num_actions=1,
        action_names=(),
    )


def _rows(mdp: FiniteMDP) -> tuple[Ints, Ints, Floats]:
    return mdp.row_N1, mdp.next_M, mdp.weight_M


def _kernels():  # type: ignore[no-untyped-def]
    from rung.mdp import kernels

    return kernels
