"""Policy gradient on tables: a softmax over the legal actions of each state, with logits of its own for every lane.

    exact      theta += a grad J                            the oracle's gradient: no sampling
    natural    theta += a A_pi(s, a)                        its inverse Fisher times the gradient        [Kakade 2001]
    REINFORCE  theta += a discount^t (G_t - b) grad log pi  after every episode                          [Williams 1992]
    QAC        theta += a q(s, a) grad log pi               after every step, q learnt by Sarsa          [Zhao 10.2]

The loss of a sampled step is `objectives.policy.pg`, the same function that trains a language model.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from rung.core.shapes import Bool, Float, Int, Tensor
from rung.mdp.finite import FiniteMDP, Floats, Numbers
from rung.mdp.oracle import Oracle, oracle, softmax
from rung.mdp.values import Table
from rung.mdp.walk import Walk, episode, follow
from rung.objectives import values as worth
from rung.objectives.policy import pg
from rung.objectives.returns import one_step

Logits = Float[Tensor, "N S A"]


def exact(mdp: FiniteMDP, *, step: float, natural: bool = False, theta_N: Floats | None = None) -> Iterator[Oracle]:
    """Gradient ascent on J by the oracle; yields the oracle of every policy, the first one's first."""
    theta_N = np.zeros(mdp.num_pairs) if theta_N is None else theta_N
    while True:
        truth = oracle(mdp, softmax(mdp, theta_N))
        yield truth
        theta_N = theta_N + step * (truth.advantage_N if natural else truth.gradient_N)


def log_policy(theta_NSA: Logits, legal_SA: Bool[Tensor, "S A"]) -> Logits:
    """log pi of every state and action; -inf where illegal."""
    return theta_NSA.masked_fill(~legal_SA, -torch.inf).log_softmax(-1)


def reinforce(
    mdp: FiniteMDP,
    lane_keys: Sequence[int],
    *,
    step: float,
    baseline_step: float = 0.0,
    groups_S: Numbers | None = None,
    initial: Numbers = 0.0,
    max_steps: int | None = None,
) -> Iterator[Logits]:
    """REINFORCE; with a baseline_step, minus a learnt value of the state.  Yields the logits after every episode.

    The baseline is that of before the episode.  Learnt along the way, as in the box of Sutton & Barto 13.4, it holds
    returns that depend on the action it is to judge, and the mean push is no longer the gradient.
    groups_S: states of one group share their logits and their baseline (they look alike);  initial: of all logits
    An episode that is cut counts as ended, with nothing to come."""
    walk, own_S = Walk(mdp, lane_keys, max_steps=max_steps), _groups(mdp, groups_S)
    theta, value = _tables(mdp, lane_keys, own_S, initial)
    legal_SA, zero_N = walk.tables.legal_SA, torch.zeros(len(lane_keys), dtype=torch.int64)
    while True:
        log_pi_NSA = log_policy(theta.q_NSA[:, own_S], legal_SA)
        seen = episode(walk, _sampled(log_pi_NSA))
        weight_N = torch.ones_like(seen.reward_TN[0])  # discount^t
        baseline_TN = torch.stack([value(own_S[state_N])[:, 0] for state_N in seen.state_TN])
        for t, state_N in enumerate(seen.state_TN):
            alive_N, group_N = seen.alive_TN[t], own_S[state_N]
            error_N, gain_N = seen.return_TN[t] - value(group_N)[:, 0], seen.return_TN[t] - baseline_TN[t]
            value.add_(group_N, zero_N, baseline_step * torch.where(alive_N, error_N, 0.0))
            push_N = step * weight_N * torch.where(alive_N, gain_N, 0.0)
            _ascend(theta, group_N, seen.action_TN[t], push_N, legal_SA[state_N])
            weight_N = weight_N * seen.discount_TN[t]
        yield theta.q_NSA


def actor_critic(
    mdp: FiniteMDP,
    lane_keys: Sequence[int],
    *,
    step: float,
    critic_step: float,
    max_steps: int | None = None,
) -> Iterator[Logits]:
    """QAC: the critic is Sarsa, the actor is pushed by q(s, a).  Yields the logits after every step."""
    walk, own_S = Walk(mdp, lane_keys, max_steps=max_steps), _groups(mdp, None)
    theta, _ = _tables(mdp, lane_keys, own_S, 0.0)
    critic = Table(len(lane_keys), mdp.num_states, mdp.num_actions)
    legal_SA = walk.tables.legal_SA

    def choose(state_N: Tensor) -> Tensor:
        log_pi_NA = theta(state_N).masked_fill(~legal_SA[state_N], -torch.inf).log_softmax(-1)
        return _pick(log_pi_NA.exp(), walk.noise_NW)

    action_N = choose(walk.state_N)
    while True:
        taken = walk.step(action_N)
        next_action_N = choose(taken.next_state_N)
        next_N = worth.of_action(critic(taken.next_state_N), next_action_N)
        target_N = one_step(taken.reward_N[None], taken.discount_N[None], next_N[None])[0]
        now_N = worth.of_action(critic(taken.state_N), action_N)
        _ascend(theta, taken.state_N, action_N, step * now_N, legal_SA[taken.state_N])
        critic.add_(taken.state_N, action_N, critic_step * (target_N - now_N))
        action_N = torch.where(taken.same_N, next_action_N, choose(walk.state_N))
        yield theta.q_NSA


def _ascend(theta: Table, state_N: Tensor, action_N: Tensor, push_N: Tensor, legal_NA: Tensor) -> None:
    """theta += gradient of `pg` with these advantages, lane by lane."""
    row_NA = theta(state_N).detach().requires_grad_()
    logp_N = worth.of_action(row_NA.masked_fill(~legal_NA, -torch.inf).log_softmax(-1), action_N)
    (change_NA,) = torch.autograd.grad(pg(logp_N, logp_N.detach(), push_N).sum(), row_NA)
    theta.q_NSA[torch.arange(len(state_N)), state_N] += change_NA


def _sampled(log_pi_NSA: Logits):  # type: ignore[no-untyped-def]
    lane_N = torch.arange(len(log_pi_NSA))

    def choose(state_N: Int[Tensor, "N"], noise_NW: Float[Tensor, "N W"]) -> Int[Tensor, "N"]:
        return _pick(log_pi_NSA[lane_N, state_N].exp(), noise_NW)

    return choose


def _pick(pi_NA: Tensor, noise_NW: Tensor) -> Tensor:
    """Lane n draws from row n."""
    return follow(pi_NA)(torch.arange(len(pi_NA)), noise_NW)


def _groups(mdp: FiniteMDP, groups_S: Numbers | None) -> Tensor:
    return torch.arange(mdp.num_states) if groups_S is None else torch.as_tensor(np.asarray(groups_S))


def _tables(mdp: FiniteMDP, lane_keys: Sequence[int], own_S: Tensor, initial: Numbers) -> tuple[Table, Table]:
    groups = int(own_S.max()) + 1
    return Table(len(lane_keys), groups, mdp.num_actions, initial=initial), Table(len(lane_keys), groups)
