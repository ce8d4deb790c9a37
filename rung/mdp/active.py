"""Active inference on finite models: beliefs by Bayes' rule, plans by expected free energy.

A model says how outcomes come from hidden states (A), how actions move states (B), which outcomes are preferred (C, log
probabilities), and where it begins (D).  With beliefs q(s):

    free energy of a belief          F = E_q[log q(s) - log p(o, s)]   >= -log p(o), equal for the exact posterior
    expected free energy of a plan   G = sum over steps of   KL(q(o) || C)  +  E_q(s)[entropy of A(o|s)]
                                       =                     risk           +  ambiguity
                                       = -(expected log preference) - (expected information about the state)

A plan is a sequence of actions, chosen with chance softmax(-precision G) [Friston 2017; Da Costa 2020].  It does not
see its own outcomes: each step's information is counted as if the ones before had told nothing.  `deep_costs` looks at
every outcome before the next action [Friston 2021].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from rung.core.errors import ModelError
from rung.mdp.finite import FiniteMDP, Floats, Numbers


@dataclass(frozen=True, eq=False, kw_only=True)
class Generative:
    """A partially observed model.

    likelihood_OS: chance of outcome o in state s;  transition_USZ: of the next state z after action u in state s
    preference_O:  log probabilities of outcomes, up to a constant;  prior_S: belief before the first outcome

    Raises ModelError where probabilities do not sum to 1."""

    likelihood_OS: Floats
    transition_USZ: Floats
    preference_O: Floats
    prior_S: Floats

    def __post_init__(self) -> None:
        for name, sums in (
            ("likelihood_OS", self.likelihood_OS.sum(0)),
            ("transition_USZ", self.transition_USZ.sum(-1)),
            ("prior_S", self.prior_S.sum()),
        ):
            if not (getattr(self, name) >= 0).all():
                raise ModelError(f"{name} holds probabilities: nothing negative, nothing that is no number")
            wrong = np.abs(np.asarray(sums) - 1) > 1e-9
            if wrong.any():
                raise ModelError(f"{name} must sum to 1; got {float(np.asarray(sums)[wrong].ravel()[0]):.9g}")

    @property
    def log_preference_O(self) -> Floats:
        """Normalised."""
        return self.preference_O - np.logaddexp.reduce(self.preference_O)


def observed(model: Generative, belief_S: Floats, outcome: int) -> Floats:
    """The posterior after an outcome.  Raises ModelError for one that cannot happen."""
    joint_S = model.likelihood_OS[outcome] * belief_S
    if not joint_S.sum() > 0:
        raise ModelError(f"outcome {outcome} cannot happen under this belief")
    return joint_S / joint_S.sum()


def moved(model: Generative, belief_S: Floats, action: int) -> Floats:
    """The belief after an action, before its outcome."""
    return belief_S @ model.transition_USZ[action]


def free_energy(model: Generative, belief_S: Floats, prior_S: Floats, outcome: int) -> float:
    """F of a belief about the state, given an outcome and what was believed before."""
    joint_S = model.likelihood_OS[outcome] * prior_S
    held = belief_S > 0
    if (joint_S[held] == 0).any():
        return float("inf")
    return float(belief_S[held] @ (np.log(belief_S[held]) - np.log(joint_S[held])))


@dataclass(frozen=True, eq=False, kw_only=True)
class Plans:
    """All action sequences of a length: what each is expected to cost, and its chance."""

    actions: tuple[tuple[int, ...], ...]
    risk_K: Floats
    ambiguity_K: Floats
    information_K: Floats  # expected about the state, in nats
    utility_K: Floats  # expected log preference
    chance_K: Floats

    @property
    def cost_K(self) -> Floats:
        """G."""
        return self.risk_K + self.ambiguity_K

    def next_action(self) -> Floats:
        """Chance of each first action [U]."""
        first_K = np.array([plan[0] for plan in self.actions])
        return np.bincount(first_K, self.chance_K).astype(float)


def plan(model: Generative, belief_S: Floats, depth: int, *, precision: float = 1.0) -> Plans:
    """Every sequence of `depth` actions, judged from this belief."""
    actions = tuple(product(range(len(model.transition_USZ)), repeat=depth))
    parts = np.array([_judge(model, belief_S, one) for one in actions])
    score_K = -precision * (parts[:, 0] + parts[:, 1])
    chance_K = np.exp(score_K - np.logaddexp.reduce(score_K))
    risk_K, ambiguity_K, information_K, utility_K = parts.T
    return Plans(
        actions=actions,
        risk_K=risk_K,
        ambiguity_K=ambiguity_K,
        information_K=information_K,
        utility_K=utility_K,
        chance_K=chance_K,
    )


def deep_costs(model: Generative, belief_S: Floats, depth: int) -> Floats:
    """G of each next action [U], if every later action is the best after what was seen until then."""
    costs = []
    for action in range(len(model.transition_USZ)):
        there_S = moved(model, belief_S, action)
        risk, ambiguity, _, _ = _step(model, there_S)
        cost = risk + ambiguity
        if depth > 1:
            for outcome, chance in enumerate(model.likelihood_OS @ there_S):
                if chance > 0:
                    cost += chance * deep_costs(model, observed(model, there_S, outcome), depth - 1).min()
        costs.append(cost)
    return np.array(costs)


def _judge(model: Generative, belief_S: Floats, actions: Sequence[int]) -> Floats:
    """Risk, ambiguity, information and utility of a sequence."""
    total = np.zeros(4)
    for action in actions:
        belief_S = moved(model, belief_S, action)
        total += _step(model, belief_S)
    return total


def _step(model: Generative, belief_S: Floats) -> tuple[float, float, float, float]:
    """Risk, ambiguity, information and utility of being believed in these states."""
    outcome_O = model.likelihood_OS @ belief_S
    utility = float(outcome_O @ model.log_preference_O)
    ambiguity = -float(belief_S @ _plogp(model.likelihood_OS).sum(0))
    entropy = -float(_plogp(outcome_O).sum())
    return -entropy - utility, ambiguity, entropy - ambiguity, utility


def _plogp(p: Numbers) -> Floats:
    values = np.asarray(p, dtype=float)
    return values * np.log(np.where(values > 0, values, 1.0))


def t_maze(*, cue: float = 0.95, reward: float = 1.0, preference: float = 2.0, effort: float = 0.0) -> Generative:
    """Reward in the left or the right arm, a cue below that tells which; arms cannot be left.

    States: place (centre, cue, left, right) x side of the reward (left, right).  Outcomes: the place; at the cue what
    it says; in an arm whether there was a reward.

    cue, reward: how often the cue is right, and the arm pays
    preference:  log odds of reward against nothing, and of nothing against punishment
    effort:      log odds of nothing against being at the cue"""
    places, sides = 4, 2  # place 0 centre, 1 cue, 2 left, 3 right
    # outcomes: 0 centre; 1, 2 the cue says left, right; 3, 4 left arm pays, punishes; 5, 6 right arm
    likelihood_OS = np.zeros((7, places * sides))
    for side in range(sides):
        likelihood_OS[0, 0 * sides + side] = 1.0
        likelihood_OS[1 + side, 1 * sides + side] = cue
        likelihood_OS[2 - side, 1 * sides + side] = 1 - cue
        for arm in range(2):
            pays = reward if arm == side else 1 - reward
            likelihood_OS[3 + 2 * arm, (2 + arm) * sides + side] = pays
            likelihood_OS[4 + 2 * arm, (2 + arm) * sides + side] = 1 - pays
    transition_USZ = np.zeros((places, places * sides, places * sides))
    for action in range(places):
        for place in range(places):
            for side in range(sides):
                there = place if place >= 2 else action
                transition_USZ[action, place * sides + side, there * sides + side] = 1.0
    preference_O = np.array([0, -effort, -effort, preference, -preference, preference, -preference], dtype=float)
    prior_S = np.zeros(places * sides)
    prior_S[:sides] = 0.5
    return Generative(
        likelihood_OS=likelihood_OS, transition_USZ=transition_USZ, preference_O=preference_O, prior_S=prior_S
    )


def observable(mdp: FiniteMDP, temperature: float, state: int) -> Generative:
    """A finite model whose states are seen, with rewards of the state reached as preferences: log C = reward / T.

    Its expected free energy is minus the expected sum of rewards / T (with log normalisers), minus the entropy of where
    it leads.  Every state needs the same actions.  Raises ModelError where they differ, or where what is
    paid depends on more than the state reached."""
    if mdp.num_pairs != mdp.num_states * mdp.num_actions:
        raise ModelError("active inference needs every action to be legal in every state")
    states = mdp.num_states
    transition_USZ = np.zeros((mdp.num_actions, states, states))
    owner_M = np.repeat(np.arange(mdp.num_pairs), mdp.counts_N)
    np.add.at(transition_USZ, (mdp.action_N[owner_M], mdp.state_N[owner_M], mdp.next_M), mdp.prob_M)
    paid_M = mdp.reward_N[owner_M] if mdp.reward_M is None else mdp.reward_M
    entered_S = np.zeros(states)
    entered_S[mdp.next_M] = paid_M
    if not np.allclose(entered_S[mdp.next_M], paid_M):
        state = int(mdp.next_M[int((~np.isclose(entered_S[mdp.next_M], paid_M)).argmax())])
        raise ModelError(f"preferences are of states, and entering {mdp.state_name(state)} is not always paid the same")
    return Generative(
        likelihood_OS=np.eye(states),
        transition_USZ=transition_USZ,
        preference_O=entered_S / temperature,
        prior_S=np.eye(states)[state],
    )
