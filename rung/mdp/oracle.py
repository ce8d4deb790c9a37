"""The exact answers of a finite model: what a learner should converge to, and by how much it errs.

    truth = oracle(mdp, policy)
    truth.v_S, truth.q_N             (I - gamma P_pi) v = r_pi
    truth.best.v_S                   the optimal values, with bounds
    truth.occupancy_S                d = start (I - gamma P_pi)^-1: expected discounted visits of each state
    truth.gradient_N                 dJ / d theta of a softmax policy: d(s) pi(a|s) A(s, a)             [Sutton 2000]
    truth.fisher_NN                  sum of d(s) over states of diag(pi) - pi pi'                          [Kakade 2001]
    truth.fixed_point(features_SF)   the weights that linear TD(0) converges to              [Tsitsiklis & Van Roy 1997]
    truth.variance_S                 variance of the return from each state                                 [Sobel 1982]

Every number is a direct solve: for models of up to some 10^4 states.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from rung.core.errors import ModelError
from rung.mdp.certificates import factor
from rung.mdp.finite import FiniteMDP, Floats, Numbers, sums
from rung.mdp.operators import policy_matrix, policy_of, q_values
from rung.mdp.planning import Solution, evaluate, policy_iteration, solve


def oracle(mdp: FiniteMDP, policy: Numbers) -> "Oracle":
    """The exact answers for this policy: actions [S], a table [S, A] or probabilities of the pairs [N].

    Raises ModelError for a policy that is none, or that never ends where gamma is 1."""
    return Oracle(mdp, policy_of(mdp, policy))


def uniform(mdp: FiniteMDP) -> Floats:
    """The policy that takes every legal action of a state alike, [N]."""
    return 1.0 / np.repeat(np.diff(mdp.first_S1), np.diff(mdp.first_S1))


def softmax(mdp: FiniteMDP, theta_N: Floats) -> Floats:
    """pi(a|s) = exp(theta(s, a)) over its sum over the legal actions of s, [N]."""
    acting = ~mdp.terminal_S
    top_S = np.zeros(mdp.num_states)
    top_S[acting] = np.maximum.reduceat(theta_N, mdp.first_S1[:-1][acting])
    power_N = np.exp(theta_N - top_S[mdp.state_N])
    return power_N / sums(power_N, mdp.first_S1)[mdp.state_N]


def epsilon_greedy(mdp: FiniteMDP, pair_S: Numbers, epsilon: float) -> Floats:
    """The pair pair_S[s] with 1 - epsilon, and epsilon over all legal actions alike, [N]."""
    pairs = np.asarray(pair_S)
    pi_N = epsilon * uniform(mdp)
    pi_N[pairs[pairs >= 0]] += 1 - epsilon
    return pi_N


def epsilon_soft_optimum(mdp: FiniteMDP, epsilon: float) -> tuple[Floats, Floats]:
    """v and pi of the best policy that takes every legal action with at least epsilon / |A(s)|: [S] and [N].

    The best greedy policy of the model whose every action is taken with 1 - epsilon only.  [Sutton & Barto, 5.4]"""
    pi_N = uniform(mdp)
    while True:
        v_S = evaluate(mdp, pi_N)
        q_N = q_values(mdp, v_S)
        best_S = np.full(mdp.num_states, -1)
        for state in np.flatnonzero(~mdp.terminal_S):
            pairs = np.arange(mdp.first_S1[state], mdp.first_S1[state + 1])
            tied = pairs[q_N[pairs] >= q_N[pairs].max() - 1e-11 * max(1.0, float(abs(q_N).max()))]
            best_S[state] = tied[pi_N[tied].argmax()]  # what it does already, where that is tied
        new_N = epsilon_greedy(mdp, best_S, epsilon)
        if np.array_equal(new_N, pi_N):
            return v_S, pi_N
        pi_N = new_N


@dataclass(frozen=True, eq=False)
class Oracle:
    """Answers are computed when they are first asked for."""

    mdp: FiniteMDP
    pi_N: Floats

    @cached_property
    def _solver(self) -> Any:
        return factor(self.mdp, self.pi_N)

    @cached_property
    def _matrix(self) -> tuple[Any, Floats]:
        return policy_matrix(self.mdp, self.pi_N)

    @cached_property
    def v_S(self) -> Floats:
        """Value of the policy."""
        return self._solver.solve(self._matrix[1])

    @cached_property
    def q_N(self) -> Floats:
        """Value of each pair, the policy followed afterwards."""
        return q_values(self.mdp, self.v_S)

    @cached_property
    def advantage_N(self) -> Floats:
        """q - v."""
        return self.q_N - self.v_S[self.mdp.state_N]

    @cached_property
    def best(self) -> Solution:
        """The optimum, as close as a direct solve comes."""
        return solve(self.mdp, partial(policy_iteration, krylov=""), epsilon=None)

    @property
    def objective(self) -> float:
        """J: value of the start distribution."""
        return float(self.mdp.first_state_S @ self.v_S)

    @cached_property
    def occupancy_S(self) -> Floats:
        """Expected discounted number of visits of each state; its sum is the expected discounted length."""
        return self._solver.solve(self.mdp.first_state_S, trans="T")

    @cached_property
    def stationary_S(self) -> Floats:
        """How often a long walk stands in each state: who ends begins anew, and never stands in a terminal state.

        Discounts, gamma's and those of transitions, play no part, but for 0, which ends.  Raises ModelError where there
        are several such distributions."""
        mdp = self.mdp
        goes_M = mdp.prob_M * ~mdp.terminal_S[mdp.next_M] * (1.0 if mdp.keep_M is None else mdp.keep_M > 0)
        flow, _ = policy_matrix(replace(mdp, prob_M=goes_M, keep_M=None, reward_M=None, gamma=1.0), self.pi_N)
        dense = flow.toarray()
        dense += np.outer(1 - dense.sum(1), mdp.first_state_S)
        states = len(dense)
        equations = np.vstack((dense.T - np.eye(states), np.ones(states)))
        found, _, rank, _ = np.linalg.lstsq(equations, np.r_[np.zeros(states), 1.0], rcond=1e-12)
        if rank < states:
            raise ModelError("the chain of this policy has several stationary distributions")
        return found

    @cached_property
    def gradient_N(self) -> Floats:
        """Gradient of J by the logits of a softmax policy over each state's legal actions."""
        return self.occupancy_S[self.mdp.state_N] * self.pi_N * self.advantage_N

    @cached_property
    def fisher_NN(self) -> Floats:
        """Fisher information of those logits, states weighted by their occupancy."""
        same = self.mdp.state_N[:, None] == self.mdp.state_N
        block = np.diag(self.pi_N) - same * np.outer(self.pi_N, self.pi_N)
        return self.occupancy_S[self.mdp.state_N][:, None] * block

    @cached_property
    def variance_S(self) -> Floats:
        """Variance of the discounted return from each state."""
        mdp, values = self.mdp, self.v_S
        owner_M = np.repeat(np.arange(mdp.num_pairs), mdp.counts_N)
        rewards = mdp.reward_N[owner_M] if mdp.reward_M is None else mdp.reward_M
        keep_M = np.ones(len(mdp.next_M)) if mdp.keep_M is None else mdp.keep_M
        deviation_M = rewards + mdp.gamma * keep_M * values[mdp.next_M] - values[mdp.state_N[owner_M]]
        missing_N = 1 - mdp.chance_N  # what ends without a transition
        ended_N = missing_N * (mdp.reward_N * (mdp.reward_M is None) - values[mdp.state_N]) ** 2
        local_N = mdp.mean_of(deviation_M**2) + ended_N
        squared = FiniteMDP(
            first_S1=mdp.first_S1,
            action_N=mdp.action_N,
            row_N1=mdp.row_N1,
            next_M=mdp.next_M,
            prob_M=mdp.prob_M,
            keep_M=keep_M**2,
            reward_N=local_N,
            gamma=mdp.gamma**2,
            num_actions=mdp.num_actions,
        )
        return evaluate(squared, self.pi_N)

    def fixed_point(self, features_SF: Numbers, weighting_S: Numbers | None = None) -> Floats:
        """Weights w of the projected Bellman equation  F' D (r + gamma P F w - F w) = 0, [F].

        weighting_S: D, the stationary distribution by default.  Features of terminal states count as 0, as their values
        do.  Raises ModelError where there is no single solution."""
        features = np.where(self.mdp.terminal_S[:, None], 0.0, np.asarray(features_SF, dtype=float))
        weighting = self.stationary_S if weighting_S is None else np.asarray(weighting_S, dtype=float)
        matrix, rewards = self._matrix
        left = features.T @ (weighting[:, None] * (features - matrix @ features))
        right = features.T @ (weighting * rewards)
        if np.linalg.matrix_rank(left) < len(right):
            raise ModelError("the features do not determine a single fixed point: some are linear in others")
        return np.linalg.solve(left, right)

    def regret(self, other: "Oracle") -> float:
        """J(other) - J(self) by the performance-difference lemma: other's occupancy times self's advantages.

        [Kakade & Langford 2002]"""
        flow_S = sums(other.pi_N * self.advantage_N, self.mdp.first_S1)
        return float(other.occupancy_S @ flow_S)
