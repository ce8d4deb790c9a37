"""Stochastic approximation: exact identities of the iterations, and the roots that the book prints."""

import math

import pytest
import torch

from rung.core.rng import uniforms
from rung.objectives.optimisers import constant, harmonic, power, robbins_monro


def after(generator, count: int):
    for _ in range(count - 1):
        next(generator)
    return next(generator)


def normals(lanes: int, k: int) -> torch.Tensor:
    """Standard normal noise of iteration k [Box & Muller]."""
    u = uniforms(torch.arange(lanes), torch.full((lanes,), k), torch.arange(2))
    return (-2 * u[:, 0].log()).sqrt() * (2 * math.pi * u[:, 1]).cos()


def test_the_harmonic_rule_is_the_running_mean():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = robbins_monro(lambda w, k: w - x[k - 1], torch.full((3,), 7.0, dtype=torch.float64), harmonic())
    for k in range(1, 51):
        assert torch.allclose(next(path), x[:k].mean(0))


def test_a_constant_step_forgets_at_its_own_rate():
    path = robbins_monro(lambda w, k: w, torch.ones(1, dtype=torch.float64), constant(0.1))
    assert after(path, 10).item() == pytest.approx(0.9**10)


def test_the_cube_root_of_five_is_found_under_noise():
    """Zhao, figure 6.3: g(w) = w^3 - 5 with noise N(0, 1), held in [0.5, 3], since w^3 rises faster than is allowed.

    With steps a / k and slope g' = 3 * 5^(2/3) the iterates end about normal with variance a^2 / ((2 a g' - 1) k) and a
    mean that is off by g'' / 2g' times that, 5e-6 [Fabian 1968].  200 lanes: mean and deviation lie within six standard
    errors, of a tenth of the latter besides (4e-9 both).  Catches: a step that is not used, a sum where the noise does
    not average out."""
    path = robbins_monro(
        lambda w, k: w.clamp(0.5, 3) ** 3 - 5 + normals(200, k), torch.ones(200, dtype=torch.float64), power(1.0, 0.3)
    )
    found, deviation = after(path, 3000), (0.3**2 / ((2 * 0.3 * 3 * 5 ** (2 / 3) - 1) * 3000)) ** 0.5
    assert abs(found.mean().item() - 5 ** (1 / 3)) < 6 * deviation / 200**0.5 + 1e-5
    assert found.std().item() == pytest.approx(deviation, rel=0.1 + 6 / 400**0.5)


def test_tanh_is_solved_without_noise_from_the_books_start():
    """Figure 6.4: g = tanh(w - 1), w1 = 3, a_k = 1 / k."""
    path = robbins_monro(lambda w, k: (w - 1).tanh(), torch.tensor([3.0], dtype=torch.float64), harmonic())
    first = next(path).item()
    assert first == pytest.approx(3 - math.tanh(2))
    assert after(path, 20_000).item() == pytest.approx(1.0, abs=1e-3)


def test_a_constant_step_keeps_a_cloud_and_a_falling_one_does_not():
    """w -> w - a (w - noise): the variance is a / (2 - a) for a constant step, and 1 / k for 1 / k.

    That of 4000 lanes has the relative standard error sqrt(2 / 4000); six of them, twice: 4e-9.  Catches: rules that
    are swapped, a constant that is halved."""
    lanes = 4000
    start = torch.zeros(lanes, dtype=torch.float64)
    cloud = after(robbins_monro(lambda w, k: w - normals(lanes, k), start, constant(0.2)), 200)
    point = after(robbins_monro(lambda w, k: w - normals(lanes, k), start, harmonic()), 200)
    for found, variance in ((cloud, 0.2 / 1.8), (point, 1 / 200)):
        assert found.var().item() == pytest.approx(variance, rel=6 * math.sqrt(2 / lanes))
