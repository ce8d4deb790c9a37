"""The two set-ups that every claim about an expected gradient is tried on, and the bridge to the NumPy oracle."""

from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial

import jaxtyping
import numpy as np
import torch
from oracle import Oracle

from rung import truth
from rung.train.config import Method
from rung.train.methods import build_objective, group_streams

MAX_TOKENS = 3
FIXED = truth.World(vocabulary=3, max_tokens=MAX_TOKENS, prompts=((0,),))  # 27 completions of 3 tokens
ENDED = truth.World(vocabulary=3, max_tokens=MAX_TOKENS, prompts=((0,), (1, 0)), eos=2)  # 15 completions, two prompts


class Setup:
    """A world with a policy, another sampler, a reference, real-valued and right-or-wrong rewards: all random."""

    def __init__(self, world, seed):
        generator = torch.Generator().manual_seed(seed)
        self.world = world
        self.policy, self.sampler, self.reference = (truth.TablePolicy.random(world, generator) for _ in range(3))
        names = [(p, c) for p in world.prompts for c in world.completions()]
        self.values = {name: float(torch.randn((), generator=generator)) for name in names}
        self.right = {name: float(torch.rand((), generator=generator) < 0.4) for name in names}

    def reward(self, prompt, completion):
        return self.values[prompt, completion]

    def binary(self, prompt, completion):
        return self.right[prompt, completion]

    def tables(self):
        """Policy, sampler and reference as dicts from prefix to logits."""
        prefixes = self.world.prefixes()
        policies = (self.policy, self.sampler, self.reference)
        return [dict(zip(prefixes, p.logits_NV.numpy(), strict=True)) for p in policies]

    def oracle(self, prompt, *, on_policy=True):
        policy, sampler, reference = self.tables()
        return Oracle(prompt, self.world.completions(), policy, policy if on_policy else sampler, reference, MAX_TOKENS)

    def rewards(self, prompt, binary=False):
        reward = self.binary if binary else self.reward
        return np.array([reward(prompt, c) for c in self.world.completions()])


SETUPS = {"fixed": Setup(FIXED, 1), "ended": Setup(ENDED, 3)}


@contextmanager
def unchecked():
    """Shape checks off: they are two thirds of the time of 50 000 groups, and every other test has them on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@cache
@unchecked()
def steps(setup, prompt, group_size, on_policy, streams_of, binary=False, accept=None):
    """Every step of one group, with the streams of a Method reduced to the cells that streams depend on."""
    s = SETUPS[setup]
    streams = partial(group_streams, streams_of, max_tokens=MAX_TOKENS)
    return truth.outcomes(
        s.policy if on_policy else s.sampler,
        reward=s.binary if binary else s.reward,
        streams=streams,
        group_size=group_size,
        prompts=(prompt,),
        policies=[("logp_ref", s.reference), *([] if on_policy else [("logp_old", s.sampler)])],
        accept=accept or (lambda group: True),
    )


def ours(setup, prompt, group_size, method, *, on_policy=True, binary=False, accept=None):
    """Expected gradient of a method by the truth kit and Rung's own streams and objective, as NumPy."""
    cells = ("advantage", "denominator", "overlong", "overlong_cache")
    streams_of = Method(**{cell: getattr(method, cell) for cell in cells})
    found = steps(setup, prompt, group_size, on_policy, streams_of, binary, accept)
    return truth.expected_gradient(build_objective(method), SETUPS[setup].policy, found).numpy()


def by_numpy(setup, prompt, group_size, method, *, on_policy=True, binary=False, accept=lambda rewards: True):
    """The same by the oracle."""
    s = SETUPS[setup]
    oracle = s.oracle(prompt, on_policy=on_policy)
    return oracle.expected_gradient(asdict(method), s.rewards(prompt, binary), group_size, accept)


def places(*names):
    return [(name, prompt) for name in names for prompt in SETUPS[name].world.prompts]


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def direction(found, expected):
    """Relative error that is left after the best scaling."""
    best = (found * expected).sum() / (found * found).sum()
    return relative(best * found, expected)


__all__ = ["ENDED", "FIXED", "MAX_TOKENS", "SETUPS", "by_numpy", "direction", "ours", "places", "relative"]
