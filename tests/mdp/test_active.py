"""Active inference: beliefs are Bayes', costs split both ways, and the T-maze has a closed form."""

import numpy as np
import pytest

from rung.core.errors import ModelError
from rung.mdp import active, finite


def random_model(seed: int) -> active.Generative:
    rng = np.random.default_rng(seed)
    return active.Generative(
        likelihood_OS=rng.dirichlet(np.ones(5), size=4).T,
        transition_USZ=rng.dirichlet(np.ones(4), size=(3, 4)),
        preference_O=rng.normal(size=5),
        prior_S=rng.dirichlet(np.ones(4)),
    )


@pytest.mark.parametrize("seed", range(5))
def test_beliefs_are_those_of_the_joint_distribution_of_all_histories(seed):
    """Three actions and outcomes: the filter against a sum over all 4^4 histories of states."""
    model, rng = random_model(seed), np.random.default_rng(seed)
    actions, outcomes = rng.integers(3, size=3), rng.integers(5, size=4)
    belief_S = active.observed(model, model.prior_S, int(outcomes[0]))
    for action, outcome in zip(actions, outcomes[1:], strict=True):
        belief_S = active.observed(model, active.moved(model, belief_S, int(action)), int(outcome))
    last_S = np.zeros(4)
    for history in np.ndindex(4, 4, 4, 4):
        chance = model.prior_S[history[0]] * model.likelihood_OS[outcomes[0], history[0]]
        for t, action in enumerate(actions):
            chance *= model.transition_USZ[action, history[t], history[t + 1]]
            chance *= model.likelihood_OS[outcomes[t + 1], history[t + 1]]
        last_S[history[-1]] += chance
    assert np.allclose(belief_S, last_S / last_S.sum(), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_free_energy_is_least_at_the_posterior_where_it_is_the_surprise(seed):
    model, rng = random_model(seed), np.random.default_rng(seed)
    posterior_S = active.observed(model, model.prior_S, 2)
    surprise = -np.log(model.likelihood_OS[2] @ model.prior_S)
    assert active.free_energy(model, posterior_S, model.prior_S, 2) == pytest.approx(surprise, abs=1e-12)
    for _ in range(20):
        assert active.free_energy(model, rng.dirichlet(np.ones(4)), model.prior_S, 2) > surprise


@pytest.mark.parametrize("seed", range(5))
def test_risk_and_ambiguity_are_minus_utility_and_information(seed):
    model = random_model(seed)
    plans = active.plan(model, model.prior_S, 3)
    assert len(plans.actions) == 27
    assert np.allclose(plans.cost_K, -plans.utility_K - plans.information_K, atol=1e-12)
    assert (plans.information_K >= -1e-12).all()
    assert plans.chance_K.sum() == pytest.approx(1)
    assert np.allclose(np.log(plans.chance_K[0] / plans.chance_K[1]), plans.cost_K[1] - plans.cost_K[0])


def test_with_states_seen_a_plan_costs_minus_its_rewards_and_its_entropy():
    """The sum over steps, by powers of the transition matrices."""
    rng = np.random.default_rng(0)
    entered = rng.normal(size=4)
    prob = rng.dirichlet(np.ones(4), size=(4, 2))
    mdp = finite.from_arrays(prob, np.broadcast_to(entered, (4, 2, 4)), 1.0)
    model = active.observable(mdp, 0.5, 1)
    plans = active.plan(model, model.prior_S, 3)
    constant = np.log(np.exp(entered / 0.5).sum())
    for plan, cost in zip(plans.actions, plans.cost_K, strict=True):
        where, expected = np.eye(4)[1], 0.0
        for action in plan:
            where = where @ prob[:, action]
            expected += where @ np.log(where) - where @ entered / 0.5 + constant
        assert cost == pytest.approx(expected)


def test_without_chance_the_best_plan_is_that_of_the_finite_horizon():
    """Four states in a ring, deterministic moves: entropy is 0, so the least G is the largest sum of rewards."""
    from rung.mdp.horizons import finite_horizon

    prob, entered = np.zeros((4, 2, 4)), np.array([0.0, 1.0, 0.3, 2.0])
    for s in range(4):
        prob[s, 0, (s + 1) % 4] = prob[s, 1, s] = 1.0
    mdp = finite.from_arrays(prob, np.broadcast_to(entered, (4, 2, 4)), 1.0)
    v_TS, _ = finite_horizon(mdp, 4)
    constant = np.logaddexp.reduce(entered)
    for state in range(4):
        model = active.observable(mdp, 1.0, state)
        plans = active.plan(model, model.prior_S, 4)
        assert plans.cost_K.min() == pytest.approx(4 * constant - v_TS[4, state])


@pytest.mark.parametrize("effort", [0.0, 0.7])
@pytest.mark.parametrize("cue", [0.5, 0.8, 1.0])
def test_the_t_maze_is_worth_its_cue_by_a_closed_form(cue, effort):
    """Two steps.  Blind plans count the arm's log 2 twice, so that the cue (log 2 - H, at its effort) loses to an arm.

    Seen outcomes: an arm at once tells log 2 and pays 0 on average, for ever; the cue tells log 2 - H, its arm the
    other H, and pays (2 cue - 1) preference.  So the cue is better exactly where that exceeds its effort."""
    model = active.t_maze(cue=cue, preference=1.5, effort=effort)
    plans = active.plan(model, model.prior_S, 2)
    of = {plan: k for k, plan in enumerate(plans.actions)}
    entropy = -sum(p * np.log(p) for p in (cue, 1 - cue) if p > 0)
    assert plans.cost_K[of[2, 2]] - plans.cost_K[of[1, 2]] == pytest.approx(-entropy - effort)
    costs = active.deep_costs(model, model.prior_S, 2)
    assert costs[2] - costs[1] == pytest.approx((2 * cue - 1) * 1.5 - effort)
    assert costs[2] == pytest.approx(costs[3])


def test_after_a_certain_cue_the_agent_goes_where_the_reward_is():
    model = active.t_maze(cue=1.0, preference=3.0)
    assert active.deep_costs(model, model.prior_S, 2).argmin() == 1  # the cue
    for says, arm in ((1, 2), (2, 3)):
        belief_S = active.observed(model, active.moved(model, model.prior_S, 1), says)
        assert active.plan(model, belief_S, 1, precision=16.0).next_action().argmax() == arm


def test_what_is_no_distribution_or_cannot_happen_is_refused():
    with pytest.raises(ModelError, match=r"prior_S must sum to 1; got 0.9"):
        active.Generative(
            likelihood_OS=np.eye(2),
            transition_USZ=np.eye(2)[None],
            preference_O=np.zeros(2),
            prior_S=np.array([0.4, 0.5]),
        )
    with pytest.raises(ModelError, match="outcome 3 cannot happen"):
        active.observed(active.t_maze(), active.t_maze().prior_S, 3)
    with pytest.raises(ModelError, match="every action to be legal"):
        active.observable(finite.from_dict({"a": {"go": [(1, None, 0)]}}, 1.0), 1.0, 0)
