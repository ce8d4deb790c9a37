"""Zhao's book, the figures with chance: many lanes of each, seeds fixed.  [Zhao 2025]"""

from collections.abc import Mapping
from functools import partial
from itertools import islice

import numpy as np
import torch

from rung.mdp import zoo
from rung.mdp.control import temporal_difference
from rung.mdp.figures.base import Figure, Maker, curves, episodes_of
from rung.mdp.figures.zhao import TERRIBLE, cells, rmse, td_features
from rung.mdp.finite import FiniteMDP, Floats
from rung.mdp.oracle import oracle, uniform
from rung.mdp.planning import solve
from rung.mdp.prediction import td_lambda
from rung.mdp.values import Linear, Table, fourier, per_action
from rung.mdp.walk import follow, keys
from rung.mdp.zoo.grids import ZHAO
from rung.objectives.optimisers import Rule, harmonic, robbins_monro


def roots() -> Figure:
    """Two roots.  The printed steps 1/k let the cubic run away: from 0 the first leads to 5, the second to -55."""
    lanes, steps = 100, 2000
    rng = np.random.default_rng(0)

    def cubic(w_N: torch.Tensor, _: int) -> torch.Tensor:
        return w_N**3 - 5 + torch.from_numpy(rng.normal(size=lanes))

    def tanh(w_N: torch.Tensor, _: int) -> torch.Tensor:
        return torch.tanh(w_N - 1)

    def smaller(count_N: torch.Tensor) -> torch.Tensor:
        return 1 / (count_N.double() + 9)

    def path(noisy, start: float, rule: Rule, count: int) -> Floats:  # type: ignore[no-untyped-def]
        begin_N = torch.full((lanes,), start, dtype=torch.float64)
        return np.array([w_N.numpy() for w_N in islice(robbins_monro(noisy, begin_N, rule), count)]).T

    found = {"w^3 - 5": path(cubic, 0.0, smaller, steps), "tanh(w - 1)": path(tanh, 3.0, harmonic(), steps)}
    astray = ~(abs(path(cubic, 0.0, harmonic(), 10)[:, -1]) < 100)
    return Figure(
        title="Section 6.2: the Robbins-Monro algorithm",
        settings=f"w^3 - 5 from 0, steps 1/(k + 9), noise N(0, 1), {lanes} lanes; tanh(w - 1) from 3, steps 1/k, no "
        f"noise; mean after {steps} steps",
        numbers={"cubic": found["w^3 - 5"][:, -1].mean(), "tanh": found["tanh(w - 1)"][:, -1].mean()},
        claims={"with the steps 1/k, from 0, the cubic runs away in nine lanes of ten": bool(astray.mean() > 0.9)},
        draw=curves({name: line[:, :100] for name, line in found.items()}, across="iteration", up="w"),
    )


def mean_estimation() -> Figure:
    """Descent towards the mean of some points, by samples and by batches of them."""
    lanes, steps, sizes = 200, 30, (1, 5, 50)
    points = np.random.default_rng(0).uniform(-10, 10, size=(100, 2))
    lines = {}
    for size in sizes:
        rng = np.random.default_rng(size)

        def noisy(w_N: torch.Tensor, _: int, rng: np.random.Generator = rng, size: int = size) -> torch.Tensor:
            return w_N - torch.from_numpy(points[rng.integers(100, size=(lanes, size))].mean(1).ravel())

        path = robbins_monro(noisy, torch.full((2 * lanes,), 50.0, dtype=torch.float64), harmonic())
        ways = np.array([next(path).numpy().reshape(lanes, 2) for _ in range(steps)])
        lines[f"m = {size}"] = np.linalg.norm(ways - points.mean(0), axis=2).T
    ends = [line[:, -1].mean() for line in lines.values()]
    return Figure(
        title="Figure 6.5: stochastic and mini-batch gradient descent",
        settings=f"100 points in a square of side 20, steps 1/k, batches of 1, 5, 50, from (50, 50); {lanes} lanes",
        claims={"larger batches end nearer to the mean": bool(ends[0] > 1.5 * ends[1] > 1.5 * 1.5 * ends[2])},
        draw=curves(lines, across="iteration", up="distance to the mean"),
    )


def walled_episodes(*, target_reward: float) -> FiniteMDP:
    """The grid whose episodes lead from (1,1) to the target; forbidden cells and walls cost 10, other steps 1."""
    lines = ZHAO.strip().splitlines()
    lines[0] = "S" + lines[0][1:]
    return zoo.grid(
        "\n".join(lines), 0.9, forbidden_reward=TERRIBLE, boundary_reward=TERRIBLE, other_reward=-1.0,
        target_reward=target_reward, target="end",
    )  # fmt: skip


def control(title: str, method: str, *, linear: bool = False) -> Figure:
    """Length of the episodes of a table (Figures 7.2, 7.3), or of Fourier features (8.9, 8.10)."""
    mdp = walled_episodes(target_reward=1.0 if linear else 0.0)
    lanes, count, step, longest = (10, 300, 0.001, 200) if linear else (20, 500, 0.1, None)
    features = per_action(fourier(cells(), 5), 5)
    values = [Linear(lanes, features) if linear else Table(lanes, 25, 5)]
    learner = temporal_difference(
        mdp, method, keys(1, lanes, method), step=step, epsilon=0.1, values=values, max_steps=longest
    )
    rewards_NE, lengths_NE = episodes_of(learner, lanes, count)
    claims = {
        "episodes become shorter": bool(lengths_NE[:, -50:].mean() < 0.5 * lengths_NE[:, :10].mean()),
        "episodes pay more": bool(rewards_NE[:, -50:].mean() > 0.5 * rewards_NE[:, :10].mean()),
    }
    if not linear:
        start = int(mdp.first_state_S.argmax())
        found = [oracle(mdp, q_SA.argmax(1)).v_S[start] for q_SA in values[0].table().numpy()]
        best = solve(mdp, epsilon=1e-9).v_S[start]
        claims["in most lanes the greedy policy is optimal from (1,1)"] = bool(np.median(found) > best - 1e-6)
    return Figure(
        title=title,
        settings=f"from (1,1) to the target; forbidden cells and walls -10, else -1, gamma 0.9, step {step}, epsilon "
        f"0.1, {count} episodes, {lanes} lanes"
        + (f"; Fourier features of order 5, episodes cut after {longest} steps" * linear),
        claims=claims,
        draw=curves({"length": lengths_NE}, across="episode", up="steps"),
    )


def off_policy() -> Figure:
    """Optimal values from one long uniform walk, from three first guesses."""
    mdp, lanes, starts = zoo.zhao(0.9), 8, (0, 10, 100)
    best_S = torch.from_numpy(solve(mdp, epsilon=1e-9).v_S)
    behaviour = follow(torch.from_numpy(mdp.table(uniform(mdp), fill=0.0)))
    values = Table(len(starts) * lanes, 25, 5, initial=np.repeat(starts, lanes)[:, None, None])
    learner = temporal_difference(
        mdp, "q_learning", keys(0, lanes) * len(starts), step=0.1, values=[values], behaviour=behaviour
    )
    every, errors = 1000, []
    for time in range(1, 100_001):
        next(learner)
        if time % every == 0:
            errors.append((values.q_NSA.amax(-1) - best_S).pow(2).mean(-1).sqrt().numpy())
    lines = dict(zip(starts, np.array(errors).T.reshape(len(starts), lanes, -1), strict=True))
    marks = [time // every - 1 for time in (10_000, 20_000, 50_000, 100_000)]
    return Figure(
        title="Figure 7.4: off-policy Q-learning",
        settings="gamma 0.9, uniform behaviour, step 0.1, all q from 0, 10 or 100; RMSE of the values after 10k, 20k, "
        f"50k and 100k steps, mean of {lanes} lanes (published: of 3)",
        numbers={f"from_{start}": line.mean(0)[marks] for start, line in lines.items()},
        claims={"all three end at the optimum": bool(max(line[:, -1].max() for line in lines.values()) < 0.1)},
        draw=curves(
            {f"from {start}": line for start, line in lines.items()},
            across="steps",
            up="RMSE",
            at=np.arange(every, 100_001, every),
        ),
    )


def linear_td() -> Figure:
    """Lanes on their way to the fixed points of `zhao.td_limits`."""
    mdp, lanes, steps, every = zoo.zhao(0.9), 10, 30_000, 1000
    truth, lines, limits = oracle(mdp, uniform(mdp)), {}, {}
    for name, features_SF in td_features().items():
        rng = np.random.default_rng(0)
        learner = td_lambda(
            mdp, uniform(mdp), keys(0, lanes, name), step=0.0005, features_SF=features_SF, max_steps=500,
            initial_NF=rng.normal(size=(lanes, features_SF.shape[1])),
        )  # fmt: skip
        errors = []
        for time in range(1, steps + 1):
            w_NF = next(learner).numpy()
            if time % every == 0:
                errors.append([rmse(features_SF @ w_F, truth.v_S) for w_F in w_NF])
        lines[name] = np.array(errors).T
        limits[name] = rmse(features_SF @ truth.fixed_point(features_SF), truth.v_S)
    return Figure(
        title="Figures 8.7 and 8.8: linear TD on its way",
        settings=f"gamma 0.9, uniform policy, step 0.0005, episodes of 500 steps, {steps} steps (in print 250 000), "
        f"{lanes} lanes, first weights N(0, 1); RMSE to the policy's values",
        claims={
            f"{name}: the error falls to less than half of what it was above its limit": bool(
                line[:, -1].mean() - limits[name] < 0.5 * (line[:, 0].mean() - limits[name])
            )
            for name, line in lines.items()
        },
        draw=curves(lines, across="steps", up="RMSE", at=np.arange(every, steps + 1, every)),
    )


def importance() -> Figure:
    """The mean of one coin from throws of another."""
    lanes, samples = 100, 200
    x_NT = np.where(np.random.default_rng(0).random((lanes, samples)) < 0.8, 1.0, -1.0)
    ratio_NT = np.where(x_NT == 1, 0.5 / 0.8, 0.5 / 0.2)
    count_T = np.arange(1, samples + 1)
    lines = {"plain": x_NT.cumsum(1) / count_T, "weighted": (ratio_NT * x_NT).cumsum(1) / count_T}
    return Figure(
        title="Figure 10.2: importance sampling",
        settings=f"+1 or -1 with p0 = (0.5, 0.5), from p1 = (0.8, 0.2); mean of {lanes} lanes of {samples} samples",
        numbers={name: line[:, -1].mean() for name, line in lines.items()},
        draw=curves(lines, across="samples", up="mean"),
    )


FIGURES: Mapping[str, Maker] = {
    "zhao_robbins_monro": roots,
    "zhao_6_5": mean_estimation,
    "zhao_7_2": partial(control, "Figure 7.2: Sarsa", "sarsa"),
    "zhao_7_3": partial(control, "Figure 7.3: Q-learning", "q_learning"),
    "zhao_7_4": off_policy,
    "zhao_8_7": linear_td,
    "zhao_8_9": partial(control, "Figure 8.9: Sarsa with Fourier features", "sarsa", linear=True),
    "zhao_8_10": partial(control, "Figure 8.10: Q-learning with Fourier features", "q_learning", linear=True),
    "zhao_10_2": importance,
}
