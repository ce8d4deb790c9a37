"""The guide pages of methods and KL hold: their tables are what the code computes, and their example runs."""

import re
from pathlib import Path

from test_estimators_by_enumeration import KL_LOSSES, OFF, ON, RETURN_LOSSES, SETUPS, verdict_on_kl, verdict_on_return

from rung.train.config import METHODS

GUIDE = Path(__file__).parents[2] / "docs" / "guide"


def rows(page):
    """Cells of every table row of a page, by the first cell; of equal ones the first."""
    lines = [line for line in (GUIDE / page).read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    first: dict[str, list[str]] = {}
    for row in cells:
        first.setdefault(row[0], row[1:])
    return first


def test_the_tables_of_the_kl_page_are_what_the_enumeration_gives():
    table = rows("kl.md")
    for name in KL_LOSSES:
        computed = [f"{verdict_on_kl(name, setup, drawn).error:.3f}" for setup in SETUPS for drawn in (ON, OFF)]
        assert table[name] == computed
    for name in RETURN_LOSSES:
        assert table[name] == [f"{verdict_on_return(name, OFF).error:.3f}"]


def test_the_methods_page_has_a_row_for_every_preset_with_its_kl_and_bounds():
    table = rows("methods.md")
    for name, method in METHODS.items():
        surrogate, kl = table[f"`{name}`"][1:3]
        assert kl == ("none" if method.kl == "none" else f"`{method.kl}`, {method.kl_coef:.2f}")
        if method.surrogate == "clip":
            low, high = (f"{eps:g}".removeprefix("0") for eps in (method.eps_low, method.eps_high))
            assert surrogate == f"clip {low}/{high}"


def test_the_example_of_the_methods_page_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (GUIDE / "methods.md").read_text(), re.DOTALL)
    exec(compile(example, "methods.md", "exec"), {})
