"""The compiled loop of one stream is the learner with one lane, bit for bit."""

import gymnasium
import pytest
import torch

from rung.core.errors import ConfigError, ModelError
from rung.mdp import zoo
from rung.mdp.control import temporal_difference
from rung.mdp.finite import from_dict, from_gymnasium
from rung.mdp.stream import q_learning
from rung.mdp.walk import keys

LEAKY = {
    "a": {"go": [(0.5, "a", 1.0), (0.2, "b", 2.0), (0.2, None, 3.0)], "on": [(0.6, "b", -1.0)]},
    "b": {"go": [(0.9, "a", 0.0)]},
}
MODELS = {
    "an early cut": (lambda: zoo.zhao(0.9, target="end"), 7),
    "illegal actions": (zoo.gambler, None),
    "sub-stochastic rows and an illegal action": (lambda: from_dict(LEAKY, 0.9, start={"a": 0.5, "b": 0.5}), None),
    "a reward for each outcome": (lambda: from_gymnasium(gymnasium.make("CliffWalkingSlippery-v1"), 0.95), 100),
    "ties": (lambda: zoo.garnet(6, 3, 2, gamma=0.9), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_the_lane(name):
    make, max_steps = MODELS[name]
    mdp, (key,) = make(), keys(3, 1)
    learner = temporal_difference(mdp, "q_learning", [key], step=0.3, epsilon=0.2, max_steps=max_steps)
    for _ in range(500):
        news = next(learner)
    found = q_learning(mdp, key, 500, step=0.3, epsilon=0.2, max_steps=max_steps)
    assert torch.equal(found, news.q_NSA()[0])
    assert float(found.abs().max()) > 0


def test_a_stream_cut_into_pieces_of_noise_is_the_same(monkeypatch):
    mdp, (key,) = zoo.windy(), keys(4, 1)
    whole = q_learning(mdp, key, 1000)
    monkeypatch.setattr("rung.mdp.stream.PIECE", 3)
    assert torch.equal(q_learning(mdp, key, 1000), whole)
    assert not torch.equal(q_learning(mdp, key, 999), whole)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ConfigError, match="0 or more; got -1"):
        q_learning(zoo.windy(), 1, -1)
    ended = from_dict(LEAKY, 0.9, start={None: 1.0})
    with pytest.raises(ModelError, match="cannot begin in a terminal state"):
        q_learning(ended, 1, 1)
