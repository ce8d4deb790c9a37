"""Values and policies as drawings: text for a terminal, SVG, PNG or GIF for a page.

A grid world is drawn as its grid: a number and the arrows of all optimal actions in each cell, forbidden cells grey,
the target green.  Any other model becomes a table of states.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rung.core.errors import ConfigError
from rung.mdp.finite import FiniteMDP, Floats, Number, Numbers
from rung.mdp.zoo.grids import MOVES, places

ARROWS = {"up": "↑", "right": "→", "down": "↓", "left": "←", "stay": "○"}
COLOURS = {"#": "#d9d9d9", "T": "#b7e1b0", ".": "#ffffff"}
ROWS = 20  # states of a table before the rest is counted only


def as_text(mdp: FiniteMDP, v_S: Floats, chosen_N: Numbers, *, digits: int = 2) -> str:
    """Values, and the actions of the pairs `chosen_N` [N of bool]."""
    actions = _actions(mdp, chosen_N)
    found = places(mdp)
    if found is None:
        lines = [
            f"{mdp.state_name(s):<24} {v_S[s]:12.{digits}f}  {', '.join(actions[s]) or '-'}"
            for s in range(min(mdp.num_states, ROWS))
        ]
        rest = mdp.num_states - len(lines)
        return "\n".join(lines + ([f"... and {rest:,} states more"] if rest else []))
    cells, marks = found
    shape = cells.max(0) + 1
    words = np.full(shape, "", dtype=object)
    for (row, column), mark, value, own in zip(cells, marks, v_S, actions, strict=True):
        arrows = "".join(ARROWS[action] for action in own)
        words[row, column] = f"{value:.{digits}f}{mark if mark != '.' else ''} {arrows}"
    width = max(len(word) for word in words.ravel())
    return "\n".join("  ".join(f"{word:<{width}}" for word in line).rstrip() for line in words)


def draw(
    mdp: FiniteMDP,
    v_S: Floats,
    chosen_N: Numbers,
    path: str | Path,
    *,
    title: str = "",
    trajectory: Sequence[int] = (),
) -> None:
    """A grid world with values, arrows and a trajectory of states, as SVG, PNG or PDF by the name's ending.

    Raises ConfigError for a model that is no grid."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "rung"}):
        figure, axes = _canvas(mdp)
        _paint(axes, mdp, v_S, chosen_N, title, trajectory)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if str(path).endswith(".svg") else None)


def animate(mdp: FiniteMDP, values: Iterable[Floats], path: str | Path, *, title: str = "sweep {}") -> None:
    """The values of one sweep after another, with their greedy actions, as a GIF."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    from rung.mdp.operators import q_values, ties

    frames = list(values)
    figure, axes = _canvas(mdp)

    def frame(number: int) -> list[Any]:
        axes.clear()
        chosen_N = ties(mdp, q_values(mdp, frames[number]))
        _paint(axes, mdp, frames[number], chosen_N, title.format(number), ())
        return []

    FuncAnimation(figure, frame, frames=len(frames)).save(path, writer=PillowWriter(fps=4))


def _canvas(mdp: FiniteMDP) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    found = places(mdp)
    if found is None:
        raise ConfigError("only grid worlds are drawn; this model's states have no places in a grid")
    rows, columns = found[0].max(0) + 1
    figure = Figure(figsize=(0.9 * columns + 0.3, 0.9 * rows + 0.5))
    return figure, figure.add_subplot()


def _paint(axes: Any, mdp: FiniteMDP, v_S: Floats, chosen_N: Numbers, title: str, trajectory: Sequence[int]) -> None:
    from matplotlib.patches import Rectangle

    found = places(mdp)
    assert found is not None
    cells, marks = found
    rows, columns = cells.max(0) + 1
    for (row, column), mark, value, own in zip(cells, marks, v_S, _actions(mdp, chosen_N), strict=True):
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=COLOURS[mark], edgecolor="#888888", linewidth=0.7))
        axes.text(column + 0.5, row + 0.8, f"{value:.1f}", ha="center", va="center", fontsize=8, color="#444444")
        for action in own:
            down, right = MOVES[action]
            if not (down or right):
                axes.plot(column + 0.5, row + 0.4, "o", markersize=7, markerfacecolor="none", color="#1f5fa8")
                continue
            axes.annotate(
                "",
                xy=(column + 0.5 + 0.3 * right, row + 0.4 + 0.3 * down),
                xytext=(column + 0.5, row + 0.4),
                arrowprops={"arrowstyle": "->", "color": "#1f5fa8"},
            )
    if len(trajectory):
        way = cells[np.asarray(trajectory)] + 0.5
        axes.plot(way[:, 1], way[:, 0], color="#c0392b", linewidth=1.5, alpha=0.8)
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", title=title)
    axes.axis("off")


def curves(
    lines: dict[str, Numbers],
    path: str | Path,
    *,
    across: str,
    up: str,
    at: Numbers | None = None,
    within: tuple[Number, Number] | None = None,
    title: str = "",
) -> None:
    """Mean lines with a band of two standard errors, one for each name: an array [lanes, points] or [points].

    The points lie at `at` [points], or at 1, 2, 3, ...; what leaves `within` (lowest, highest) is cut off."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 3.6))).add_subplot()
    for name, values in lines.items():
        points = np.atleast_2d(np.asarray(values, dtype=float))
        mean, x = points.mean(0), np.arange(1, points.shape[1] + 1) if at is None else np.asarray(at)
        error = 2 * points.std(0, ddof=1) / np.sqrt(len(points)) if len(points) > 1 else np.zeros_like(mean)
        axes.plot(x, mean, "o-" if len(x) <= 10 else "-", label=name)
        axes.fill_between(x, mean - error, mean + error, alpha=0.2)
    axes.set(xlabel=across, ylabel=up, title=title, ylim=within)
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight")


def _actions(mdp: FiniteMDP, chosen_N: Numbers) -> list[list[str]]:
    """Names of the chosen actions of every state."""
    names = mdp.action_names or [str(action) for action in range(mdp.num_actions)]
    found: list[list[str]] = [[] for _ in range(mdp.num_states)]
    for pair in np.flatnonzero(np.asarray(chosen_N)):
        found[mdp.state_N[pair]].append(names[mdp.action_N[pair]])
    return found
