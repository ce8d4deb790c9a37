"""Learning the values of a policy from samples: TD(0), n-step, TD(lambda), Monte Carlo, and their linear forms.

Values are linear in features, x(s) . w; a table is the identity as features (the default).  Every learner is a
generator without end; lanes are seeds.  It yields its weights [N, F] (its own tensor), after every step, or after every
episode where a method waits for its end.

    n-step TD          w += a (G_{t:t+n} - v(s_t)) x(s_t)
    TD(lambda)         z = discount lambda z + x,  w += a delta z          (accumulating traces: the backward view)
    true online        the dutch trace, and one correction: exactly the online lambda-return  [van Seijen et al. 2016]
    lambda-return      every state of an episode towards its lambda-return, after the end     (the forward view)
    TDC, ETD           off-policy without divergence                  [Sutton et al. 2009; Sutton, Mahmood & White 2016]
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from rung.core.errors import ConfigError, ModelError, nearest
from rung.core.shapes import Float, Tensor
from rung.mdp.control import Window, first_times
from rung.mdp.finite import FiniteMDP, Numbers
from rung.mdp.operators import policy_of
from rung.mdp.values import Linear
from rung.mdp.walk import Episode, Step, Walk, episode, follow
from rung.objectives.optimisers import Rule, constant
from rung.objectives.returns import lambda_return, one_step

Weights = Float[Tensor, "N F"]


def _start(
    mdp: FiniteMDP,
    policy: Numbers,
    lane_keys: Sequence[int],
    features_SF: Numbers | None,
    initial_NF: Numbers,
    max_steps: int | None,
) -> tuple[Walk, Linear, Tensor]:
    """A walk, values, and the policy as a table."""
    features = np.eye(mdp.num_states) if features_SF is None else features_SF
    pi_SA = torch.from_numpy(mdp.table(policy_of(mdp, policy), fill=0.0))
    return Walk(mdp, lane_keys, max_steps=max_steps), Linear(len(lane_keys), features, initial_NF=initial_NF), pi_SA


def td_lambda(
    mdp: FiniteMDP,
    policy: Numbers,
    lane_keys: Sequence[int],
    *,
    step: float | Rule = 0.1,
    lambda_: float = 0.0,
    true_online: bool = False,
    features_SF: Numbers | None = None,
    initial_NF: Numbers = 0.0,
    max_steps: int | None = None,
) -> Iterator[Weights]:
    """TD(lambda) with accumulating traces, or true online; lambda 0 is TD(0).  [Sutton & Barto 12.2, 12.5]

    step: a number, or a rule of the steps so far."""
    walk, values, pi_SA = _start(mdp, policy, lane_keys, features_SF, initial_NF, max_steps)
    choose, rule, features = follow(pi_SA), step if callable(step) else constant(step), values.x_SAF[:, 0]
    trace_NF, old_N = torch.zeros_like(values.w_NF), torch.zeros(len(lane_keys), dtype=torch.float64)
    before_N, time = torch.zeros(len(lane_keys), dtype=torch.float64), 0  # discount of the transition into this state
    while True:
        time += 1
        size_N = rule(torch.full(old_N.shape, time))
        taken = walk.step(choose(walk.state_N, walk.noise_NW))
        x_NF = features[taken.state_N]
        now_N, next_N = values(taken.state_N)[:, 0], values(taken.next_state_N)[:, 0]
        error_N = one_step(taken.reward_N[None], taken.discount_N[None], next_N[None])[0] - now_N
        fade_N1 = (before_N * lambda_)[:, None]
        if true_online:
            size_N1, overlap_N1 = size_N[:, None], (trace_NF * x_NF).sum(-1, keepdim=True)
            trace_NF = fade_N1 * trace_NF + size_N1 * (1 - fade_N1 * overlap_N1) * x_NF  # holds the step sizes
            extra_N1 = (now_N - old_N)[:, None]
            values.w_NF += (error_N[:, None] + extra_N1) * trace_NF - size_N1 * extra_N1 * x_NF
        else:
            trace_NF = fade_N1 * trace_NF + x_NF
            values.w_NF += (size_N * error_N)[:, None] * trace_NF
        before_N = torch.where(taken.same_N, taken.discount_N, 0.0)  # 0: a new trace
        old_N = torch.where(taken.same_N, next_N, 0.0)
        yield values.w_NF


def n_step_td(
    mdp: FiniteMDP,
    policy: Numbers,
    lane_keys: Sequence[int],
    *,
    n: int = 1,
    step: float = 0.1,
    features_SF: Numbers | None = None,
    initial_NF: Numbers = 0.0,
    max_steps: int | None = None,
) -> Iterator[Weights]:
    """n-step TD; the last n - 1 states of an episode are learnt from at its end.  [Sutton & Barto 7.1]"""
    walk, values, pi_SA = _start(mdp, policy, lane_keys, features_SF, initial_NF, max_steps)
    choose, window = follow(pi_SA), Window(n)
    zero_N = torch.zeros(len(lane_keys), dtype=torch.int64)
    while True:
        taken = walk.step(choose(walk.state_N, walk.noise_NW))
        for row, target_N, lanes_N in window.due(taken, values(taken.next_state_N)[:, 0]):
            error_N = target_N - values(row.state_N)[:, 0]
            values.add_(row.state_N, zero_N, torch.where(lanes_N, step * error_N, 0.0))
        yield values.w_NF


def by_episodes(
    mdp: FiniteMDP,
    policy: Numbers,
    lane_keys: Sequence[int],
    *,
    lambda_: float = 1.0,
    step: float | Rule = 0.1,
    first_visit: bool = False,
    features_SF: Numbers | None = None,
    initial_NF: Numbers = 0.0,
    max_steps: int | None = None,
) -> Iterator[Weights]:
    """After every episode, each of its states towards its lambda-return; lambda 1 is Monte Carlo.  [S & B 5.1, 12.1]

    The returns are those of the weights before the episode.  step: a number, or a rule of the visits of a state."""
    walk, values, pi_SA = _start(mdp, policy, lane_keys, features_SF, initial_NF, max_steps)
    choose, rule = follow(pi_SA), step if callable(step) else constant(step)
    visits_NS = torch.zeros(len(lane_keys), mdp.num_states, dtype=torch.int64)
    lane_N, zero_N = torch.arange(len(lane_keys)), torch.zeros(len(lane_keys), dtype=torch.int64)
    while True:
        seen = episode(walk, choose)
        next_TN = torch.stack([values(state_N)[:, 0] for state_N in seen.next_state_TN])
        return_TN = lambda_return(seen.reward_TN, seen.discount_TN, next_TN, lambda_, seen.same_TN)
        wanted_TN = _wanted(seen, first_visit)
        for state_N, return_N, wanted_N in zip(seen.state_TN, return_TN, wanted_TN, strict=True):
            visits_NS[lane_N, state_N] += wanted_N
            size_N = rule(visits_NS[lane_N, state_N].clamp(min=1))
            error_N = return_N - values(state_N)[:, 0]
            values.add_(state_N, zero_N, torch.where(wanted_N, size_N * error_N, 0.0))
        yield values.w_NF


def _wanted(seen: Episode, first_visit: bool) -> Tensor:
    if not first_visit:
        return seen.alive_TN
    times = torch.arange(len(seen.state_TN))[:, None]
    return seen.alive_TN & (first_times(seen.state_TN, seen.alive_TN) == times)


def batch(
    mdp: FiniteMDP,
    policy: Numbers,
    lane_keys: Sequence[int],
    *,
    method: str = "td",
    step: float = 0.001,
    initial_NF: Numbers = 0.0,
    tolerance: float = 1e-3,
) -> Iterator[Weights]:
    """All episodes so far again and again, updates summed, until they are small; then one episode more.

    TD converges to the values of the most likely model, Monte Carlo to the mean returns.  Raises ConfigError where
    `step` is so large that updates grow.  [Sutton & Barto 6.3]"""
    walk, values, pi_SA = _start(mdp, policy, lane_keys, None, initial_NF, None)
    choose, seen = follow(pi_SA), []
    lanes = len(lane_keys)
    if method not in ("td", "mc"):
        raise ConfigError(f'method is "td" or "mc"; got {method!r}')
    while True:
        seen.append(episode(walk, choose))
        columns = {
            name: torch.cat([getattr(one, name) for one in seen])
            for name in ("state_TN", "reward_TN", "discount_TN", "next_state_TN", "same_TN", "alive_TN")
        }
        state_NT, next_NT = columns["state_TN"].T, columns["next_state_TN"].T
        alive_TN = columns["alive_TN"].double()
        zeros_TN = torch.zeros_like(columns["reward_TN"])
        target_TN = lambda_return(columns["reward_TN"], columns["discount_TN"], zeros_TN, 1.0, columns["same_TN"])
        while True:
            now_TN = values.w_NF.gather(1, state_NT).T
            if method == "td":
                target_TN = one_step(columns["reward_TN"], columns["discount_TN"], values.w_NF.gather(1, next_NT).T)
            change_NF = torch.zeros(lanes, mdp.num_states, dtype=torch.float64)
            change_NF.scatter_add_(1, state_NT, (step * alive_TN * (target_TN - now_TN)).T)
            values.w_NF += change_NF
            largest = float(change_NF.abs().sum(-1).max())
            if largest < tolerance:
                break
            if not largest < 1e100:
                raise ConfigError(f"updates of {len(seen)} episodes at once diverge: step {step} is too large")
        yield values.w_NF


def importance_sampling(
    mdp: FiniteMDP,
    policy: Numbers,
    behaviour: Numbers,
    lane_keys: Sequence[int],
    *,
    state: int,
    weighted: bool,
    max_steps: int | None = None,
) -> Iterator[Float[Tensor, "N"]]:
    """The value of one state from episodes of another policy that begin there; yields the estimate after each.

    ordinary: mean of ratio * return;  weighted: sum of ratio * return over sum of ratio (biased, of finite variance).
    An episode that is cut counts as ended, with nothing to come.  [Sutton & Barto 5.5]"""
    ratio_SA, choose = _ratios(mdp, policy, behaviour)
    walk = Walk(mdp, lane_keys, max_steps=max_steps)
    begin_N = torch.full((len(lane_keys),), state)
    total_N, weight_N = (
        torch.zeros(len(lane_keys), dtype=torch.float64),
        torch.zeros(len(lane_keys), dtype=torch.float64),
    )
    while True:
        seen = episode(walk, choose, start_N=begin_N)
        ratio_TN = torch.where(seen.alive_TN, ratio_SA[seen.state_TN, seen.action_TN], 1.0)
        ratio_N = ratio_TN.prod(0)
        total_N += ratio_N * seen.return_TN[0]
        weight_N += ratio_N if weighted else 1.0
        yield torch.where(weight_N > 0, total_N / weight_N, 0.0)


def off_policy_td(
    mdp: FiniteMDP,
    policy: Numbers,
    behaviour: Numbers,
    lane_keys: Sequence[int],
    *,
    method: str = "tdc",
    step: float = 0.01,
    second_step: float = 0.05,
    features_SF: Numbers | None = None,
    initial_NF: Numbers = 0.0,
    max_steps: int | None = None,
) -> Iterator[Weights]:
    """TD(0) from the steps of another policy.  Semi-gradient can diverge; TDC and emphatic TD do not.

    rho = pi / b, delta = r + discount v' - v:
      semi_gradient  w += a rho delta x
      tdc            w += a rho (delta x - discount x' (x.h)),  h += b rho (delta - x.h) x          [S & B 11.7]
      etd            F = rho_before discount_before F + 1,  w += a F rho delta x                    [S & B 11.8]"""
    ratio_SA, choose = _ratios(mdp, policy, behaviour)
    walk, values, _ = _start(mdp, behaviour, lane_keys, features_SF, initial_NF, max_steps)
    features = values.x_SAF[:, 0]
    second_NF = torch.zeros_like(values.w_NF)
    emphasis_N, carried_N = (
        torch.zeros(len(lane_keys), dtype=torch.float64),
        torch.zeros(len(lane_keys), dtype=torch.float64),
    )

    def semi_gradient(x_NF: Tensor, next_NF: Tensor, push_N: Tensor, taken: Step, ratio_N: Tensor) -> Tensor:
        return push_N[:, None] * x_NF

    def tdc(x_NF: Tensor, next_NF: Tensor, push_N: Tensor, taken: Step, ratio_N: Tensor) -> Tensor:
        along_N = (x_NF * second_NF).sum(-1)
        second_NF.add_(second_step * (push_N - ratio_N * along_N)[:, None] * x_NF)
        return push_N[:, None] * x_NF - (ratio_N * taken.discount_N * along_N)[:, None] * next_NF

    def etd(x_NF: Tensor, next_NF: Tensor, push_N: Tensor, taken: Step, ratio_N: Tensor) -> Tensor:
        emphasis_N.mul_(carried_N).add_(1.0)
        carried_N.copy_(torch.where(taken.same_N, ratio_N * taken.discount_N, 0.0))
        return (emphasis_N * push_N)[:, None] * x_NF

    methods: dict[str, Callable[..., Tensor]] = {"semi_gradient": semi_gradient, "tdc": tdc, "etd": etd}
    if method not in methods:
        raise ConfigError(f"unknown method {method!r}. {nearest(method, methods)}")
    direction = methods[method]
    while True:
        taken = walk.step(choose(walk.state_N, walk.noise_NW))
        ratio_N = ratio_SA[taken.state_N, taken.action_N]
        next_N = values(taken.next_state_N)[:, 0]
        error_N = one_step(taken.reward_N[None], taken.discount_N[None], next_N[None])[0] - values(taken.state_N)[:, 0]
        x_NF, next_NF = features[taken.state_N], features[taken.next_state_N]
        values.w_NF += step * direction(x_NF, next_NF, ratio_N * error_N, taken, ratio_N)
        yield values.w_NF


def _ratios(mdp: FiniteMDP, policy: Numbers, behaviour: Numbers) -> tuple[Tensor, Callable[..., Tensor]]:
    """pi / b of every pair, and how the behaviour chooses.  Raises ModelError where b never takes what pi may."""
    pi_N, b_N = policy_of(mdp, policy), policy_of(mdp, behaviour)
    missing_N = (pi_N > 0) & (b_N == 0)
    if missing_N.any():
        pair = int(missing_N.argmax())
        state, action = int(mdp.state_N[pair]), int(mdp.action_N[pair])
        raise ModelError(
            f"the behaviour never takes {mdp.action_name(action)} in {mdp.state_name(state)}, which the policy may "
            "take: nothing can be learnt about it from such episodes"
        )
    ratio_N = np.divide(pi_N, b_N, out=np.zeros_like(pi_N), where=b_N > 0)
    table_SA = torch.from_numpy(mdp.table(ratio_N, fill=0.0))
    return table_SA, follow(torch.from_numpy(mdp.table(b_N, fill=0.0)))
