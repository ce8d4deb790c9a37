"""Exact expectations of linear learners, which the means over many lanes are held to.

One step of a linear learner is y <- K y: y holds its weights, what it keeps besides, and a 1; K depends on the
transition and the episode so far.  So E[y; episode so far] moves linearly, and is iterated: nothing is assumed
independent, and no step is called small.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rung.mdp import finite
from rung.mdp.finite import FiniteMDP


@dataclass(frozen=True)
class Seen:
    """A transition, with the pairs of its episode so far, its own last."""

    pairs: tuple[int, ...]
    reward: float
    discount: float
    there: int


def layers(seed: int = 0) -> FiniteMDP:
    """Two first states, two second ones, two third ones, an end; two actions, all chances and rewards drawn."""
    rng = np.random.default_rng(seed)
    prob, reward = np.zeros((7, 2, 7)), rng.normal(size=(7, 2))
    for state in range(6):
        after = [6] if state >= 4 else [2 * (state // 2) + 2, 2 * (state // 2) + 3]
        prob[state][:, after] = rng.dirichlet(np.ones(len(after)), size=2)
    legal_SA = np.arange(7)[:, None].repeat(2, axis=1) < 6
    return finite.from_arrays(prob, reward, 0.9, legal_SA=legal_SA, start_S=np.r_[0.6, 0.4, np.zeros(5)])


def expected(
    mdp: FiniteMDP,
    behaviour_N: np.ndarray,
    step_of: Callable[[Seen], np.ndarray],
    begin_Y: np.ndarray,
    steps: int,
    *,
    remembers: bool = True,
) -> np.ndarray:
    """E[y] after so many steps, from begin_Y, whose last entry is 1.

    remembers: K depends on the whole episode, of which there must be finitely many; else on the transition alone."""
    begins = {(int(s),): float(p) for s, p in enumerate(mdp.first_state_S) if p > 0}
    places, edges = {node: k for k, node in enumerate(begins)}, []
    todo = list(places)
    while todo:
        node = todo.pop()
        state = node[-1]
        for pair in range(mdp.first_S1[state], mdp.first_S1[state + 1]):
            for m in range(mdp.row_N1[pair], mdp.row_N1[pair + 1]):
                there, chance = int(mdp.next_M[m]), float(behaviour_N[pair] * mdp.prob_M[m])
                ends, past = bool(mdp.terminal_S[there]), (*node[:-1], pair) if remembers else ()
                seen = Seen(past or (pair,), float(mdp.reward_N[pair]), 0.0 if ends else mdp.gamma, there)
                for to, share in begins.items() if ends else {(*past, there): 1.0}.items():
                    if to not in places:
                        places[to] = len(places)
                        todo.append(to)
                    edges.append((places[node], places[to], chance * share, step_of(seen)))
    size = len(begin_Y)
    move_KK, mean_HY = np.zeros((len(places) * size,) * 2), np.zeros((len(places), size))
    for start, to, chance, step in edges:
        move_KK[to * size : (to + 1) * size, start * size : (start + 1) * size] += chance * step
    for node, chance in begins.items():
        mean_HY[places[node]] = chance * begin_Y
    mean_HY = (np.linalg.matrix_power(move_KK, steps) @ mean_HY.ravel()).reshape(-1, size)
    assert abs(mean_HY[:, -1].sum() - 1) < 1e-9
    return mean_HY.sum(0)
