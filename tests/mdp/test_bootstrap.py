"""Where an episode ends nothing is to come, whatever the tables say; where it is only cut, the next value still is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.mdp import finite, prediction
from rung.mdp.control import NEXT_VALUES, temporal_difference
from rung.mdp.oracle import uniform
from rung.mdp.values import Table
from rung.mdp.walk import keys

LANES = 6
PREDICTION = ["td", "true online", "n_step", "off_policy"]


def drawn(seed: int) -> finite.FiniteMDP:
    """Terminal states, rows that leak, factors on gamma of 0, 1/2 and 1; every transition pays another reward."""
    rng, actions = np.random.default_rng(seed), ("x", "y", "z")
    model = {}
    for state in range(4):
        model[state] = {}
        for action in rng.choice(actions, size=rng.integers(1, 4), replace=False):
            chances = rng.dirichlet(np.ones(3)) * rng.choice([1.0, 0.7])
            model[state][str(action)] = [
                (float(p), int(rng.integers(6)), float(rng.normal()), float(rng.choice([0.0, 0.5, 1.0])))
                for p in chances
            ]
    return finite.from_dict(model, 0.9, start=dict.fromkeys(range(4), 0.25))


def truly_discounted(mdp: finite.FiniteMDP, state: int, action: int, reward: float, there: int) -> float:
    """gamma times the factor of the transition that paid this; 0 where the row's missing part ended it."""
    pair = mdp.pair(state, action)
    row = np.arange(mdp.row_N1[pair], mdp.row_N1[pair + 1])
    paid = row[mdp.reward_M[row] == reward]
    if not len(paid):
        assert reward == 0
        return 0.0
    (m,) = paid
    assert mdp.next_M[m] == there
    return 0.0 if mdp.terminal_S[there] else mdp.gamma * (1.0 if mdp.keep_M is None else float(mdp.keep_M[m]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 1]), st.sampled_from(list(NEXT_VALUES)))
def test_targets_of_control_end_with_the_episode_and_not_with_a_cut(seed, max_steps, method):
    """One step of size 1 from tables full of numbers, terminal states too: q becomes the target."""
    mdp = drawn(seed)
    q_SA = np.random.default_rng(seed).normal(size=(mdp.num_states, mdp.num_actions))
    tables = [Table(LANES, *q_SA.shape, initial=q_SA) for _ in range(2 if method == "double_q" else 1)]
    learner = temporal_difference(
        mdp, method, keys(seed, LANES), step=1.0, epsilon=1.0, values=tables, max_steps=max_steps
    )
    taken = next(learner).step
    for lane in range(LANES):
        state, action, there = (int(x[lane]) for x in (taken.state_N, taken.action_N, taken.next_state_N))
        reward = float(taken.reward_N[lane])
        discount = truly_discounted(mdp, state, action, reward, there)
        legal = mdp.action_N[mdp.first_S1[there] : mdp.first_S1[there + 1]]
        following = {
            "sarsa": list(q_SA[there, legal]),
            "expected_sarsa": [q_SA[there, legal].mean()] if len(legal) else [],
        }.get(method, [q_SA[there, legal].max()] if len(legal) else [])
        allowed = [reward + discount * value for value in following] if discount else [reward]
        found = [float(table.q_NSA[lane, state, action]) for table in tables]
        assert any(abs(one - value) < 1e-12 for one in found for value in allowed), (found, allowed)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([None, 1]), st.sampled_from(["td", "true online", "n_step", "off_policy"])
)
def test_targets_of_prediction_end_with_the_episode_and_not_with_a_cut(seed, max_steps, method):
    """One feature a state, terminal states too; one step of size 1."""
    mdp = drawn(seed)
    pi_N, v_S = uniform(mdp), np.random.default_rng(seed).normal(size=mdp.num_states)
    options = {"step": 1.0, "features_SF": np.eye(mdp.num_states), "initial_NF": v_S, "max_steps": max_steps}
    if method == "n_step":
        learner = prediction.n_step_td(mdp, pi_N, keys(seed, LANES), n=1, **options)
    elif method == "off_policy":
        learner = prediction.off_policy_td(mdp, pi_N, pi_N, keys(seed, LANES), method="semi_gradient", **options)
    else:
        online = method == "true online"
        learner = prediction.td_lambda(mdp, pi_N, keys(seed, LANES), lambda_=0.5, true_online=online, **options)
    found_NS = next(learner)
    for lane in range(LANES):
        (state,) = np.flatnonzero(abs(found_NS[lane].numpy() - v_S) > 1e-9)
        targets = [
            mdp.reward_M[m] + (0.0 if mdp.terminal_S[there] else mdp.gamma * keep * v_S[there])
            for m, there, keep in _transitions(mdp, int(state))
        ]
        missing = 0.0  # what a row's missing part pays and leads to
        assert min(abs(float(found_NS[lane, state]) - target) for target in [*targets, missing]) < 1e-12


def _transitions(mdp: finite.FiniteMDP, state: int) -> list[tuple[int, int, float]]:
    pairs = range(mdp.first_S1[state], mdp.first_S1[state + 1])
    rows = [m for n in pairs for m in range(mdp.row_N1[n], mdp.row_N1[n + 1])]
    return [(m, int(mdp.next_M[m]), 1.0 if mdp.keep_M is None else float(mdp.keep_M[m])) for m in rows]


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_a_return_that_was_cut_goes_on_with_the_value_of_the_next_state(lambda_):
    """A loop for ever that is worth exactly 2, cut after 3 steps: nothing is to be learnt from it."""
    mdp = finite.from_dict({"a": {"go": [(1, "a", 1.0)]}}, 0.5)
    learner = prediction.by_episodes(mdp, np.ones(1), keys(0, 1), lambda_=lambda_, initial_NF=2.0, max_steps=3)
    assert float(next(learner)[0, 0]) == 2.0
