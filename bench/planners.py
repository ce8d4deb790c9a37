"""Sides of `bench.planning`: ours and the peers on the same raw arrays.

A turn builds its own model from the arrays, solves it and certifies what came out; compiling happens in turn 0.  Every
turn says how far its values are from a reference (by another method, to 1e-8, computed once), so that no side wins by
stopping early.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from rung.mdp import zoo
from rung.mdp.certificates import ending_pairs
from rung.mdp.finite import FiniteMDP
from rung.mdp.planning import solve

Turn = Callable[[int], Mapping[str, Any]]
EPSILON = 1e-6


def ours(spec: Mapping[str, Any]) -> Turn:
    """Rung's solver, from arrays to certified values; `anew`: from nothing, the drawing of the model included."""
    raw = None if spec.get("anew") else model(spec)

    def run() -> tuple[np.ndarray, dict[str, Any]]:
        if raw is None:
            mdp = getattr(zoo, spec["model"])(**spec["options"])
        else:
            mdp = FiniteMDP(**{name: getattr(raw, name) for name in raw.__dataclass_fields__})
        found = solve(mdp, epsilon=EPSILON)
        return found.v_S, {
            "iterations": found.iterations,
            "products": found.products,
            "policy_products": found.policy_products,
            "proved": found.error,
            "solver": found.method,
        }

    return _timed(run, spec)


def quantecon(spec: Mapping[str, Any]) -> Turn:
    """Modified policy iteration over a CSR matrix of pairs."""
    from quantecon.markov import DiscreteDP
    from scipy.sparse import csr_matrix

    raw = model(spec)

    def run() -> tuple[np.ndarray, dict[str, float]]:
        matrix = csr_matrix((raw.prob_M, raw.next_M, raw.row_N1), shape=(raw.num_pairs, raw.num_states))
        problem = DiscreteDP(raw.reward_N, matrix, raw.gamma, raw.state_N, raw.action_N)
        found = problem.solve(method="mpi", epsilon=2 * EPSILON, max_iter=10**6)
        return found.v, {"iterations": float(found.num_iter)}

    return _timed(run, spec)


def mdpsolver(spec: Mapping[str, Any]) -> Turn:
    """Modified policy iteration in C++, its input as lists."""
    import mdpsolver as package

    raw = model(spec)
    actions, branching = raw.num_actions, len(raw.next_M) // raw.num_pairs
    shape = (raw.num_states, actions, branching)

    def run() -> tuple[np.ndarray, dict[str, float]]:
        problem = package.model()
        problem.mdp(
            discount=raw.gamma,
            rewards=raw.reward_N.reshape(shape[:2]).tolist(),
            tranMatProbs=raw.prob_M.reshape(shape).tolist(),
            tranMatColumns=raw.next_M.reshape(shape).tolist(),
        )
        problem.solve(algorithm="mpi", tolerance=EPSILON, verbose=False)
        return np.array(problem.getValueVector()), {}

    return _timed(run, spec)


def pymdptoolbox(spec: Mapping[str, Any]) -> Turn:
    """Modified policy iteration, one CSR matrix an action."""
    from mdptoolbox.mdp import PolicyIterationModified
    from scipy.sparse import csr_matrix

    raw = model(spec)
    size = (raw.num_states, raw.num_states)

    def run() -> tuple[np.ndarray, dict[str, float]]:
        whole = csr_matrix((raw.prob_M, raw.next_M, raw.row_N1), shape=(raw.num_pairs, raw.num_states))
        matrices = [csr_matrix(whole[action :: raw.num_actions], shape=size) for action in range(raw.num_actions)]
        problem = PolicyIterationModified(
            matrices, raw.reward_N.reshape(-1, raw.num_actions), raw.gamma, epsilon=EPSILON
        )
        problem.run()
        return np.array(problem.V), {"iterations": float(problem.iter)}

    return _timed(run, spec)


def scipy_bicgstab(spec: Mapping[str, Any]) -> Turn:
    """Policy iteration whose evaluations are SciPy's BiCGSTAB with a warm start, as a user writes it down."""
    from scipy.sparse.linalg import bicgstab

    return _scipy(spec, lambda system, right_S, v_S: bicgstab(system, right_S, x0=v_S, rtol=0.0, atol=1e-10)[0])


def scipy_splu(spec: Mapping[str, Any]) -> Turn:
    """The same by SciPy's sparse LU, which a user would try next."""
    from scipy.sparse.linalg import splu

    return _scipy(spec, lambda system, right_S, v_S: splu(system.tocsc()).solve(right_S))


def _scipy(spec: Mapping[str, Any], evaluate: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]) -> Turn:
    """Policy iteration that begins where ours does, with the policy that goes to the goal; a tied action stays."""
    from scipy.sparse import csr_array, eye_array

    raw = model(spec)

    def run() -> tuple[np.ndarray, dict[str, float]]:
        states = raw.num_states
        matrix = raw.gamma * csr_array((raw.prob_M, raw.next_M, raw.row_N1), shape=(raw.num_pairs, states))
        acting = np.flatnonzero(~raw.terminal_S)
        starts = raw.first_S1[:-1][acting]
        pair_s, v_S, improvements = ending_pairs(raw)[acting], np.zeros(states), 0
        while True:
            chosen = matrix[pair_s]
            counts = np.zeros(states, np.int64)
            counts[acting] = np.diff(chosen.indptr)
            rows = csr_array((chosen.data, chosen.indices, np.insert(np.cumsum(counts), 0, 0)), shape=(states, states))
            reward_S = np.zeros(states)
            reward_S[acting] = raw.reward_N[pair_s]
            v_S = evaluate(eye_array(states, format="csr") - rows, reward_S, v_S)
            q_N = raw.reward_N + matrix @ v_S
            best_s = np.maximum.reduceat(q_N, starts)
            better = best_s > q_N[pair_s] + 1e-9
            improvements += 1
            if not better.any():
                return v_S, {"iterations": float(improvements)}
            greedy = np.flatnonzero(q_N == np.repeat(best_s, np.diff(raw.first_S1)[acting]))
            _, first = np.unique(raw.state_N[greedy], return_index=True)
            pair_s = np.where(better, greedy[first], pair_s)

    return _timed(run, spec)


@cache
def _made(name: str, options: tuple[tuple[str, Any], ...]) -> FiniteMDP:
    return getattr(zoo, name)(**dict(options))


def model(spec: Mapping[str, Any]) -> FiniteMDP:
    """The zoo's model of a specification, made once a process."""
    return _made(spec["model"], tuple(spec["options"].items()))


def _timed(run: Callable[[], tuple[np.ndarray, dict[str, Any]]], spec: Mapping[str, Any]) -> Turn:
    reference: list[np.ndarray] = []

    def turn(number: int) -> Mapping[str, Any]:
        if not reference and "reference" in spec:
            reference.append(solve(model(spec), spec["reference"], epsilon=1e-8).v_S)
        began = time.perf_counter()
        v_S, more = run()
        taken = time.perf_counter() - began
        off = float(abs(v_S - reference[0]).max()) if reference else float("nan")
        return {"seconds": taken, "off": off, **more}

    return turn


def q_learning(spec: Mapping[str, Any]) -> Turn:
    """Our learner on Taxi: lanes side by side, or (lanes 0) one compiled stream."""
    import gymnasium

    from rung.mdp.control import temporal_difference
    from rung.mdp.finite import from_gymnasium
    from rung.mdp.stream import q_learning as stream
    from rung.mdp.walk import keys

    mdp = from_gymnasium(gymnasium.make("Taxi-v4"), 0.99)

    def turn(number: int) -> Mapping[str, float]:
        lane_keys = keys(number, max(spec["lanes"], 1))
        began = time.perf_counter()
        if spec["lanes"]:
            learner = temporal_difference(mdp, "q_learning", lane_keys, step=0.1, epsilon=0.1, max_steps=200)
            for _ in range(spec["updates"] // spec["lanes"]):
                next(learner)
        else:
            stream(mdp, lane_keys[0], spec["updates"], step=0.1, epsilon=0.1, max_steps=200)
        return {"seconds": time.perf_counter() - began, "updates": spec["updates"]}

    return turn


def q_learning_bettermdptools(spec: Mapping[str, Any]) -> Turn:
    """bettermdptools' loop on the environment itself, for as many episodes as make up the updates."""
    import gymnasium
    from bettermdptools.algorithms.rl import RL

    def turn(number: int) -> Mapping[str, float]:
        environment = gymnasium.make("Taxi-v4")
        steps = 0
        plain = environment.step

        def counted(action: int) -> Any:
            nonlocal steps
            steps += 1
            return plain(action)

        environment.step = counted  # type: ignore[method-assign]
        began = time.perf_counter()
        RL(environment).q_learning(gamma=0.99, n_episodes=spec["episodes"])
        return {"seconds": time.perf_counter() - began, "updates": steps}

    return turn
