"""Sutton & Barto's book, the figures with chance: many lanes of each, seeds fixed.  [Sutton & Barto 2018]"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rung.mdp import prediction, zoo
from rung.mdp.control import temporal_difference
from rung.mdp.figures.base import Figure, Maker, curves, episodes_of
from rung.mdp.figures.sutton_barto import among_ties, best_of_corridor, corridor_oracle
from rung.mdp.finite import FiniteMDP, Floats, Numbers
from rung.mdp.operators import policy_matrix, policy_of
from rung.mdp.oracle import epsilon_soft_optimum, oracle, uniform
from rung.mdp.planning import solve
from rung.mdp.policy_gradient import reinforce
from rung.mdp.walk import Walk, keys
from rung.objectives.optimisers import Rule

LARGEST_ERROR = 1e6  # what has diverged counts as so much


def side_by_side(sizes: Sequence[float], lanes: int, *names: int | str) -> tuple[list[int], Rule]:
    """`lanes` seeds for every step size, the same seeds for each: keys and a rule for all of them at once."""
    size_N = torch.tensor(sizes, dtype=torch.float64).repeat_interleave(lanes)
    return keys(0, lanes, *names) * len(sizes), lambda _: size_N


def errors_of(weights_NS: torch.Tensor, truth_S: torch.Tensor, acting_S: torch.Tensor) -> Floats:
    """RMSE of every lane's table over the acting states."""
    error_N = (weights_NS - truth_S)[:, acting_S].pow(2).mean(1).sqrt()
    return error_N.nan_to_num(nan=LARGEST_ERROR).clamp(max=LARGEST_ERROR).numpy()


def after_episodes(
    mdp: FiniteMDP, learner: Iterator[torch.Tensor], lane_keys: Sequence[int], count: int, *, each_step: bool
) -> Floats:
    """RMSE after each of the first `count` episodes of every lane, [lanes, count].

    each_step: the learner yields after every step; a walk with the same keys, which meets the same, knows the ends.
    The model has one action."""
    truth_S, acting_S = torch.from_numpy(oracle(mdp, uniform(mdp)).v_S), torch.from_numpy(~mdp.terminal_S)
    if not each_step:
        return np.array([errors_of(next(learner), truth_S, acting_S) for _ in range(count)]).T
    walk, only_N = Walk(mdp, lane_keys), torch.zeros(len(lane_keys), dtype=torch.int64)
    found_NE, done_N = np.zeros((len(lane_keys), count)), np.zeros(len(lane_keys), dtype=int)
    while done_N.min() < count:
        weights_NS, ended_N = next(learner), ~walk.step(only_N).same_N.numpy()
        lane = np.flatnonzero(ended_N & (done_N < count))
        found_NE[lane, done_N[lane]] = errors_of(weights_NS, truth_S, acting_S)[lane]
        done_N += ended_N
    return found_NE


def walk_of_five() -> Figure:
    """TD and Monte Carlo, by step size."""
    mdp, lanes, count, begin_S = zoo.random_walk(5), 100, 100, np.r_[np.full(5, 0.5), 0.0]
    lines: dict[str, Floats] = {}
    for name, sizes in (("TD", (0.05, 0.1, 0.15)), ("MC", (0.01, 0.02, 0.03, 0.04))):
        lane_keys, rule = side_by_side(sizes, lanes, "five")
        learn = prediction.td_lambda if name == "TD" else prediction.by_episodes
        learner = learn(mdp, uniform(mdp), lane_keys, step=rule, initial_NF=begin_S)
        errors_NE = after_episodes(mdp, learner, lane_keys, count, each_step=name == "TD")
        lines |= {
            f"{name}, {size}": line for size, line in zip(sizes, errors_NE.reshape(-1, lanes, count), strict=True)
        }
    best = {kind: min(line[:, 49].mean() for name, line in lines.items() if name[:2] == kind) for kind in ("TD", "MC")}
    return Figure(
        title="Example 6.2: TD(0) and constant-step Monte Carlo",
        settings=f"walk of 5 states, all values from 0.5, {lanes} lanes of {count} episodes",
        claims={"after 50 episodes the best TD is nearer than the best Monte Carlo": bool(best["TD"] < best["MC"])},
        draw=curves(lines, across="episodes", up="RMSE"),
    )


def batches() -> Figure:
    """TD and Monte Carlo on all episodes so far."""
    mdp, lanes, count, begin_S = zoo.random_walk(5), 50, 50, np.r_[np.full(5, 0.5), 0.0]
    lane_keys, lines = keys(0, lanes, "batch"), {}
    for name, method in (("batch TD", "td"), ("batch MC", "mc")):
        learner = prediction.batch(mdp, uniform(mdp), lane_keys, method=method, step=0.001, initial_NF=begin_S)  # type: ignore[arg-type]
        lines[name] = after_episodes(mdp, learner, lane_keys, count, each_step=False)
    late = {name: line[:, 20:].mean() for name, line in lines.items()}
    return Figure(
        title="Figure 6.2: batch TD and batch Monte Carlo",
        settings=f"walk of 5 states, step 0.001 until updates are small, {lanes} lanes of {count} episodes",
        claims={"batch TD is nearer than batch Monte Carlo": bool(late["batch TD"] < late["batch MC"])},
        draw=curves(lines, across="episodes", up="RMSE"),
    )


def windy() -> Figure:
    """Episodes over time."""
    mdp, lanes, steps = zoo.windy(), 20, 12_000
    learner = temporal_difference(mdp, "sarsa", keys(0, lanes, "windy"), step=0.5, epsilon=0.1)
    ended_NT = np.array([(~next(learner).step.same_N).numpy() for _ in range(steps)]).T
    late = 2000 / ended_NT[:, -2000:].sum(1)
    careful = -float(mdp.first_state_S @ epsilon_soft_optimum(mdp, 0.1)[0])
    return Figure(
        title="Example 6.5: Sarsa in the wind",
        settings=f"step 0.5, epsilon 0.1, {steps} steps, {lanes} lanes",
        claims={
            f"the last episodes take at most 5 steps more than the best exploring policy's {careful:.1f}": bool(
                late.mean() < careful + 5
            )
        },
        draw=curves({"Sarsa": ended_NT.cumsum(1)[:, ::20]}, across="steps", up="episodes", at=np.arange(1, steps, 20)),
    )


def cliff() -> Figure:
    """Three learners, and the exact values they come to."""
    mdp, lanes, count = zoo.cliff(), 30, 400
    lines = {}
    for method in ("sarsa", "expected_sarsa", "q_learning"):
        learner = temporal_difference(mdp, method, keys(0, lanes, "cliff"), step=0.5, epsilon=0.1)
        lines[method], _ = episodes_of(learner, lanes, count)
    late = {method: line[:, -100:].mean() for method, line in lines.items()}
    around = oracle(mdp, 0.1 * uniform(mdp) + 0.9 * among_ties(mdp, solve(mdp, "policy", epsilon=1e-9))).objective
    careful = float(mdp.first_state_S @ epsilon_soft_optimum(mdp, 0.1)[0])
    return Figure(
        title="Example 6.6: Sarsa, expected Sarsa and Q-learning at the cliff",
        settings=f"step 0.5, epsilon 0.1, gamma 1, {count} episodes, {lanes} lanes",
        claims={
            "Q-learning earns less than Sarsa while it explores": bool(late["q_learning"] < late["sarsa"] - 10),
            "Q-learning comes to the exact value of exploring around the optimum, within 5": bool(
                abs(late["q_learning"] - around) < 5
            ),
            "expected Sarsa comes to the exact value of the best exploring policy, within 5": bool(
                abs(late["expected_sarsa"] - careful) < 5
            ),
        },
        draw=curves(lines, across="episode", up="sum of rewards", within=(-150, 0)),
    )


def cliff_by_steps() -> Figure:
    """Three learners, by step size."""
    mdp, lanes, count = zoo.cliff(), 20, 100
    sizes, lines = [0.1, 0.3, 0.5, 0.7, 0.9], {}
    for method in ("sarsa", "expected_sarsa", "q_learning"):
        lane_keys, rule = side_by_side(sizes, lanes, "interim")
        learner = temporal_difference(mdp, method, lane_keys, step=rule, epsilon=0.1)
        rewards_NE, _ = episodes_of(learner, len(lane_keys), count)
        lines[method] = rewards_NE.mean(1).reshape(len(sizes), lanes).T
    mean = {method: line.mean(0) for method, line in lines.items()}
    return Figure(
        title="Figure 6.3: interim performance at the cliff, by step size",
        settings=f"epsilon 0.1, mean of the first {count} episodes, {lanes} lanes; steps {', '.join(map(str, sizes))}",
        claims={
            "expected Sarsa earns more than Q-learning with every step size": bool(
                (mean["expected_sarsa"] > mean["q_learning"]).all()
            ),
            "expected Sarsa earns more than Sarsa with the steps 0.5 to 0.9": bool(
                (mean["expected_sarsa"] > mean["sarsa"])[2:].all()
            ),
        },
        draw=curves(lines, across="step size", up="sum of rewards", at=sizes, within=(-160, 0)),
    )


def bias() -> Figure:
    """How often left is gone, which pays less and may pay more."""
    mdp, lanes, count = zoo.maximization_bias(), 2000, 300
    left, lines = mdp.action_names.index("left"), {}
    first = int(mdp.first_state_S.argmax())
    for method in ("q_learning", "double_q"):
        learner = temporal_difference(mdp, method, keys(0, lanes, "bias"), step=0.1, epsilon=0.1)
        found_NE, done_N = np.zeros((lanes, count)), np.zeros(lanes, dtype=int)
        while done_N.min() < count:
            step = next(learner).step
            lane = np.flatnonzero((step.state_N.numpy() == first) & (done_N < count))
            found_NE[lane, done_N[lane]] = step.action_N.numpy()[lane] == left
            done_N += ~step.same_N.numpy()
        lines[method] = found_NE
    early = {method: line[:, 20:100].mean() for method, line in lines.items()}
    late = {method: line[:, -20:].mean() for method, line in lines.items()}
    return Figure(
        title="Example 6.7, figure 6.5: maximisation bias",
        settings=f"step 0.1, epsilon 0.1, {lanes} lanes; 5 % of left is the best; rewards of B have two values, mean "
        "-0.1, deviation 1",
        claims={
            "double Q goes left less often early on": bool(early["double_q"] < early["q_learning"] - 0.1),
            "double Q ends within 3 % of them, Q-learning further off": bool(
                abs(late["double_q"] - 0.05) < 0.03 < late["q_learning"] - 0.05
            ),
        },
        draw=curves(lines, across="episode", up="share of left"),
    )


def n_steps() -> Figure:
    """n-step TD, by n and step size."""
    mdp, lanes, sizes, lines = zoo.random_walk(19, low=-1.0), 50, (0.2, 0.4, 0.6, 0.8), {}
    lane_keys = keys(0, lanes, "nineteen")
    for n in (1, 2, 4, 8, 16):
        columns = []
        for size in sizes:
            learner = prediction.n_step_td(mdp, uniform(mdp), lane_keys, n=n, step=size)
            columns.append(after_episodes(mdp, learner, lane_keys, 10, each_step=True).mean(1))
        lines[f"n = {n}"] = np.array(columns).T
    best = {name: line.mean(0).min() for name, line in lines.items()}
    return Figure(
        title="Figure 7.2: n-step TD",
        settings=f"walk of 19 states, RMSE after each of the first 10 episodes, their mean, {lanes} lanes; step sizes "
        f"{', '.join(map(str, sizes))}",
        claims={
            "an intermediate n is better than 1 and than 16": bool(
                min(best["n = 2"], best["n = 4"]) < min(best["n = 1"], best["n = 16"])
            )
        },
        draw=curves(lines, across="step size", up="RMSE", at=sizes, within=(0.2, 0.55)),
    )


def bairds() -> Figure:
    """Off-policy divergence, and two cures."""
    mdp, x_SF = zoo.baird()
    solid = mdp.action_names.index("solid")
    policy_S, behaviour_N = np.full(7, solid), np.where(mdp.action_N == solid, 1 / 7, 6 / 7)
    begin_F = np.array([1, 1, 1, 1, 1, 1, 10, 1.0])
    lines = {}
    for name, method, step in (("semi-gradient TD", "semi_gradient", 0.01), ("TDC", "tdc", 0.005)):
        learner = prediction.off_policy_td(
            mdp, policy_S, behaviour_N, keys(0, 20, "baird"), method=method, step=step, second_step=0.05,  # type: ignore[arg-type]
            features_SF=x_SF, initial_NF=begin_F,
        )  # fmt: skip
        values = [next(learner).numpy() @ x_SF.T for _ in range(1000)]
        lines[name] = np.array([np.sqrt((v_NS**2).mean(1)) for v_NS in values]).T
    lines["emphatic TD, expected"] = np.array([expected_emphatic(mdp, policy_S, behaviour_N, x_SF, begin_F)])
    ends = {name: line[:, -1].mean() / line[:, 0].mean() for name, line in lines.items()}
    return Figure(
        title="Figures 11.2, 11.5 and 11.6: Baird's counter-example",
        settings="steps 0.01 (semi-gradient, 20 lanes), 0.005 and 0.05 (TDC, 20 lanes), 0.03 (emphatic TD, expected "
        "updates); root of the mean square of the values, which are all 0",
        claims={
            "semi-gradient TD diverges": bool(ends["semi-gradient TD"] > 10),
            "TDC comes nearer": bool(ends["TDC"] < 0.6),
            "emphatic TD comes nearer in expectation": bool(ends["emphatic TD, expected"] < 0.6),
        },
        draw=curves(lines, across="steps", up="RMS value", within=(0, 50)),
    )


def expected_emphatic(
    mdp: FiniteMDP, policy: Numbers, behaviour: Numbers, x_SF: Floats, w_F: Floats, *, step: float = 0.03
) -> list[float]:
    """Root of the mean square of the values in 1000 expected updates of emphatic TD.

    m <- d + gamma P_pi' m  (visits times emphasis),  w <- w + step X' diag(m) (r + gamma P_pi X w - X w)

    A sample path is no use here: the products of ratios have a huge variance.  [Sutton & Barto 11.8]"""
    matrix, reward_S = policy_matrix(mdp, policy_of(mdp, policy))
    visits_S, weight_S, found = oracle(mdp, behaviour).stationary_S, np.zeros(mdp.num_states), []
    for _ in range(1000):
        weight_S = visits_S + matrix.T @ weight_S
        w_F = w_F + step * x_SF.T @ (weight_S * (reward_S + matrix @ (x_SF @ w_F) - x_SF @ w_F))
        found.append(float(np.sqrt(np.mean((x_SF @ w_F) ** 2))))
    return found


def traces() -> Figure:
    """Three ways to average over n, by lambda."""
    mdp, lanes, sizes = zoo.random_walk(19, low=-1.0), 20, [0.2, 0.4, 0.6, 0.8, 1.0]
    lane_keys, rule = side_by_side(sizes, lanes, "nineteen")
    lambdas = (0.0, 0.4, 0.8, 0.95, 1.0)
    found: dict[str, list[Floats]] = {"off-line lambda-return": [], "TD(lambda)": [], "true online": []}
    for lambda_ in lambdas:
        options: dict[str, Any] = {"lambda_": lambda_, "step": rule}
        learners = {
            "off-line lambda-return": prediction.by_episodes(mdp, uniform(mdp), lane_keys, **options),
            "TD(lambda)": prediction.td_lambda(mdp, uniform(mdp), lane_keys, **options),
            "true online": prediction.td_lambda(mdp, uniform(mdp), lane_keys, true_online=True, **options),
        }
        for name, learner in learners.items():
            each_step = name != "off-line lambda-return"
            errors_NE = after_episodes(mdp, learner, lane_keys, 10, each_step=each_step)
            found[name].append(errors_NE.mean(1).reshape(len(sizes), lanes).mean(1))
    mean = {name: np.array(lines) for name, lines in found.items()}  # [lambdas, sizes]
    best = {name: table.min(1) for name, table in mean.items()}
    lines = {f"{name}, best size": line for name, line in best.items()}
    return Figure(
        title="Figures 12.3, 12.6 and 12.8: lambda-returns, traces, and the true online method",
        settings=f"walk of 19 states, RMSE after each of the first 10 episodes, their mean, {lanes} lanes; the best "
        f"of the steps 0.2 to 1 for lambda {', '.join(map(str, lambdas))}",
        claims={
            "with each an intermediate lambda is best": all(
                0 < line.argmin() < len(lambdas) - 1 for line in best.values()
            ),
            "with lambda 0, traces and the true online method are the same": bool(
                np.allclose(mean["TD(lambda)"][0], mean["true online"][0])
            ),
            "with traces, large steps diverge at lambda 0.95; the true online method stays below 0.6": bool(
                mean["TD(lambda)"][3, -1] > 0.6 > mean["true online"][3, -1]
            ),
        },
        draw=curves(lines, across="lambda", up="RMSE", at=lambdas, within=(0.2, 0.55)),
    )


def corridor() -> Figure:
    """REINFORCE, by the exact value of each lane's policy."""
    mdp, lanes, count, every = zoo.short_corridor(), 20, 500, 10
    learner = reinforce(
        mdp, keys(0, lanes, "corridor"), step=2**-13, groups_S=[0, 0, 0, 0], initial=[np.log(19.0), 0.0], max_steps=2000
    )
    right = mdp.action_names.index("right")
    values = []
    for number in range(count):
        chance_N = next(learner)[:, 0].softmax(-1)[:, right]
        if number % every == every - 1:
            values.append([corridor_oracle(chance).objective for chance in chance_N.tolist()])
    values_NE, best = np.array(values).T, corridor_oracle(best_of_corridor()).objective
    return Figure(
        title="Figure 13.1: REINFORCE in the short corridor",
        settings=f"step 2^-13, from 5 % of right, exact values of {lanes} lanes' policies",
        claims={"most come within 3 of the best mixture": bool(np.median(values_NE[:, -1]) > best - 3)},
        draw=curves(
            {"REINFORCE": values_NE, "best": np.full(values_NE.shape[1], best)},
            across="episodes",
            at=np.arange(every, count + 1, every),
            up="value of the start",
        ),
    )


FIGURES: Mapping[str, Maker] = {
    "sb_6_2": walk_of_five,
    "sb_6_2_batch": batches,
    "sb_6_5": windy,
    "sb_6_6": cliff,
    "sb_6_3": cliff_by_steps,
    "sb_6_7": bias,
    "sb_7_2": n_steps,
    "sb_11_2": bairds,
    "sb_12": traces,
    "sb_13_1": corridor,
}
