"""Where learners end: against the oracle's limit, within bounds that are derived here.

Means over lanes are held to expectations that are computed exactly (`expected.py`), within six estimated standard
errors: a normal number is that far away with chance 2e-9, and each test says how many numbers it compares.  What is
said of every single lane holds on every path, so that no seed can break it."""

import numpy as np
import pytest
import torch
from expected import Seen, expected, layers

from rung.mdp import prediction, zoo
from rung.mdp.control import NEXT_VALUES, mc_basic, monte_carlo, temporal_difference
from rung.mdp.finite import from_dict
from rung.mdp.operators import q_values
from rung.mdp.oracle import epsilon_soft_optimum, oracle, uniform
from rung.mdp.planning import solve
from rung.mdp.policy_gradient import actor_critic, reinforce
from rung.mdp.walk import Walk, follow, keys
from rung.objectives.optimisers import power

FOUR = ("up", "right", "down", "left")


def after(generator, count: int):
    for _ in range(count - 1):
        next(generator)
    return next(generator)


def one_step_of(method: str, mdp, x_SF, ratio_N, size: float, *, second: float = 0.0, lambda_: float = 0.0):
    """K of one step (`expected.py`) for y = (w, what is kept besides, 1); kept: the last w, or TDC's second weights."""
    count = x_SF.shape[1]
    w, kept, none_F = slice(count), slice(count, 2 * count), np.zeros(count)

    def step_of(seen: Seen) -> np.ndarray:
        x_TF, ratio_T = x_SF[mdp.state_N[list(seen.pairs)]], ratio_N[list(seen.pairs)]
        x_F, next_F, ratio = x_TF[-1], x_SF[seen.there], ratio_T[-1]
        error_Y = np.r_[seen.discount * next_F - x_F, none_F, seen.reward]
        step, trace_F, emphasis = np.eye(2 * count + 1), none_F, 1.0
        if method == "tdc":
            along_Y = np.r_[none_F, x_F, 0.0]
            step[w] += size * ratio * (np.outer(x_F, error_Y) - seen.discount * np.outer(next_F, along_Y))
            step[kept] += second * ratio * np.outer(x_F, error_Y - along_Y)
        elif method == "true online":
            for past_F in x_TF:
                fade = mdp.gamma * lambda_
                trace_F = fade * trace_F + size * (1 - fade * trace_F @ past_F) * past_F
            extra_Y = np.r_[x_F, -x_F * (len(x_TF) > 1), 0.0]
            step[kept] = step[w]
            step[w] += np.outer(trace_F, error_Y + extra_Y) - size * np.outer(x_F, extra_Y)
        else:
            for past_F, before in zip(x_TF, np.r_[0.0, ratio_T[:-1]], strict=True):
                trace_F = mdp.gamma * lambda_ * trace_F + past_F
                emphasis = 1 + mdp.gamma * before * emphasis
            push_F = {"td": trace_F, "semi_gradient": ratio * x_F, "etd": emphasis * ratio * x_F}[method]
            step[w] += size * np.outer(push_F, error_Y)
        return step

    return step_of


@pytest.mark.parametrize(
    ("method", "lambda_"),
    [("td", 0.0), ("td", 0.8), ("true online", 0.8), ("semi_gradient", 0.0), ("tdc", 0.0), ("etd", 0.0)],
)
def test_linear_learners_end_at_their_fixed_points(method, lambda_):
    """Two features for six states, 400 lanes of 900 steps: the mean is the exact one, within six standard errors (two
    numbers: 4e-9).  The exact mean of smaller steps comes to the fixed point of the right weighting (no chance).

    Catches: a ratio, an emphasis or a trace left out: another fixed point, which lies outside of the bound."""
    mdp = layers(4)
    x_SF = np.random.default_rng(104).normal(size=(7, 2)) * ~mdp.terminal_S[:, None]
    pi_N = np.random.default_rng(5).random(mdp.num_pairs)
    pi_N /= np.bincount(mdp.state_N, pi_N, minlength=7)[mdp.state_N]
    on_policy = method in ("td", "true online")
    b_N = pi_N if on_policy else uniform(mdp)
    matrix, reward_S = oracle(mdp, pi_N)._matrix
    matrix, often_S = matrix.toarray(), oracle(mdp, b_N).stationary_S
    emphatic_S = np.linalg.solve(np.eye(7) - matrix.T, often_S)

    def limit(lambda_: float, weight_S: np.ndarray) -> np.ndarray:
        left = x_SF.T @ np.diag(weight_S) @ np.linalg.inv(np.eye(7) - lambda_ * matrix)
        return np.linalg.solve(left @ (np.eye(7) - matrix) @ x_SF, left @ reward_S)

    def mean(size: float, steps: int) -> np.ndarray:
        step_of = one_step_of(method, mdp, x_SF, pi_N / b_N, size, second=5 * size, lambda_=lambda_)
        return expected(mdp, b_N, step_of, np.eye(5)[-1], steps)[:2]

    right_F = limit(lambda_, emphatic_S if method == "etd" else often_S)
    assert abs(mean(0.001, 90_000) - right_F).max() < 0.005
    options = {"step": 0.02, "features_SF": x_SF}
    if on_policy:
        options |= {"lambda_": lambda_, "true_online": method == "true online"}
        learner = prediction.td_lambda(mdp, pi_N, keys(7, 400), **options)
    else:
        learner = prediction.off_policy_td(mdp, pi_N, b_N, keys(7, 400), method=method, second_step=0.1, **options)
    found_NF = after(learner, 900)
    error_F = (found_NF.mean(0) - torch.from_numpy(mean(0.02, 900))).abs()
    bound_F = 6 * found_NF.std(0) / 400**0.5
    assert bool((error_F <= bound_F).all()), (error_F, bound_F)
    wrong = limit(0.8 - lambda_, often_S), limit(0.0, often_S if method == "etd" else emphatic_S)
    for other_F in (*wrong, oracle(mdp, uniform(mdp)).fixed_point(x_SF)):
        assert bool(((torch.from_numpy(other_F) - found_NF.mean(0)).abs() > bound_F).any())


@pytest.mark.parametrize("method", ["semi_gradient", "tdc"])
def test_semi_gradient_td_diverges_on_bairds_model_and_tdc_does_not(method):
    """Figures 11.2 and 11.5; all values are 0.  The exact mean of 4000 steps grows, or comes nearer (no chance);
    that of 1000 lanes after 200 steps is the exact one within six standard errors (8 numbers: 2e-8).

    Catches: the ratio or the correction of TDC left out; both exact means are then missed by far."""
    mdp, x_SF = zoo.baird()
    solid_N = (mdp.action_N == mdp.action_names.index("solid")).astype(float)
    behaviour_N = np.where(solid_N > 0, 1 / 7, 6 / 7)
    begin_F, size = np.array([1, 1, 1, 1, 1, 1, 10, 1.0]), 0.01 if method == "semi_gradient" else 0.005
    step_of = one_step_of(method, mdp, x_SF, solid_N / behaviour_N, size, second=0.05)

    def mean(steps: int) -> np.ndarray:
        return expected(mdp, behaviour_N, step_of, np.r_[begin_F, np.zeros(8), 1.0], steps, remembers=False)[:8]

    start, late = (float(((x_SF @ mean(steps)) ** 2).mean() ** 0.5) for steps in (0, 4000))
    assert late > 1e4 * start if method == "semi_gradient" else late < 0.5 * start
    options = {"features_SF": x_SF, "initial_NF": begin_F, "step": size, "second_step": 0.05}
    learner = prediction.off_policy_td(mdp, solid_N, behaviour_N, keys(10, 1000), method=method, **options)
    found_NF = after(learner, 200)
    error_F = (found_NF.mean(0) - torch.from_numpy(mean(200))).abs()
    assert bool((error_F <= 6 * found_NF.std(0) / 1000**0.5).all()), error_F


def table_of(mdp, v_S) -> torch.Tensor:
    return torch.from_numpy(mdp.table(q_values(mdp, v_S), fill=0.0))


@pytest.mark.parametrize("method", NEXT_VALUES)
def test_every_method_ends_at_its_own_optimum(method):
    """The slippery 2 x 2 world, gamma and epsilon 1/2, 32 lanes of 2000 steps of size k^-0.8: Q-learning and double Q
    come to q*, both Sarsas to the q of the best soft policy.  A bound for every lane and cell, on every path:

        q - limit = W + Z,   W += step (noise - W),   |Z| <= E,   E += step (discount * largest (|W| + E) there - E)

    where noise = reward + discount * (limit's value there) - limit: its mean is 0, so W dies out, and E after it, since
    a target contracts.  Sarsa's noise holds its draw of the next action too; double Q adds to E what its choice loses.
    No chance: |q - limit| <= |W| + E whatever the seed; the seeds decide only that it is small enough to exclude the
    other limit in every lane.  Catches: the next value of another method, a step that does not shrink."""
    mdp, lanes, epsilon, rule = zoo.grid(".#\n.T", 0.5, slip=0.05, target="end", actions=FOUR), 32, 0.5, power(0.8)
    soft_S, star_S = epsilon_soft_optimum(mdp, epsilon)[0], solve(mdp, epsilon=1e-12).v_S
    limit_S, other_S = (soft_S, star_S) if method.endswith("sarsa") else (star_S, soft_S)
    limit_SA, value_S, lane_N = table_of(mdp, limit_S), torch.from_numpy(limit_S), torch.arange(lanes)
    learner = temporal_difference(mdp, method, keys(1, lanes, method), step=rule, epsilon=epsilon)
    walk, last = Walk(mdp, keys(1, lanes, method)), 1 if method == "double_q" else 0
    q_KNSA = torch.zeros(last + 1, lanes, *limit_SA.shape, dtype=torch.float64)
    noise_KNSA, count_KNSA, rest_KNSA = q_KNSA.clone(), q_KNSA.clone(), limit_SA.abs() + q_KNSA
    waiting: list[tuple] = []  # the step before, until Sarsa's next action is known
    for _ in range(2000):
        coin_N = walk.noise_NW[:, 2] < 0.5
        news = next(learner)
        walk.step(news.step.action_N)
        for before, k_N, old_KNSA in waiting:
            there_N = before.next_state_N
            mine, next_NA = (k_N, lane_N, before.state_N, before.action_N), old_KNSA[k_N, lane_N, there_N]
            reach_NA = (noise_KNSA.abs() + rest_KNSA)[last - k_N, lane_N, there_N]
            noise_N = before.reward_N + before.discount_N * value_S[there_N] - limit_SA[before.state_N, before.action_N]
            far_N = reach_NA.amax(-1)
            if method == "sarsa":
                drawn_N = next_NA[lane_N, news.step.action_N]
                mean_N = (1 - epsilon) * next_NA.amax(-1) + epsilon * next_NA.mean(-1)
                noise_N += before.discount_N * (drawn_N - mean_N)
            if method == "double_q":
                chosen_N = next_NA.argmax(-1)
                far_N = reach_NA[lane_N, chosen_N] + value_S[there_N] - limit_SA[there_N, chosen_N]
            count_KNSA[mine] += 1
            noise_KNSA[mine] += rule(count_KNSA[mine]) * (noise_N - noise_KNSA[mine])
            rest_KNSA[mine] += rule(count_KNSA[mine]) * (before.discount_N * far_N - rest_KNSA[mine])
        waiting = [(news.step, torch.where(coin_N, 0, last), q_KNSA)]
        q_before, q_KNSA = q_KNSA, torch.stack([table.table() for table in news.values]).clone()
    bound_KNSA, acting_S = noise_KNSA.abs() + rest_KNSA, torch.from_numpy(~mdp.terminal_S)
    assert bool(((q_before - limit_SA).abs() <= bound_KNSA + 1e-12)[:, :, acting_S].all())
    apart_SA = (table_of(mdp, other_S) - limit_SA).abs()
    assert bool((bound_KNSA < apart_SA).flatten(2).any(-1).all())


@pytest.mark.parametrize("options", [{"epsilon": 1.0}, {"behaviour": "uniform"}])
def test_q_learning_with_step_one_comes_to_the_optimum_of_a_model_without_chance(options):
    """Any behaviour that tries everything.  A step of size 1 leaves the error gamma times the largest one there: a
    bound for every cell on every path (no chance); the seeds decide only that it is below 1e-4 after 4000 steps.

    Catches: a discount or a maximum left out, a behaviour that is not followed."""
    mdp = zoo.grid("..#\n.#.\n..T", 0.5, forbidden_reward=-10.0)
    if options == {"behaviour": "uniform"}:
        options = {"behaviour": follow(torch.from_numpy(mdp.table(uniform(mdp), fill=0.0))), "epsilon": 0.0}
    star_SA = table_of(mdp, solve(mdp, epsilon=1e-12).v_S)
    learner, lane_N = temporal_difference(mdp, "q_learning", keys(0, 2), step=1.0, **options), torch.arange(2)
    bound_NSA = star_SA.abs().repeat(2, 1, 1)
    for _ in range(4000):
        news = next(learner)
        there_NA = bound_NSA[lane_N, news.step.next_state_N]
        bound_NSA[lane_N, news.step.state_N, news.step.action_N] = news.step.discount_N * there_NA.amax(-1)
    assert bool(((news.q_NSA() - star_SA).abs() <= bound_NSA + 1e-9).all())
    assert float(bound_NSA.max()) < 1e-4


def test_double_q_has_no_bias_where_q_learning_has_one():
    """Example 6.7 by a uniform behaviour: all of B's actions are worth -0.1, and q starts at 0.

    When what is visited depends on no estimate, B's two tables are independent, and E[the other's q] is between -0.1
    and 0 for whatever one chooses; so is E[q(A, left)], which averages such targets.  The mean of 2000 lanes lies in
    there but for six standard errors (2e-9), and Q-learning's does not, by six more.  Catches: a table that believes
    its own choice, which is Q-learning."""
    mdp, lanes = zoo.maximization_bias(), 2000

    def of_left(method: str) -> tuple[float, float]:
        learner = temporal_difference(mdp, method, keys(2, lanes, method), step=0.1, epsilon=1.0)
        q_N = after(learner, 200).q_NSA()[:, 0, mdp.action_names.index("left")]
        return float(q_N.mean()), 6 * float(q_N.std()) / lanes**0.5

    mean, six = of_left("double_q")
    assert -0.1 - six <= mean <= six
    biased, six = of_left("q_learning")
    assert biased > 2 * six


def test_exploring_starts_find_the_optimum():
    """A leads on to B or ends, paying 0.4; B ends, paying 1 or 0.  20 lanes of 600 episodes, begun with any of 4 pairs.

    q(A, on) is 1 - k / m: of its m returns k are 0.  All of those come before B's good action was first tried; until
    then an episode is one of them with chance 1/8 (on, and a tie in B lost) and the last such with 3/8, so k >= 15 has
    chance 4^-15 = 1e-9.  m is binomial, of mean 150: m < 76 has chance exp(-2 74^2 / 600) = 1.2e-8 [Hoeffding].
    20 lanes: 3e-7.  Catches: play after the start that is not greedy (1/2 instead of 1), a start that is not tried."""
    second = {"on": [(1, None, 1.0)], "end": [(1, None, 0.0)]}
    mdp = from_dict({"A": {"on": [(1, "B", 0.0)], "end": [(1, None, 0.4)]}, "B": second}, 1.0, start={"A": 1.0})
    q_NSA = after(monte_carlo(mdp, keys(4, 20), exploring_starts=True), 600)
    assert torch.allclose(q_NSA[:, 0, 1], torch.tensor(0.4).double())
    assert bool((q_NSA[:, 1] == torch.tensor([1.0, 0.0])).all())
    assert float(q_NSA[:, 0, 0].min()) > 1 - 15 / 76


@pytest.mark.parametrize("name", ["reinforce", "actor_critic"])
def test_policy_gradients_come_to_the_better_of_two_arms(name):
    """One arm pays 1, the other 0; logits from 0, 20 lanes of 400 steps of size 1/2; a critic keeps the last reward.

    Only pulls of the good arm push, up, whose chance is therefore a known function of how many there were.  Each pull
    is one with chance >= 1/2, so fewer than 120 of 399 have chance exp(-2 79.5^2 / 399) = 1.8e-14 [Hoeffding]; of 20
    lanes 3.6e-13.  Catches: a push of the other sign or of half the size, an action that is not the sampled one."""
    mdp, size = from_dict({"A": {"good": [(1, None, 1.0)], "bad": [(1, None, 0.0)]}}, 1.0), 0.5
    if name == "reinforce":
        learner = reinforce(mdp, keys(5, 20), step=size)
    else:
        learner = actor_critic(mdp, keys(5, 20), step=size, critic_step=1.0)
    theta_NA, apart, at_least = after(learner, 400)[:, 0], 0.0, []
    for _ in range(400):
        at_least.append(apart)
        apart += 2 * size / (1 + np.exp(apart))
    found_N = (theta_NA[:, 0] - theta_NA[:, 1]).numpy()
    assert (abs(found_N[:, None] - np.array([*at_least, apart])).min(1) < 1e-9).all()  # whole pulls
    assert found_N.min() >= at_least[120 - 1]
    assert 1 / (1 + np.exp(-at_least[120 - 1])) > 0.99


@pytest.mark.parametrize("right", [0.2, 2 - 2**0.5, 0.8])
def test_reinforce_in_the_short_corridor_rises_towards_the_best_mixture_and_rests_there(right):
    """Example 13.1: all states look alike.  From p(right), one episode with a tiny step: the mean push of 10 000 lanes
    is dJ / d theta of the shared logit within six standard errors (2e-9); its sign leads to 2 - sqrt 2, where it is 0.

    Episodes end within 2000 steps but for 1e-9 a lane.  Catches: states that do not share, the swapped actions of the
    second state left out (dJ has another sign at 0.8), a return that misses its first rewards."""
    mdp, lanes, tiny = zoo.short_corridor(), 10_000, 1e-6
    start = np.log([1 - right, right])
    learner = reinforce(mdp, keys(2, lanes), step=tiny, groups_S=[0] * mdp.num_states, initial=start, max_steps=2000)
    push_N = (next(learner)[:, 0, 1] - start[1]) / tiny
    pi_N = np.where(mdp.action_N == 1, right, 1 - right)
    slope = float(oracle(mdp, pi_N).gradient_N[mdp.action_N == 1].sum())
    six = 6 * float(push_N.std()) / lanes**0.5
    assert abs(float(push_N.mean()) - slope) <= six + 1e-5
    assert (abs(slope) < 1e-9) if right == 2 - 2**0.5 else (slope * (2 - 2**0.5 - right) > 0 and abs(slope) > 2 * six)


def test_a_baseline_takes_variance_off_and_leaves_the_mean():
    """16 episodes with a tiny step; the last one's push, with a learnt baseline and without, of 6000 lanes each.

    Means differ by at most six standard errors (12 logits: 2.4e-8).  Squared deviations are means over lanes as well:
    theirs differ by twelve, where six would have shown a gain (2e-9).  Catches: a baseline that is learnt and not used,
    or used with the other sign, or learnt from the episode that it judges."""
    mdp, lanes, tiny = zoo.grid("S#\n.T", 0.9, slip=0.1, target="end", actions=FOUR), 6000, 1e-6

    def pushes(baseline_step: float) -> torch.Tensor:
        learner = reinforce(
            mdp, keys(1, lanes, str(baseline_step)), step=tiny, baseline_step=baseline_step, max_steps=25
        )
        before = after(learner, 15).clone()
        return ((next(learner) - before) / tiny)[:, :3]

    plain_NSA, based_NSA = pushes(0.0), pushes(0.2)
    six_SA = 6 * ((plain_NSA.var(0) + based_NSA.var(0)) / lanes).sqrt()
    assert bool(((plain_NSA.mean(0) - based_NSA.mean(0)).abs() <= six_SA + 1e-6).all())
    plain_N, based_N = ((x - x.mean(0)).square().sum((1, 2)) for x in (plain_NSA, based_NSA))
    six = 6 * float(((plain_N.var() + based_N.var()) / lanes).sqrt())
    assert float(plain_N.mean() - based_N.mean()) > 2 * six


def cut_short(mdp, q_SA: torch.Tensor, length: int) -> np.ndarray:
    """q of `length` steps under the first greedy policy of a table, [N]."""
    best_S = np.where(mdp.table(np.ones(mdp.num_pairs), fill=0.0) > 0, q_SA.numpy(), -np.inf).argmax(1)
    pi_N, v_S = (mdp.action_N == best_S[mdp.state_N]).astype(float), np.zeros(mdp.num_states)
    for _ in range(length - 1):
        v_S = np.bincount(mdp.state_N, pi_N * q_values(mdp, v_S), minlength=mdp.num_states)
    return q_values(mdp, v_S)


def test_mc_basic_without_chance_is_policy_iteration_with_returns_cut_short():
    """Zhao's world: every q is the exact one of 60 steps, the last policy's is within gamma^60 max |v*| of q*.

    No chance in model or policy.  Catches: a first action that is not taken, an episode of one step more or less."""
    mdp, length = zoo.zhao(0.9, forbidden_reward=-10.0), 60
    learner, before_SA = mc_basic(mdp, keys(0, 2), length=length), torch.zeros(25, 5)
    for _ in range(12):  # policies; the last change is the tenth
        q_NSA = next(learner)
        assert torch.equal(q_NSA[0], q_NSA[1])
        assert np.allclose(q_NSA[0].numpy(), mdp.table(cut_short(mdp, before_SA, length)), atol=1e-9)
        before_SA = q_NSA[0].clone()
    star = solve(mdp, epsilon=1e-12)
    error = float((q_NSA - table_of(mdp, star.v_S)).abs().max())
    assert 0.5 * 0.9**length * abs(star.v_S).max() < error <= 0.9**length * abs(star.v_S).max() + 1e-9


def test_mc_basic_estimates_returns_cut_short_without_bias():
    """With a slip, 1000 lanes of 2 episodes of 5 steps: the first policy's q within six standard errors (12: 2.4e-8).

    Catches: an episode of another length, a mean over other than the 2 episodes, lanes that see the same chance."""
    mdp, lanes = zoo.grid(".#\n.T", 0.9, slip=0.3, target="end", actions=FOUR), 1000
    q_NSA = next(mc_basic(mdp, keys(3, lanes), length=5, episodes=2))
    exact_SA = torch.from_numpy(mdp.table(cut_short(mdp, torch.zeros(4, 4), 5), fill=0.0))
    error_SA, bound_SA = (q_NSA.mean(0) - exact_SA).abs(), 6 * q_NSA.std(0) / lanes**0.5
    assert bool((error_SA <= bound_SA + 1e-12).all()), error_SA - bound_SA
    longer_SA = torch.from_numpy(mdp.table(cut_short(mdp, torch.zeros(4, 4), 6), fill=0.0))
    assert bool(((longer_SA - exact_SA).abs() > 2 * bound_SA).any())
