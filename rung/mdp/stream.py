"""Q-learning of a single stream, compiled: the numbers of `control.temporal_difference` with one lane, bit for bit.

Lanes pay for themselves from some dozens on; one long stream is faster as a loop.  The update is the one of
`objectives.returns.one_step` and `objectives.values.best`, which a test holds it to.
"""

import torch

from rung.core.errors import ConfigError, ModelError
from rung.core.keys import signed
from rung.core.rng import uniforms
from rung.core.shapes import Float, Tensor
from rung.mdp.finite import FiniteMDP
from rung.mdp.walk import BLOCK, WORDS, Tables

PIECE = 4096  # blocks of noise computed at a time


def q_learning(
    mdp: FiniteMDP, key: int, steps: int, *, step: float = 0.1, epsilon: float = 0.1, max_steps: int | None = None
) -> Float[Tensor, "S A"]:
    """q after so many steps of the walk of this key; options as in `temporal_difference`."""
    from rung.mdp.kernels import q_learn_

    if steps < 0:
        raise ConfigError(f"a number of steps is 0 or more; got {steps}")
    tables = Tables.of(mdp)
    if (mdp.first_state_S[mdp.terminal_S] > 0).any():
        raise ModelError("an episode cannot begin in a terminal state; give a start distribution without one")
    arrays = [getattr(tables, name).numpy() for name in ("pair_SA", "below_PB", "next_PB", "reward_PB", "discount_PB")]
    arrays += [tables.ends_PB.numpy(), tables.below_S.numpy()]
    q_SA = torch.zeros(mdp.num_states, mdp.num_actions, dtype=torch.float64)
    key_N = torch.tensor([signed(key)])
    where, done, block = (-1, 0), 0, 0  # state (-1: not yet begun) and age of the episode
    while done < steps:
        blocks = min(PIECE, -(-(steps + 1) // BLOCK) - block)
        position_N = (1 << 32) + torch.arange(block, block + blocks)  # the first epoch of a walk
        noise_TW = uniforms(key_N.expand(blocks), position_N, torch.arange(BLOCK * WORDS)).view(-1, WORDS)
        limit = 0 if max_steps is None else max_steps
        *where, taken = q_learn_(*arrays, noise_TW.numpy(), *where, steps - done, limit, step, epsilon, q_SA.numpy())
        done, block = done + taken, block + blocks
    return q_SA
