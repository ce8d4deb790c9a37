"""Models drawn from a seed, of any size: Garnets and mazes, written straight into sparse arrays."""

import hashlib

import numpy as np

from rung.core.errors import ConfigError
from rung.mdp.checks import room_for
from rung.mdp.finite import FiniteMDP, Ints

SIDES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # up, right, down, left


def garnet(states: int, actions: int, branching: int, *, gamma: float, seed: int = 0) -> FiniteMDP:
    """Random model: each pair leads to `branching` distinct states with cut-uniform chances; rewards are N(0, 1).

    [Archibald, McKinnon & Thomas 1995]"""
    if not 1 <= branching <= states:
        raise ConfigError(f"a pair leads to 1 to {states} distinct states; branching is {branching}")
    room_for(states, pairs=actions, outcomes=branching)
    rng = np.random.default_rng(seed)
    pairs = states * actions
    next_NB = rng.integers(states, size=(pairs, branching), dtype=np.int32)
    while True:  # draw again where a row names a state twice
        twice_N = (np.diff(np.sort(next_NB, axis=1), axis=1) == 0).any(1)
        if not twice_N.any():
            break
        next_NB[twice_N] = rng.integers(states, size=(int(twice_N.sum()), branching), dtype=np.int32)
    cuts_NB = np.sort(rng.random((pairs, branching - 1)), axis=1)
    edges_NB = np.concatenate((np.zeros((pairs, 1)), cuts_NB, np.ones((pairs, 1))), axis=1)
    return FiniteMDP(
        first_S1=np.arange(0, pairs + 1, actions),
        action_N=np.tile(np.arange(actions), states),
        row_N1=np.arange(0, pairs * branching + 1, branching),
        next_M=next_NB.ravel(),
        prob_M=np.diff(edges_NB, axis=1).ravel(),
        reward_N=rng.normal(size=pairs),
        gamma=gamma,
        num_actions=actions,
    )


def maze(rows: int, columns: int, *, gamma: float = 0.999, slip: float = 0.1, seed: int = 0) -> FiniteMDP:
    """A perfect maze of rows x columns cells, carved by a seeded depth-first walk: one way from any cell to any other.

    Four actions, `slip` to each side of the chosen one; a wall keeps you where you are; every step costs 1, the last
    cell is the goal and ends."""
    _check_size(rows, columns)
    open_S4 = _carved(rows, columns, seed)
    return _walled(open_S4, rows * columns - 1, columns, gamma, slip)


def open_maze(
    rows: int, columns: int, *, walls: float = 0.25, gamma: float = 0.999, slip: float = 0.1, seed: int = 0
) -> FiniteMDP:
    """Cells that are walls with chance `walls`; of what is left the largest connected part, its last cell the goal."""
    from scipy.ndimage import label

    _check_size(rows, columns)
    rng = np.random.default_rng(seed)
    free = rng.random((rows, columns)) >= walls
    parts, count = label(free)
    largest = parts == 1 + int(np.bincount(parts[free] - 1, minlength=count).argmax())
    number = np.full((rows + 2, columns + 2), -1)
    number[1:-1, 1:-1][largest] = np.arange(int(largest.sum()))
    row_S, column_S = largest.nonzero()
    beside_S4 = np.stack([number[row_S + 1 + dr, column_S + 1 + dc] for dr, dc in SIDES], axis=1)
    return _from_neighbours(beside_S4, len(row_S) - 1, gamma, slip)


def _check_size(rows: int, columns: int) -> None:
    if rows < 1 or columns < 1 or rows * columns < 2:
        raise ConfigError(f"a maze has at least two cells; got {rows} x {columns}")
    room_for(rows * columns, pairs=4, outcomes=3)


def hash_of(mdp: FiniteMDP) -> str:
    """Names the transition matrix of a generated model, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (mdp.row_N1.astype(np.int64), mdp.next_M.astype(np.int64), mdp.prob_M.astype(np.float64)):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _carved(rows: int, columns: int, seed: int) -> np.ndarray:
    """Which sides of each cell are open, [S, 4]: depth-first from cell 0, compiled."""
    from rung.mdp.kernels import carve

    rng = np.random.default_rng(seed)
    order_S4 = np.argsort(rng.random((rows * columns, 4), dtype=np.float32), axis=1).astype(np.int8)
    open_S4 = np.zeros((rows * columns, 4), np.bool_)
    carve(rows, columns, order_S4, open_S4)
    return open_S4


def _walled(open_S4: np.ndarray, goal: int, columns: int, gamma: float, slip: float) -> FiniteMDP:
    cells = np.arange(len(open_S4))
    offsets = np.array([-columns, 1, columns, -1])
    return _from_neighbours(np.where(open_S4, cells[:, None] + offsets, -1), goal, gamma, slip)


def _from_neighbours(beside_S4: Ints, goal: int, gamma: float, slip: float) -> FiniteMDP:
    """beside_S4: the cell on each side, -1 where there is a wall.  A pair has three outcomes: straight, right, left."""
    states = len(beside_S4)
    there_S4 = np.where(beside_S4 < 0, np.arange(states)[:, None], beside_S4).astype(np.int32)
    turns = np.array([[0, 1, 3], [1, 2, 0], [2, 3, 1], [3, 0, 2]])  # straight, right and left of each action
    acting = np.delete(np.arange(states), goal)
    next_M = there_S4[acting][:, turns].ravel()
    pairs = 4 * len(acting)
    counts = np.full(states, 4)
    counts[goal] = 0
    return FiniteMDP(
        first_S1=np.concatenate(([0], np.cumsum(counts))),
        action_N=np.tile(np.arange(4), len(acting)),
        row_N1=np.arange(0, 3 * pairs + 1, 3),
        next_M=next_M,
        prob_M=np.tile([1 - 2 * slip, slip, slip], pairs),
        reward_N=np.full(pairs, -1.0),
        gamma=gamma,
        num_actions=4,
        action_names=("up", "right", "down", "left"),
    )
