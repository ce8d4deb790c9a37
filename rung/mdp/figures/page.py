"""One HTML page: every figure with what was computed beside what was published, and whether they agree.

A published number stands for what rounds to it: half a unit of its last digit is its slack.  A table of the file can
state another slack, for all numbers of a name or for one cell ("row,column" from 1).
"""

import html
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rung.core.errors import ConfigError, nearest
from rung.core.progress import Listener, Progress, silent
from rung.mdp.figures.base import Figure
from rung.mdp.figures.catalogue import FIGURES

PUBLISHED = Path(__file__).with_name("published.toml")
ABOUT = ("about", "slack", "for_tests")  # what a table of the file says beside its numbers
WHOLE = 0.05  # slack of a whole number: "10" stands among 5.8 and 6.2 for 10.0
ROUNDING = 1e-9  # of the computed number, where it lies half-way between two digits
LONGEST = 10  # numbers in a row of the page
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ddd; padding: 1rem 0 } .side { display: flex; gap: 2rem; flex-wrap: wrap }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td { padding: .1rem .5rem; text-align: right }
.ok { color: #1d7a3a } .bad { color: #b3261e; font-weight: bold } .said { color: #666 }
svg { max-width: 100%; height: auto }
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """What was computed under one name beside what was published; words agree when they are the same."""

    name: str
    computed: np.ndarray
    published: np.ndarray
    slack: np.ndarray

    @property
    def agrees(self) -> bool:
        if self.computed.shape != self.published.shape:
            return False
        if self.published.dtype.kind == "U":
            return bool((self.computed == self.published).all())
        return bool((abs(self.computed - self.published) <= self.slack + ROUNDING).all())

    @property
    def said(self) -> str:
        """How far apart they are."""
        if self.computed.shape != self.published.shape:
            return f"computed in the shape {self.computed.shape}, published in {self.published.shape}"
        if self.published.dtype.kind == "U":
            return "the same" if self.agrees else "not the same"
        return f"off by {float(abs(self.computed - self.published).max()):.2g} at most"


def write(folder: Path, listener: Listener = silent, *, only: str = "") -> tuple[Path, list[str]]:
    """Compute every figure (or those whose name contains `only`) and write the page; returns it, and what failed.

    Raises ConfigError where no figure has such a name."""
    asked = [name for name in FIGURES if only in name]
    if not asked:
        raise ConfigError(f"no figure's name contains {only!r}. {nearest(only, FIGURES)}")
    folder.mkdir(parents=True, exist_ok=True)
    published = read()
    sections, failed = [], [f"{name} is published, and no figure computes it" for name in forgotten(published)]
    for number, name in enumerate(asked):
        listener(Progress(stage="figures", done=number, total=len(asked)))
        with _one_thread():
            figure = FIGURES[name]()
        compared, unmatched = compare(figure, published.get(name, {}))
        wrong = [f"{c.name}: {c.said}" for c in compared if not c.agrees]
        wrong += unmatched + [claim for claim, holds in figure.claims.items() if not holds]
        failed += [f"{name}: {sentence}" for sentence in wrong]
        sections.append(_section(name, figure, compared, unmatched, folder))
    listener(Progress(stage="figures", done=len(asked), total=len(asked)))
    page = folder / "figures.html"
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Figures</title><style>{STYLE}</style>"
    verdict = "every number and claim holds" if not failed else f"{len(failed)} numbers or claims do not hold"
    page.write_text(
        f"{head}<h1>The textbooks' figures, computed anew</h1><p>{len(asked)} figures; {verdict}.</p>"
        f"{''.join(sections)}</html>",
        encoding="utf-8",
    )
    return page, failed


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of a few lanes: a second thread of PyTorch's costs more than it brings, several times on a busy machine.

    Numba's first parallel kernel sets PyTorch's number, too, where both use one OpenMP; hence once for each figure."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read() -> dict[str, Any]:
    """The published numbers, each with all digits that it is printed with."""
    return tomllib.loads(PUBLISHED.read_text(encoding="utf-8"), parse_float=Decimal)


def forgotten(published: Mapping[str, Any]) -> list[str]:
    """Tables that no figure computes, and that are not there for tests alone."""
    return [name for name, table in published.items() if name not in FIGURES and not table.get("for_tests")]


def compare(figure: Figure, table: Mapping[str, Any]) -> tuple[list[Comparison], list[str]]:
    """Comparisons of what has the same name on both sides, and sentences about what is on one side only."""
    computed = dict(_leaves(figure.numbers))
    published = dict(_leaves({name: value for name, value in table.items() if name not in ABOUT}))
    slack = table.get("slack", {})
    compared = [
        Comparison(
            name=name,
            computed=np.array(computed[name]),
            published=_plain(published[name]),
            slack=_slack(published[name], slack.get(name)),
        )
        for name in computed
        if name in published
    ]
    unmatched = [f"{name}: computed, and not published" for name in computed if name not in published]
    unmatched += [f"{name}: published, and not computed" for name in published if name not in computed]
    unmatched += [f"{name}: a slack for what is not published" for name in slack if name not in published]
    return compared, unmatched


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What stands under each name, a name inside another as "outer inner"."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def _plain(printed: Any) -> np.ndarray:
    words = np.array(printed)
    return words if words.dtype.kind == "U" else words.astype(float)


def _slack(printed: Any, stated: Any) -> np.ndarray:
    """Half a unit of each number's last digit, or what is stated."""
    numbers = np.array(printed, dtype=object)
    slack = np.vectorize(_half_a_unit, otypes=[float])(numbers)
    if isinstance(stated, Mapping):
        for cell, value in stated.items():
            slack[tuple(int(part) - 1 for part in cell.split(","))] = float(value)
    elif stated is not None:
        slack[...] = _plain(stated)
    return slack


def _half_a_unit(printed: Decimal | int | str) -> float:
    if isinstance(printed, Decimal):
        return 0.5 * 10.0 ** int(printed.as_tuple().exponent)
    return WHOLE if isinstance(printed, int) else 0.0


def _section(name: str, figure: Figure, compared: list[Comparison], unmatched: list[str], folder: Path) -> str:
    parts = [
        f"<section id={name}><h2>{html.escape(figure.title)}</h2>",
        f"<p class=said>{name}. {html.escape(figure.settings)}.</p>",
    ]
    parts += [_verdict(holds, claim) for claim, holds in figure.claims.items()]
    parts += [_verdict(False, sentence) for sentence in unmatched]
    for one in compared:
        sides = (("computed", one.computed), ("published", one.published))
        parts.append(_verdict(one.agrees, f"{one.name}: {one.said}"))
        parts.append(f"<div class=side>{''.join(f'<div>{title}{_table(x)}</div>' for title, x in sides)}</div>")
    if figure.draw is not None:
        path = folder / f"{name}.svg"
        figure.draw(path)
        parts.append("".join(path.read_text(encoding="utf-8").partition("<svg")[1:]))
    return "".join(parts) + "</section>"


def _verdict(holds: bool, sentence: str) -> str:
    return f"<p class={'ok' if holds else 'bad'}>{'✓' if holds else '✗'} {html.escape(sentence)}</p>"


def _table(values: np.ndarray) -> str:
    """A row for each row of a grid, or for ten numbers."""
    flat = values.ravel()
    width = values.shape[1] if values.ndim == 2 else min(max(flat.size, 1), LONGEST)
    lines = [flat[at : at + width] for at in range(0, flat.size, width)]
    return "<table>" + "".join(f"<tr>{''.join(map(_cell, line))}</tr>" for line in lines) + "</table>"


def _cell(value: Any) -> str:
    shown = value if isinstance(value, str) else f"{round(float(value), 7) + 0.0:.7g}"  # -0.0 + 0.0 is 0.0
    return f"<td>{html.escape(shown)}</td>"
