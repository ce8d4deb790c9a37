"""Grid worlds, drawn from lines of text:   .  free    #  forbidden    T  target    S  free, and the first state

Zhao's book uses three conventions, and does not always say which; each is an option here, and a figure names its own:

    forbidden  "enter": a forbidden cell can be entered, and each entry is paid forbidden_reward (the book's text)
               "block": the agent stays where it was, and is paid the same (the book's Python code)
    bump       "boundary": a step against the border is paid boundary_reward, wherever the agent stands
               "both": standing on a forbidden cell, it is paid forbidden_reward beside it (Figs 5.6 and 5.7)
    target     "continue": the episode goes on, target_reward is paid for every step that ends on the target
               "end": entering the target ends the episode                       [Zhao 2025, sections 1 and 3.5]
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from rung.core.errors import ConfigError
from rung.mdp.finite import FiniteMDP, from_function

Cell = tuple[int, int]
MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1), "stay": (0, 0)}
FOUR = ("up", "right", "down", "left")
FIVE = (*FOUR, "stay")
MARKS = {"#": " forbidden", "T": " target"}  # in the names of states
ZHAO = """
.....
.##..
..#..
.#T#.
.#...
"""


def grid(
    text: str,
    gamma: float = 0.9,
    *,
    other_reward: float = 0.0,
    boundary_reward: float = -1.0,
    forbidden_reward: float = -1.0,
    target_reward: float = 1.0,
    forbidden: str = "enter",
    bump: str = "boundary",
    target: str = "continue",
    actions: Sequence[str] = FIVE,
    slip: float = 0.0,
) -> FiniteMDP:
    """A grid world; states are cells row by row, named "(row,column)" from 1.

    slip: probability of each of the two directions beside the chosen one.  Raises ConfigError for a text that is no
    grid."""
    cells = _cells(text)
    if not 0 <= 2 * slip <= 1:
        raise ConfigError(f"slip is the chance of each of two sides, 0 to 0.5; got {slip}")
    for name, value, known in (
        ("forbidden", forbidden, ("enter", "block")),
        ("bump", bump, ("boundary", "both")),
        ("target", target, ("continue", "end")),
    ):
        if value not in known:
            raise ConfigError(f"{name} is one of {known}; got {value!r}")
    if unknown := set(actions) - set(MOVES):
        raise ConfigError(f"actions are among {tuple(MOVES)}; got {sorted(unknown)}")

    def moved(cell: Cell, direction: str) -> tuple[Cell, float]:
        there = (cell[0] + MOVES[direction][0], cell[1] + MOVES[direction][1])
        if there not in cells:
            inside = forbidden_reward if bump == "both" and cells[cell] == "#" else 0.0
            return cell, boundary_reward + inside
        if cells[there] == "#":
            return (cell if forbidden == "block" else there), forbidden_reward
        return there, target_reward if cells[there] == "T" else other_reward

    def outcomes(cell: Cell) -> Mapping[str, list[tuple[float, Cell, float]]]:
        if target == "end" and cells[cell] == "T":
            return {}
        return {
            action: [(chance, *moved(cell, direction)) for direction, chance in _slipping(action, slip)]
            for action in actions
        }

    starts = [cell for cell, mark in cells.items() if mark == "S"]
    return _named(outcomes, cells, gamma, starts)


def special_grid(gamma: float = 0.9) -> FiniteMDP:
    """Sutton & Barto's example 3.5: every action in (1,2) leads to (5,2) and pays 10, in (1,4) to (3,4) and pays 5."""
    cells = _cells("\n".join(["....."] * 5))
    jumps = {(0, 1): ((4, 1), 10.0), (0, 3): ((2, 3), 5.0)}

    def outcomes(cell: Cell) -> Mapping[str, list[tuple[float, Cell, float]]]:
        return {action: [(1.0, *jumps.get(cell, _step(cells, cell, action)))] for action in FOUR}

    def _step(cells: Mapping[Cell, str], cell: Cell, action: str) -> tuple[Cell, float]:
        there = (cell[0] + MOVES[action][0], cell[1] + MOVES[action][1])
        return (there, 0.0) if there in cells else (cell, -1.0)

    return _named(outcomes, cells, gamma, [])


def square(size: int = 4) -> FiniteMDP:
    """Sutton & Barto's example 4.1: a step costs 1, two opposite corners end; gamma is 1."""
    cells = _cells("\n".join(["." * size] * size))
    ends = {(0, 0), (size - 1, size - 1)}

    def outcomes(cell: Cell) -> Mapping[str, list[tuple[float, Cell, float]]]:
        return {} if cell in ends else {action: [(1.0, _kept(cells, cell, MOVES[action]), -1.0)] for action in FOUR}

    return _named(outcomes, cells, 1.0, [])


def windy(wind: Sequence[int] = (0, 0, 0, 1, 1, 1, 2, 2, 1, 0), rows: int = 7) -> FiniteMDP:
    """Sutton & Barto's example 6.5: each column blows upward; a step costs 1, from (4,1) to (4,8); gamma is 1."""
    columns = len(wind)
    cells = _cells("\n".join(["." * columns] * rows))
    goal = (3, 7)

    def outcomes(cell: Cell) -> Mapping[str, list[tuple[float, Cell, float]]]:
        if cell == goal:
            return {}
        found = {}
        for action in FOUR:
            row, column = cell[0] + MOVES[action][0] - wind[cell[1]], cell[1] + MOVES[action][1]
            found[action] = [(1.0, (min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)), -1.0)]
        return found

    return _named(outcomes, cells, 1.0, [(3, 0)])


def cliff(rows: int = 4, columns: int = 12) -> FiniteMDP:
    """Sutton & Barto's example 6.6: from one lower corner to the other along a cliff; a fall costs 100, and back."""
    start, goal = (rows - 1, 0), (rows - 1, columns - 1)
    cells = {
        cell: mark
        for cell, mark in _cells("\n".join(["." * columns] * rows)).items()
        if not _falls(cell, rows, columns)
    }

    def outcomes(cell: Cell) -> Mapping[str, list[tuple[float, Cell, float]]]:
        if cell == goal:
            return {}
        found = {}
        for action in FOUR:
            there = (cell[0] + MOVES[action][0], cell[1] + MOVES[action][1])
            if _falls(there, rows, columns):
                found[action] = [(1.0, start, -100.0)]
            else:
                found[action] = [(1.0, there if there in cells else cell, -1.0)]
        return found

    return _named(outcomes, cells, 1.0, [start])


def _falls(cell: Cell, rows: int, columns: int) -> bool:
    return cell[0] == rows - 1 and 0 < cell[1] < columns - 1


def _cells(text: str) -> dict[Cell, str]:
    """Mark of every cell of a drawing, row by row."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if not lines or len({len(line) for line in lines}) != 1:
        raise ConfigError("a grid is drawn in lines of equal length")
    if unknown := set("".join(lines)) - set(".#TS"):
        raise ConfigError(f"a grid is drawn with . # T S; found {sorted(unknown)}")
    return {(row, column): mark for row, line in enumerate(lines) for column, mark in enumerate(line)}


def _slipping(action: str, slip: float) -> list[tuple[str, float]]:
    if not slip or action == "stay":
        return [(action, 1.0)]
    turn = FOUR.index(action)
    return [(action, 1 - 2 * slip), (FOUR[(turn + 1) % 4], slip), (FOUR[(turn - 1) % 4], slip)]


def _kept(cells: Mapping[Cell, str], cell: Cell, move: Cell) -> Cell:
    there = (cell[0] + move[0], cell[1] + move[1])
    return there if there in cells else cell


def _named(outcomes, cells: Mapping[Cell, str], gamma: float, starts: list[Cell]) -> FiniteMDP:  # type: ignore[no-untyped-def]
    start = {cell: 1 / len(starts) for cell in starts} or None
    mdp = from_function(outcomes, list(cells), gamma, start=start)
    assert mdp.num_states == len(cells)
    return replace(mdp, state_names=[f"({row + 1},{col + 1}){MARKS.get(m, '')}" for (row, col), m in cells.items()])


zhao = partial(grid, ZHAO)  # the 5 x 5 grid of Zhao's book; gamma and options as of `grid`


def places(mdp: FiniteMDP) -> tuple[np.ndarray, list[str]] | None:
    """Row and column of every state of a grid world, [S, 2] from 0, and its mark (". # T"); None for other models."""
    found = [re.fullmatch(r"\(([1-9]\d*),([1-9]\d*)\)( forbidden| target)?", name) for name in mdp.state_names]
    if not found or None in found or not set(mdp.action_names) <= set(MOVES):
        return None
    back = {words: mark for mark, words in MARKS.items()}
    cells = [(int(m[1]) - 1, int(m[2]) - 1) for m in found if m]
    return np.array(cells), [back.get(m[3], ".") for m in found if m]
