"""Planning where nothing is discounted: so many steps to go, and the average reward."""

import itertools

import numpy as np
import pytest

from rung.core.errors import ModelError
from rung.mdp import finite, zoo
from rung.mdp.horizons import average_reward, finite_horizon, relative_value_iteration


def test_finite_horizons_count_down():
    mdp = zoo.chain(4)
    v_TS, pair_TS = finite_horizon(mdp, 5)
    assert v_TS[:, 0].tolist() == [0, 0, 0, 0, 1, 1]
    assert finite_horizon(mdp, 2, final_S=np.arange(5.0))[0][:, 0].tolist() == [0, 1, 2]
    assert mdp.action_names[mdp.action_N[pair_TS[3, 0]]] == "right"


def test_the_average_reward_of_a_wheel():
    """Two loops through one state: 3 in two steps, or 1 in one; the first has the larger gain."""
    model = {"hub": {"long": [(1, "rim", 0)], "short": [(1, "hub", 1)]}, "rim": {"back": [(1, "hub", 3)]}}
    found = average_reward(finite.from_dict(model, 1.0), epsilon=1e-9)
    assert found.lower <= 1.5 <= found.upper
    assert found.gain == pytest.approx(1.5, abs=1e-8)
    assert found.relative_S == pytest.approx([0.0, 1.5], abs=1e-7)  # h = r - gain + P h, and 0 in the first state
    iterates = list(itertools.islice(relative_value_iteration(finite.from_dict(model, 1.0)), 20))
    assert all(one.lower - 1e-12 <= 1.5 <= one.upper + 1e-12 for one in iterates)
    assert all(one.gain == (one.lower + one.upper) / 2 for one in iterates)
    assert iterates[-1].upper - iterates[-1].lower < 0.1 * (iterates[0].upper - iterates[0].lower)
    with pytest.raises(ModelError, match="needs episodes that never end"):
        average_reward(zoo.chain(3))
    with pytest.raises(ModelError, match="several classes"):
        average_reward(finite.from_arrays(np.eye(2)[:, None], np.array([[0.0], [1.0]]), 1.0), max_iterations=50)
