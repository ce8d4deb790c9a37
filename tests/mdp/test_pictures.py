"""Drawings: what is in a cell, which files come out, and that a model that is no grid says so."""

import re

import numpy as np
import pytest

from rung.core.errors import ConfigError
from rung.mdp import pictures, zoo
from rung.mdp.operators import backup
from rung.mdp.planning import solve


def test_a_grid_in_a_terminal_has_values_marks_and_all_optimal_arrows():
    mdp = zoo.zhao(0.9, forbidden_reward=-10.0)
    found = solve(mdp, epsilon=1e-9)
    lines = pictures.as_text(mdp, found.v_S, found.optimal_N, digits=1).splitlines()
    assert lines[0].split() == ["3.5", "→", "3.9", "→", "4.3", "→", "4.8", "→↓", "5.3", "↓"]
    assert lines[3].split() == ["2.5", "↑", "10.0#", "→", "10.0T", "○", "10.0#", "←", "7.3", "↓"]


def test_another_model_is_a_table_of_states_and_the_rest_is_counted():
    mdp = zoo.random_walk(50)
    text = pictures.as_text(mdp, np.zeros(51), np.ones(mdp.num_pairs, bool))
    assert text.splitlines()[0].split() == ["state", "0", "0.00", "walk"]
    assert text.splitlines()[-1] == "... and 31 states more"


def test_a_drawing_is_the_same_file_every_time(tmp_path):
    mdp = zoo.zhao()
    found = solve(mdp)
    for name in ("one.svg", "two.svg", "picture.png"):
        pictures.draw(mdp, found.v_S, found.optimal_N, tmp_path / name, trajectory=[0, 5, 10, 15, 16, 17])
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"
    assert len(re.findall("#d9d9d9", (tmp_path / "one.svg").read_text())) == 6  # forbidden cells


def test_a_curve_lies_where_it_was_measured_and_what_diverges_hides_nothing(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: seen.append(figure.axes[0]))
    lanes = np.array([[1.0, 2.0, 3e4], [3.0, 2.0, 5e4]])
    pictures.curves({"TD": lanes}, tmp_path / "x.svg", across="lambda", up="RMSE", at=[0.0, 0.4, 1.0], within=(0, 5))
    pictures.curves({"TD": lanes}, tmp_path / "x.svg", across="episode", up="RMSE")
    assert seen[0].lines[0].get_xydata().tolist() == [[0.0, 2.0], [0.4, 2.0], [1.0, 4e4]]
    assert seen[0].get_ylim() == (0, 5)
    assert seen[0].get_xlabel() == "lambda"
    assert seen[1].lines[0].get_xdata().tolist() == [1, 2, 3]
    assert seen[1].get_ylim()[1] > 4e4
    band = seen[0].collections[0].get_paths()[0].vertices
    assert {0.0, 4.0} <= set(band[band[:, 0] == 0.0][:, 1])  # two standard errors of 1 and 3: 2 - 2, 2 + 2


def test_sweeps_become_an_animation_with_a_frame_each(tmp_path):
    from PIL import Image

    mdp, values = zoo.zhao(), [np.zeros(25)]
    for _ in range(4):
        values.append(backup(mdp, values[-1])[0])
    pictures.animate(mdp, values, tmp_path / "sweeps.gif")
    with Image.open(tmp_path / "sweeps.gif") as picture:
        assert picture.n_frames == 5


def test_a_model_that_is_no_grid_is_not_drawn(tmp_path):
    mdp = zoo.forest()
    with pytest.raises(ConfigError, match="only grid worlds are drawn"):
        pictures.draw(mdp, np.zeros(3), np.ones(6, bool), tmp_path / "x.svg")
