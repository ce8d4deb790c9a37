"""What learners keep: a table, or weights of features; one of its own for every lane.

Both answer q(s, .) for a batch of states, and take `q += amount` at a pair (for features: w += amount * x(s, a), the
semi-gradient step).  State values are the same with one action.
"""

from collections.abc import Sequence
from itertools import product
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from rung.core.errors import ConfigError
from rung.core.shapes import Float, Int, Tensor
from rung.mdp.finite import Numbers


@runtime_checkable
class Values(Protocol):
    """q of every lane."""

    def __call__(self, state_N: Int[Tensor, "N"]) -> Float[Tensor, "N A"]:
        """q(s, .) of each lane's state."""

    def add_(self, state_N: Int[Tensor, "N"], action_N: Int[Tensor, "N"], amount_N: Float[Tensor, "N"]) -> None:
        """Move q(s, a) of every lane."""

    def table(self) -> Float[Tensor, "N S A"]:
        """q of every state and action."""


class Table:
    """One number for each state and action."""

    def __init__(self, lanes: int, states: int, actions: int = 1, *, initial: Numbers = 0.0) -> None:
        self.q_NSA = torch.empty(lanes, states, actions, dtype=torch.float64)
        self.q_NSA[:] = torch.as_tensor(np.asarray(initial, dtype=float))
        self._lane_N = torch.arange(lanes)

    def __call__(self, state_N: Tensor) -> Tensor:
        return self.q_NSA[self._lane_N, state_N]

    def add_(self, state_N: Tensor, action_N: Tensor, amount_N: Tensor) -> None:
        self.q_NSA[self._lane_N, state_N, action_N] += amount_N

    def table(self) -> Tensor:
        return self.q_NSA


class Linear:
    """q(s, a) = w . x(s, a)."""

    def __init__(self, lanes: int, features_SAF: Numbers, *, initial_NF: Numbers = 0.0) -> None:
        self.x_SAF = torch.as_tensor(np.asarray(features_SAF, dtype=float))
        if self.x_SAF.dim() == 2:
            self.x_SAF = self.x_SAF[:, None]
        self.w_NF = torch.empty(lanes, self.x_SAF.shape[-1], dtype=torch.float64)
        self.w_NF[:] = torch.as_tensor(np.asarray(initial_NF, dtype=float))

    def __call__(self, state_N: Tensor) -> Tensor:
        return (self.x_SAF[state_N] * self.w_NF[:, None]).sum(-1)

    def add_(self, state_N: Tensor, action_N: Tensor, amount_N: Tensor) -> None:
        self.w_NF += amount_N[:, None] * self.x_SAF[state_N, action_N]

    def table(self) -> Tensor:
        return torch.einsum("saf,nf->nsa", self.x_SAF, self.w_NF)


def per_action(features_SF: Numbers, actions: int) -> np.ndarray:
    """The same features for every action, each action with weights of its own [S, A, A * F]."""
    features = np.asarray(features_SF, dtype=float)
    states, count = features.shape
    blocks = np.zeros((states, actions, actions, count))
    blocks[:, np.arange(actions), np.arange(actions)] = features[:, None]
    return blocks.reshape(states, actions, actions * count)


def polynomial(points_SD: Numbers, degree: int) -> np.ndarray:
    """All products of powers of the coordinates, of total degree up to `degree`, constant first [S, F].

    Zhao's features of dimension 3, 6 and 10 for two coordinates are degrees 1, 2 and 3."""
    points = _points(points_SD)
    powers = sorted((p for p in product(range(degree + 1), repeat=points.shape[1]) if sum(p) <= degree), key=sum)
    return np.stack([np.prod(points ** np.array(p), axis=1) for p in powers], axis=1)


def fourier(points_SD: Numbers, order: int) -> np.ndarray:
    """cos(pi c . x) for every c in {0 .. order}^D, x in [0, 1]; constant first [S, F].  [Konidaris 2011]"""
    points = _points(points_SD)
    if points.min() < 0 or points.max() > 1:
        raise ConfigError(f"Fourier features take points in [0, 1]; got {points.min():g} to {points.max():g}")
    waves = np.array(list(product(range(order + 1), repeat=points.shape[1])))
    return np.cos(np.pi * points @ waves.T)


def tiles(points_SD: Numbers, cells: int | Sequence[int], tilings: int) -> np.ndarray:
    """Tile coding of points in [0, 1]: `tilings` grids, the t-th shifted by t / tilings of a cell (1, 3, 5, ... times
    that along the coordinates), each with one active tile [S, F].  [S & B 9.5.4]"""
    points = _points(points_SD)
    cells_D = np.broadcast_to(np.asarray(cells), points.shape[1:])
    odd_D = 2 * np.arange(points.shape[1]) + 1
    blocks = []
    for tiling in range(tilings):
        shift_D = (tiling * odd_D / tilings) % 1.0
        at_SD = np.minimum((points * cells_D + shift_D).astype(int), cells_D)  # one more cell, for the shift
        flat_S = np.ravel_multi_index(tuple(at_SD.T), tuple(cells_D + 1))
        blocks.append(np.eye(int(np.prod(cells_D + 1)))[flat_S])
    return np.concatenate(blocks, axis=1)


def aggregation(groups_S: Numbers) -> np.ndarray:
    """One feature for each group of states [S, F]."""
    groups = np.asarray(groups_S)
    return np.eye(int(groups.max()) + 1)[groups]


def _points(points_SD: Numbers) -> np.ndarray:
    points = np.asarray(points_SD, dtype=float)
    return points[:, None] if points.ndim == 1 else points
