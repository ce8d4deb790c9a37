"""Where planners and certificates meet what fp64 can tell: gains that are rounding, ends that hardly come, ties."""

from collections.abc import Callable

import numpy as np
import pytest

from rung.core.errors import ModelError
from rung.mdp import certificates, finite, planning, zoo
from rung.mdp.certificates import bounds, distances, ending_pairs, expected_steps
from rung.mdp.planning import choose, policy_iteration, solve


def test_a_loop_that_gains_by_rounding_alone_is_not_followed():
    """Round through B pays 1000000.1 and takes it back, which fp64 sums to 5e-11: a greedy policy would never end."""
    pay = 1000000.1
    model = {"A": {"exit": [(1, None, 0.3)], "on": [(1, "B", pay)]}, "B": {"back": [(1, "A", -pay)]}}
    assert pay + (0.3 - pay) > 0.3 + 1e-12  # else this test shows nothing
    found = solve(finite.from_dict(model, 1.0), "policy", epsilon=None)
    assert found.v_S == pytest.approx([0.3, 0.3 - pay, 0.0], abs=1e-9)
    assert found.action_S[0] == 0


def test_a_small_dense_model_with_gamma_one_is_solved_by_the_method_that_notices_a_loop_that_pays():
    """Its rows are longer than what "policy" is chosen for otherwise."""
    prob_SAS = np.zeros((60, 2, 60))
    prob_SAS[:, 0] = 0.9 / 60
    prob_SAS[:, 1] = 1 / 60
    reward_SA = np.tile([0.0, -1.0], (60, 1))
    mdp = finite.from_arrays(prob_SAS, reward_SA, 1.0)
    assert choose(mdp) == "policy"
    assert solve(mdp).v_S == pytest.approx(np.zeros(60), abs=1e-6)
    with pytest.raises(ModelError, match="a loop through state 0 pays for ever"):
        solve(finite.from_arrays(prob_SAS, -reward_SA, 1.0))


def test_so_small_a_gain_counts_where_it_is_collected_for_a_million_steps():
    """Waiting pays 5e-14 a step and ends once in a million: 5e-8 in all, which a gain that is taken for none hides."""
    wait = [(1e-6, None, 5e-14), (1 - 1e-6, "A", 5e-14)]
    found = bounds(finite.from_dict({"A": {"end": [(1, None, 0.0)], "wait": wait}}, 1.0), np.zeros(1))
    assert found.lower_S[0] <= 5e-8 <= found.upper_S[0]
    iterates = policy_iteration(finite.from_dict({"A": {"end": [(1, None, 0.0)], "wait": wait}}, 1.0))
    for one in iterates:
        assert one.bounds.lower_S[0] <= 5e-8 <= one.bounds.upper_S[0]


def test_an_end_that_comes_too_late_for_fp64_is_explained():
    late = [(2.5e-13, "end", 1.0), (1 - 2.5e-13, "A", 1.0)]
    with pytest.raises(ModelError, match="no policy ends soon enough"):
        solve(finite.from_dict({"A": {"wait": late}, "end": {}}, 1.0))


def test_ties_are_found_though_the_values_are_still_far_off():
    """Both ways are worth 1, one at once and one little by little; bounds 0.2 apart cannot tell which is better."""
    model = {
        "A": {"quick": [(1, "X", 0)], "slow": [(1, "Y", 0)]},
        "X": {"end": [(1, None, 1)]},
        "Y": {"on": [(1, "Y", 0.1)]},
    }
    found = solve(finite.from_dict(model, 0.9), "value", epsilon=0.1)
    assert abs(found.v_S[1] - found.v_S[2]) > 0.05  # else this test shows nothing
    assert found.optimal_N.tolist() == [True] * 4


def test_what_a_krylov_method_does_not_reach_the_lu_does(monkeypatch):
    mdp = zoo.open_maze(14, 14, gamma=1.0)
    pair_S = ending_pairs(mdp)
    steps_S = expected_steps(mdp, pair_S)
    monkeypatch.setattr(certificates, "SMALL", 0)
    monkeypatch.setattr(certificates, "krylov", lambda rows, right_S, start_S, gain: (start_S, 1))
    assert np.allclose(expected_steps(mdp, pair_S), steps_S, rtol=1e-12)


@pytest.mark.parametrize("small", [0, 3_000])
def test_below_gamma_one_a_policy_need_not_end(monkeypatch, small):
    """Its steps, each discounted by 0.9, are 10."""
    monkeypatch.setattr(certificates, "SMALL", small)
    endless = finite.from_dict({"a": {"go": [(1, "b", -1)]}, "b": {"go": [(1, "a", -1)]}}, 0.9)
    assert expected_steps(endless, np.array([0, 1])) == pytest.approx([10.0, 10.0])


def test_states_are_eliminated_farthest_from_an_end_first(monkeypatch):
    """Any other order of elimination costs products."""

    def products(order: Callable[[planning._Work], np.ndarray]) -> int:
        monkeypatch.setattr(planning._Work, "order_I", property(order))
        return list(policy_iteration(zoo.maze(60, 60), krylov="bicgstab"))[-1].policy_products

    chosen = planning._Work(zoo.maze(60, 60)).order_I
    far = products(lambda work: chosen)
    near = products(lambda work: np.argsort(distances(work.mdp), kind="stable"))
    assert far < 0.9 * near
