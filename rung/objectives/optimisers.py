"""Stochastic approximation: step-size rules, and the iterations whose limit they decide.

w <- w - a_k g(w, noise) finds a root of E[g] if g rises through it, the noise has bounded variance, and

    sum of a_k = infinity    (any distance can be travelled)
    sum of a_k^2 < infinity  (the noise dies out)                                            [Robbins & Monro 1951]

`harmonic` meets both; `power(p)` for 1/2 < p <= 1; `constant` fails the second: it follows what drifts, and ends in a
cloud of width of order sqrt(a) around the root.                                       [Zhao 2025, chapter 6; S & B 2.5]
"""

from collections.abc import Callable, Iterator

import torch

from rung.core.shapes import Float, Tensor

Rule = Callable[[Tensor], Tensor]  # how often before and now, 1, 2, ... -> step size


def constant(size: float) -> Rule:
    """Always the same."""
    return lambda count_N: torch.full(count_N.shape, size, dtype=torch.float64)


def power(exponent: float, scale: float = 1.0) -> Rule:
    """scale / k^exponent."""
    return lambda count_N: scale * count_N.double() ** -exponent


def harmonic(scale: float = 1.0) -> Rule:
    """scale / k; with scale 1, `w += (x - w) / k` is the mean of all x so far."""
    return power(1.0, scale)


def robbins_monro(
    noisy: Callable[[Float[Tensor, "N"], int], Float[Tensor, "N"]], start_N: Float[Tensor, "N"], rule: Rule
) -> Iterator[Float[Tensor, "N"]]:
    """w_1 = start_N, w_{k+1} = w_k - a_k noisy(w_k, k), lane by lane; yields w_2, w_3, ... without end.

    With `noisy` the gradient of one sample this is stochastic gradient descent, with the mean over m of them mini-batch
    descent, with w - x the incremental mean."""
    w_N, k = start_N, 0
    while True:
        k += 1
        w_N = w_N - rule(torch.full(w_N.shape, k)) * noisy(w_N, k)
        yield w_N
