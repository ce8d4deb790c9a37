"""Learning to act from samples: one update, `q += step (target - q)`; a method is how its target values the next state.

    sarsa            q(s', a') of the action taken next
    expected_sarsa   its mean under the policy
    q_learning       the largest q
    double_q         two tables: one chooses, the other is believed

With n > 1 the target has n rewards.  Every learner is a generator without end that yields after every step of all
lanes; lanes are seeds.  The policy is epsilon-greedy in q (the sum of both tables), or any other with `behaviour`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rung.core.errors import ConfigError, nearest
from rung.core.keys import derive_key
from rung.core.shapes import Bool, Float, Int, Tensor
from rung.mdp.finite import FiniteMDP
from rung.mdp.values import Table, Values
from rung.mdp.walk import Chooser, Episode, Step, Walk, draw_soft_greedy, episode, soft_greedy
from rung.objectives import values as worth
from rung.objectives.optimisers import Rule, constant, harmonic
from rung.objectives.returns import n_step


@dataclass(frozen=True, eq=False)
class Next:
    """The next state, as a target asks about it; what is not asked is not computed."""

    updates: "_Updates"
    taken: Step
    legal_NA: Bool[Tensor, "N A"]
    coin_N: Bool[Tensor, "N"]
    choose: Callable[[Tensor], Tensor]
    epsilon: float

    @cached_property
    def action_N(self) -> Int[Tensor, "N"]:
        """What the behaviour takes there."""
        return self.choose(self.taken.next_state_N)

    @property
    def q_NA(self) -> Float[Tensor, "N A"]:
        """Of the table that learns."""
        return self.updates.own(self.taken.next_state_N, self.coin_N)

    @property
    def other_NA(self) -> Float[Tensor, "N A"]:
        """Of the other one."""
        return self.updates.own(self.taken.next_state_N, ~self.coin_N)

    @property
    def pi_NA(self) -> Float[Tensor, "N A"]:
        """The law of the epsilon-greedy policy."""
        return soft_greedy(self.updates.mean(self.taken.next_state_N), self.legal_NA, self.epsilon)


NEXT_VALUES: Mapping[str, Callable[[Next], Tensor]] = {
    "sarsa": lambda x: worth.of_action(x.q_NA, x.action_N),
    "expected_sarsa": lambda x: worth.expected(x.q_NA, x.pi_NA),
    "q_learning": lambda x: worth.best(x.q_NA, x.legal_NA),
    "double_q": lambda x: worth.double(x.q_NA, x.other_NA, x.legal_NA),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Learning:
    """A learner after a step: its values (the learner's own, not copies), and what just happened."""

    values: tuple[Values, ...]
    step: Step

    def q_NSA(self) -> Float[Tensor, "N S A"]:
        """Mean of the tables."""
        return torch.stack([table.table() for table in self.values]).mean(0)


def temporal_difference(
    mdp: FiniteMDP,
    method: str,
    lane_keys: Sequence[int],
    *,
    step: float | Rule = 0.1,
    epsilon: float = 0.1,
    n: int = 1,
    values: Sequence[Values] | None = None,
    behaviour: Chooser | None = None,
    max_steps: int | None = None,
    start_N: Int[Tensor, "N"] | None = None,
) -> Iterator[Learning]:
    """Sarsa, expected Sarsa, Q-learning or double Q, one-step or n-step.

    step: a number, or a rule of how often the pair was updated;  values: zeros in a table by default, two for double_q
    behaviour: how actions are chosen; default: epsilon-greedy in the mean of the values.  Off-policy n-step targets are
    not corrected.  Raises ConfigError for an unknown method."""
    if method not in NEXT_VALUES:
        raise ConfigError(f"unknown method {method!r}. {nearest(method, NEXT_VALUES)}")
    lanes, next_value, tables = len(lane_keys), NEXT_VALUES[method], 2 if method == "double_q" else 1
    if values is None:
        values = tuple(Table(lanes, mdp.num_states, mdp.num_actions) for _ in range(tables))
    if len(values) != tables:
        raise ConfigError(f"{method} learns {tables} of values; got {len(values)}")
    walk = Walk(mdp, lane_keys, max_steps=max_steps, start_N=start_N)
    rule = step if callable(step) else constant(step)
    updates = _Updates(values, lanes, mdp, rule)
    window = Window(n)

    def choose(state_N: Tensor) -> Tensor:
        if behaviour is not None:
            return behaviour(state_N, walk.noise_NW)
        return draw_soft_greedy(updates.mean(state_N), walk.tables.legal_SA[state_N], epsilon, walk.noise_NW)

    action_N = choose(walk.state_N)
    while True:
        coin_N = walk.noise_NW[:, 2] < 0.5  # which table learns
        taken = walk.step(action_N)
        legal_NA = walk.tables.legal_SA[taken.next_state_N]
        following = Next(updates, taken, legal_NA, coin_N, choose, epsilon)
        for row, target_N, lanes_N in window.due(taken, next_value(following)):
            updates.move(row, target_N, lanes_N, coin_N)
        action_N = choose(walk.state_N)
        if method == "sarsa":  # goes on with the action that its target saw
            action_N = torch.where(taken.same_N, following.action_N, action_N)
        yield Learning(values=tuple(values), step=taken)


class Window:
    """The last n steps of every lane, and which of them are still to be learnt from."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ConfigError(f"a target has at least one reward; n = {n}")
        self.n = n
        self._rows: list[tuple[Step, Tensor]] = []  # with the value of the next state, as it was then
        self._waiting: list[Tensor] = []

    def due(self, taken: Step, next_value_N: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Steps whose targets are complete, oldest first: the step, its target, and the lanes it is for."""
        self._rows.append((taken, torch.where(taken.discount_N > 0, next_value_N, 0.0)))
        self._waiting.append(torch.ones_like(taken.same_N))
        if len(self._rows) > self.n:
            del self._rows[0], self._waiting[0]
        reward_TN = torch.stack([row.reward_N for row, _ in self._rows])
        discount_TN = torch.stack([row.discount_N for row, _ in self._rows])
        values_TN = torch.stack([value for _, value in self._rows])
        same_TN = torch.stack([row.same_N for row, _ in self._rows])
        target_TN = n_step(reward_TN, discount_TN, values_TN, self.n, same_TN)
        over_N, full = ~taken.same_N, len(self._rows) == self.n
        flush = bool(over_N.any())
        for t, (row, _) in enumerate(self._rows):
            lanes_N = self._waiting[t] if full and t == 0 else self._waiting[t] & over_N
            if (t == 0 and full) or flush:
                yield row, target_TN[t], lanes_N
                self._waiting[t] = self._waiting[t] & ~lanes_N


class _Updates:
    """`q += step (target - q)` on one table of one or two."""

    def __init__(self, values: Sequence[Values], lanes: int, mdp: FiniteMDP, rule: Rule) -> None:
        self.values, self.rule = tuple(values), rule
        self._lane_N = torch.arange(lanes)
        self._count_KNSA = torch.zeros(len(self.values), lanes, mdp.num_states, mdp.num_actions, dtype=torch.int64)

    def mean(self, state_N: Tensor) -> Tensor:
        total_NA = self.values[0](state_N)
        for table in self.values[1:]:
            total_NA = total_NA + table(state_N)
        return total_NA / len(self.values)

    def own(self, state_N: Tensor, coin_N: Tensor) -> Tensor:
        """q(s, .) of the first table where the coin says so, else of the last."""
        if len(self.values) == 1:
            return self.values[0](state_N)
        return torch.where(coin_N[:, None], self.values[0](state_N), self.values[1](state_N))

    def move(self, row: Step, target_N: Tensor, lanes_N: Tensor, coin_N: Tensor) -> None:
        for k, table in enumerate(self.values):
            mine_N = lanes_N if len(self.values) == 1 else lanes_N & (coin_N == (k == 0))
            where = (k, self._lane_N, row.state_N, row.action_N)
            self._count_KNSA[where] += mine_N
            now_N = worth.of_action(table(row.state_N), row.action_N)
            size_N = self.rule(self._count_KNSA[where].clamp(min=1))
            table.add_(row.state_N, row.action_N, torch.where(mine_N, size_N * (target_N - now_N), 0.0))


def monte_carlo(
    mdp: FiniteMDP,
    lane_keys: Sequence[int],
    *,
    epsilon: float = 0.1,
    step: Rule | None = None,
    first_visit: bool = False,
    exploring_starts: bool = False,
    max_steps: int | None = None,
    initial: float = 0.0,
) -> Iterator[Float[Tensor, "N S A"]]:
    """Monte Carlo control: an episode of the current policy, then every visited pair towards its return.

    step: rule of the visits of a pair, by default their mean;  exploring_starts: begin with any pair, and be greedy
    after it (max_steps then cuts what walks in circles);  an episode that is cut counts as ended, with nothing to come.
    Yields q after every episode (the learner's own tensor).                   [Sutton & Barto 5.3, 5.4; Zhao 5.3]"""
    rule = harmonic() if step is None else step
    lanes = len(lane_keys)
    table, counts = (
        Table(lanes, mdp.num_states, mdp.num_actions, initial=initial),
        Table(lanes, mdp.num_states, mdp.num_actions),
    )
    walk = Walk(mdp, lane_keys, max_steps=max_steps)
    policy_epsilon = 0.0 if exploring_starts else epsilon
    state_P, action_P = torch.from_numpy(mdp.state_N), torch.from_numpy(mdp.action_N)

    def choose(state_N: Tensor, noise_NW: Tensor) -> Tensor:
        return draw_soft_greedy(table(state_N), walk.tables.legal_SA[state_N], policy_epsilon, noise_NW)

    while True:
        begun = {}
        if exploring_starts:
            walk.restart()  # the numbers of an episode's start do not depend on how long the last one was
            pair_N = (walk.noise_NW[:, 2] * mdp.num_pairs).long()
            begun = {"start_N": state_P[pair_N], "first_action_N": action_P[pair_N]}
        seen = episode(walk, choose, **begun)
        move_to_returns(table, counts, seen, rule, first_visit=first_visit)
        yield table.q_NSA


def mc_basic(
    mdp: FiniteMDP, lane_keys: Sequence[int], *, length: int, episodes: int = 1
) -> Iterator[Float[Tensor, "N S A"]]:
    """Policy iteration without the model: q of every pair is the mean return of `episodes` episodes that begin with it,
    each cut after `length` steps; the next policy takes the first of the best.                           [Zhao 5.2]

    The first policy takes the first legal action.  Yields q of every policy (the learner's own tensor).  What is cut
    off is worth at most gamma^length times the largest value."""
    lanes, pairs = len(lane_keys), mdp.num_pairs
    walk = Walk(mdp, [derive_key(key, pair) for key in lane_keys for pair in range(pairs)], max_steps=length)
    lane_M = torch.arange(lanes).repeat_interleave(pairs)
    state_M, action_M = torch.from_numpy(mdp.state_N).repeat(lanes), torch.from_numpy(mdp.action_N).repeat(lanes)
    table = Table(lanes, mdp.num_states, mdp.num_actions)

    def choose(state_M: Tensor, noise_MW: Tensor) -> Tensor:
        return table.q_NSA[lane_M, state_M].masked_fill(~walk.tables.legal_SA[state_M], -torch.inf).argmax(-1)

    while True:
        return_M = torch.zeros(lanes * pairs, dtype=torch.float64)
        for _ in range(episodes):
            return_M += episode(walk, choose, start_N=state_M, first_action_N=action_M).return_TN[0] / episodes
        table.q_NSA[lane_M, state_M, action_M] = return_M
        yield table.q_NSA


def move_to_returns(values: Table, counts: Table, seen: Episode, rule: Rule, *, first_visit: bool) -> None:
    """Every visit of an episode (or the first ones) towards its return, one after another in time."""
    cell_TN = seen.state_TN * counts.q_NSA.shape[-1] + seen.action_TN
    wanted_TN = seen.alive_TN
    if first_visit:
        wanted_TN = wanted_TN & (first_times(cell_TN, seen.alive_TN) == torch.arange(len(cell_TN))[:, None])
    rows = zip(seen.state_TN, seen.action_TN, seen.return_TN, wanted_TN, strict=True)
    for state_N, action_N, return_N, wanted_N in rows:
        counts.add_(state_N, action_N, wanted_N.double())
        size_N = rule(worth.of_action(counts(state_N), action_N).clamp(min=1))
        now_N = worth.of_action(values(state_N), action_N)
        values.add_(state_N, action_N, torch.where(wanted_N, size_N * (return_N - now_N), 0.0))


def first_times(cell_TN: Int[Tensor, "T N"], alive_TN: Bool[Tensor, "T N"]) -> Int[Tensor, "T N"]:
    """When each row's cell was first visited by its lane."""
    length = len(cell_TN)
    time_TN = torch.where(alive_TN, torch.arange(length)[:, None], length)
    first_CN = torch.full((int(cell_TN.max()) + 1, cell_TN.shape[1]), length)
    return first_CN.scatter_reduce(0, cell_TN, time_TN, "amin").gather(0, cell_TN)
