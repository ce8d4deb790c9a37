"""A figure: numbers that a book prints, claims that it makes, and a drawing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rung.mdp import pictures
from rung.mdp.control import Learning
from rung.mdp.finite import FiniteMDP, Floats, Number, Numbers
from rung.mdp.operators import policy_of

LETTERS = {"up": "U", "right": "R", "down": "D", "left": "L", "stay": "S"}

Draw = Callable[[Path], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Figure:
    """What was computed, without a look at what was published.

    numbers: under the names that they have in print: an array, a number, words, or again names and what they stand for
    claims:  sentences, and whether they hold here
    draw:    writes a picture
    """

    title: str
    settings: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    claims: Mapping[str, bool] = field(default_factory=dict)
    draw: Draw | None = None


Maker = Callable[[], Figure]


def rows(values_S: Floats) -> Floats:
    """One number for each cell of a square grid, as the grid is printed."""
    side = round(len(values_S) ** 0.5)
    return values_S.reshape(side, side)


def letters(mdp: FiniteMDP, chosen_N: Numbers) -> list[str]:
    """The chosen actions of every cell of a square grid, a line for each row: "D R D D DL"."""
    cells = [""] * mdp.num_states
    for pair in np.flatnonzero(np.asarray(chosen_N)):
        cells[mdp.state_N[pair]] += LETTERS[mdp.action_names[mdp.action_N[pair]]]
    side = round(len(cells) ** 0.5)
    return [" ".join(cells[at : at + side]) for at in range(0, len(cells), side)]


def grid_picture(mdp: FiniteMDP, v_S: Floats, policy: Numbers) -> Draw:
    """Draws a grid with values and the actions that a policy may take."""
    chosen_N = policy_of(mdp, policy) > 0

    def draw(path: Path) -> None:
        pictures.draw(mdp, v_S, chosen_N, path)

    return draw


def optimal_picture(mdp: FiniteMDP, v_S: Floats, optimal_N: Numbers) -> Draw:
    """Draws a grid with values and all these pairs."""

    def draw(path: Path) -> None:
        pictures.draw(mdp, v_S, optimal_N, path)

    return draw


def curves(
    lines: Mapping[str, Numbers],
    *,
    across: str,
    up: str,
    at: Numbers | None = None,
    within: tuple[Number, Number] | None = None,
) -> Draw:
    """Draws lines with their bands."""

    def draw(path: Path) -> None:
        pictures.curves(dict(lines), path, across=across, up=up, at=at, within=within)

    return draw


def episodes_of(learner: Iterator[Learning], lanes: int, count: int) -> tuple[Floats, Floats]:
    """Sum of rewards and length of the first `count` episodes of every lane, each [lanes, count]."""
    reward_NE, length_NE = np.zeros((lanes, count)), np.zeros((lanes, count))
    done_N = np.zeros(lanes, dtype=int)
    while done_N.min() < count:
        step = next(learner).step
        lane = np.flatnonzero(done_N < count)
        reward_NE[lane, done_N[lane]] += step.reward_N.numpy()[lane]
        length_NE[lane, done_N[lane]] += 1
        done_N += ~step.same_N.numpy()
    return reward_NE, length_NE
