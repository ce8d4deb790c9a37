"""The figures of the textbooks: every printed number, what a wrong digit does, and that nothing is left out unseen."""

import ast
import io
from dataclasses import replace
from decimal import Decimal
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import rung
from rung.core.errors import ConfigError
from rung.mdp.figures import catalogue, page
from rung.mdp.figures.base import Figure

ROOT = Path(rung.__file__).parent
QUICK = ("zhao_robbins_monro", "zhao_6_5", "zhao_10_2")  # with chance, and done in a second
TEXT = page.PUBLISHED.read_text()
WRONG = [  # figure, a passage of its table, and the same with one digit (or action) off by one
    ("zhao_3_4_a", "[7.2, 8.0, 10, 8.0, 7.2]", "[7.2, 8.1, 10, 8.0, 7.2]"),
    ("zhao_3_4_a", "[5.832, 5.58, 6.2, 6.48, 5.832]", "[5.831, 5.58, 6.2, 6.48, 5.832]"),
    ("zhao_3_4_a", '"D R D D DL", "D D D D DL"', '"D R D D DL", "D D D D D"'),
    ("zhao_2_7_mixed", "[-10, -0.5, 0.5, -0.5, 0]", "[-10, -0.5, 0.6, -0.5, 0]"),
    ("zhao_4_5", "[-1.00, -1.90, -2.71]", "[-1.00, -1.90, -2.72]"),
    ("zhao_4_4", "[0, -100, -100, 0, 0]", "[0, -100, -99, 0, 0]"),
    ("zhao_5_6", '"0.2" = { 5 = [-2.8, -3.2', '"0.2" = { 5 = [-2.8, -3.3'),
    ("zhao_5_7", "cell_3_1 = -1.134", "cell_3_1 = -1.135"),
    ("zhao_5_7", "[-1.2, -2.4, -2.2, -1.5, -0.6]", "[-1.3, -2.4, -2.2, -1.5, -0.6]"),
    ("zhao_8_2", "0.1330", "0.1331"),
    ("zhao_sweeps", '"1e-6" = 133', '"1e-6" = 134'),
    ("sb_4_1", "[-14, -18, -20, -20]", "[-14, -17, -20, -20]"),
    ("sb_cliff", "ties = -50.80", "ties = -50.81"),
    ("sb_corridor", "best = -11.656854", "best = -11.656855"),
]


@cache
def figure(name: str) -> Figure:
    return catalogue.FIGURES[name]()


@cache
def published() -> dict:
    return page.read()


@pytest.mark.parametrize("name", [*catalogue.EXACT, *QUICK])
def test_a_figure_has_the_printed_numbers_and_its_claims_hold(name, tmp_path):
    compared, unmatched = page.compare(figure(name), published().get(name, {}))
    assert not unmatched
    assert not [f"{c.name}: {c.said}" for c in compared if not c.agrees]
    assert not [claim for claim, holds in figure(name).claims.items() if not holds]
    assert compared or figure(name).claims
    if (draw := figure(name).draw) is not None:
        draw(tmp_path / "picture.svg")
        assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_every_table_of_the_file_belongs_to_a_figure_or_to_tests():
    assert page.forgotten(published()) == []
    assert page.forgotten({**published(), "zhao_9_9": {"printed": 1}}) == ["zhao_9_9"]


def test_what_stands_on_one_side_only_is_told():
    one = Figure(title="", settings="", numbers={"a": 1.0, "b": {"c": [1.0, 2.0]}})
    compared, unmatched = page.compare(one, {"about": "", "a": Decimal("1.0"), "b": {"d": 1}, "slack": {"e": 1}})
    assert [c.name for c in compared] == ["a"]
    assert unmatched == [
        "b c: computed, and not published",
        "b d: published, and not computed",
        "e: a slack for what is not published",
    ]


@pytest.mark.parametrize("name", [name for name in catalogue.EXACT if name in page.read()])
def test_a_wrong_last_digit_anywhere_is_seen(name):
    """Each number of each table without chance, moved by one unit of its last digit away from what was computed."""
    seen, printed = 0, dict(page._leaves({k: v for k, v in published()[name].items() if k not in page.ABOUT}))
    for compared in page.compare(figure(name), published()[name])[0]:
        if compared.published.dtype.kind == "U":
            continue
        numbers = np.array(printed[compared.name], dtype=object)
        for place in np.ndindex(numbers.shape):
            number = numbers[place]
            unit = 10.0 ** number.as_tuple().exponent if isinstance(number, Decimal) else 1.0
            if compared.slack[place] > unit / 2:  # stated in the file
                continue
            away = 1.0 if compared.published[place] >= compared.computed[place] else -1.0
            wrong = compared.published.copy()
            wrong[place] += away * unit
            assert not replace(compared, published=wrong).agrees, (compared.name, place)
            seen += 1
    assert seen


@pytest.mark.parametrize(("name", "right", "wrong"), WRONG)
def test_a_planted_digit_fails_the_page_and_is_named(name, right, wrong, tmp_path, monkeypatch):
    table = TEXT.index(f"[{name}]")
    at = TEXT.index(right, table)
    (tmp_path / "planted.toml").write_text(TEXT[:at] + wrong + TEXT[at + len(right) :])
    monkeypatch.setattr(page, "PUBLISHED", tmp_path / "planted.toml")
    monkeypatch.setattr(page, "FIGURES", {other: (lambda: figure(name)) for other in page.FIGURES})
    path, failed = page.write(tmp_path, only=name)
    assert any(sentence.startswith(f"{name}: ") for sentence in failed)
    assert "class=bad" in path.read_text()


def test_words_and_shapes_are_compared_too():
    one = Figure(title="", settings="", numbers={"grid": np.zeros((2, 2)), "policy": ["RL", "UD"]})
    table = {"grid": [0, 0, 0, 0], "policy": ["RL", "UU"]}
    said = {c.name: (c.agrees, c.said) for c in page.compare(one, table)[0]}
    assert said["grid"] == (False, "computed in the shape (2, 2), published in (4,)")
    assert said["policy"] == (False, "not the same")


def test_half_a_unit_of_the_last_digit_is_the_slack_unless_another_is_stated():
    printed = [[Decimal("8.0"), Decimal("-50.80")], [10, Decimal("0.585786")]]
    assert np.allclose(page._slack(printed, None), [[0.05, 0.005], [0.05, 5e-7]], rtol=1e-12)
    assert np.allclose(page._slack(printed, {"2,1": Decimal("0.3")}), [[0.05, 0.005], [0.3, 5e-7]], rtol=1e-12)
    assert np.allclose(page._slack([10, 20], [1, Decimal("0.5")]), [1, 0.5])
    assert np.allclose(page._slack([10, 20], Decimal("0.2")), 0.2)


def test_only_what_is_asked_for_is_computed(tmp_path, monkeypatch):
    asked = []

    def maker(name):
        return lambda: asked.append(name) or Figure(title=name, settings="", claims={"so": True})

    monkeypatch.setattr(page, "FIGURES", {name: maker(name) for name in page.FIGURES})
    monkeypatch.setattr(page, "read", lambda: {name: {} for name in page.FIGURES})
    _, failed = page.write(tmp_path, only="zhao_3_4")
    assert asked == ["zhao_3_4_a", "zhao_3_4_b", "zhao_3_4_c", "zhao_3_4_d"]
    assert failed == []


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"no figure's name contains 'sb_cilff'\. Did you mean 'sb_cliff'\?"):
        page.write(tmp_path, only="sb_cilff")
    assert not list(tmp_path.iterdir())


def test_no_figure_sees_the_published_numbers(monkeypatch):
    """Nobody but the page names the file, imports the page or reads TOML here; and no figure opens it or any other."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if path != ROOT / "mdp" / "figures" / "page.py":
            named = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
            code = [value for value in named if isinstance(value, str) and value.endswith("published.toml")]
            assert not code, path
        if path.parent == ROOT / "mdp" / "figures" and path.name != "page.py":
            assert "tomllib" not in text, path
            assert "figures.page" not in text, path
            assert "import page" not in text, path
    opened = []
    real = io.open
    monkeypatch.setattr(io, "open", lambda file, *rest, **more: opened.append(str(file)) or real(file, *rest, **more))
    monkeypatch.setattr("builtins.open", io.open)
    monkeypatch.setattr(page, "PUBLISHED", Path("gone.toml"))
    for name in ("zhao_3_4_a", "zhao_5_7", "sb_corridor"):
        anew = catalogue.FIGURES[name]().numbers
        for (_, one), (_, other) in zip(page._leaves(anew), page._leaves(figure(name).numbers), strict=True):
            assert np.array_equal(np.array(one), np.array(other))
    assert not [file for file in opened if file.endswith(".toml")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_page_holds(tmp_path):
    path, failed = page.write(tmp_path)
    assert failed == []
    text = path.read_text()
    assert text.count("<section ") == len(catalogue.FIGURES)
    assert text.count("<svg") >= 25
    assert "class=bad" not in text
