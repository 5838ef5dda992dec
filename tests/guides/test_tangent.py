"""How a summary moves with the coordinates: what is found of a linear map, and what other rows do to it."""

import numpy as np
import torch

from metricopt_hf.guides.tangent import Tangent

K, M = 4, 7


def told(rounds=8, size=16, level=0.5, bend=0.0):
    """Rounds of s = A z, each at a level of its own, at points round one that moves; the tangent and A."""
    rng = np.random.default_rng(0)
    slope, tangent = rng.normal(size=(M, K)), Tangent(K, M)
    for i in range(rounds):
        z = 0.1 * i + 0.2 * rng.normal(size=(size, K))
        s = z @ slope.T + bend * (z**2) @ slope.T + level * rng.normal(size=M)
        tangent.update(z, torch.as_tensor(s, dtype=torch.float32))
    return tangent, torch.as_tensor(slope, dtype=torch.float32)


def test_it_finds_the_slope_whatever_the_levels_of_the_rounds_are():
    tangent, slope = told(level=100.0)
    assert torch.allclose(tangent.slope, slope, atol=0.05)


def test_a_slope_over_all_points_at_once_would_not_be_found():
    """Broken on purpose: as one regression that takes the levels for a part of the slope."""
    whole = Tangent(K, M)
    rng = np.random.default_rng(0)
    slope = rng.normal(size=(M, K))
    z = np.concatenate([0.1 * i + 0.2 * rng.normal(size=(16, K)) for i in range(8)])
    s = z @ slope.T + np.repeat(100.0 * rng.normal(size=(8, M)), 16, axis=0)
    whole.update(z, torch.as_tensor(s, dtype=torch.float32))
    assert not torch.allclose(whole.slope, torch.as_tensor(slope, dtype=torch.float32), atol=1.0)


def test_rounds_of_few_points_are_pooled():
    tangent, slope = told(rounds=12, size=3, level=0.0)
    assert torch.allclose(tangent.slope, slope, atol=0.2)


def test_it_tells_the_summary_near_the_last_points():
    tangent, slope = told(level=0.0)
    z = torch.full((K,), 0.7)
    assert torch.allclose(tangent.at(z), slope @ z, atol=0.1)


def test_one_point_says_where_it_is_and_not_where_to_go():
    tangent = Tangent(K, M)
    tangent.update(np.ones((1, K)), torch.ones(1, M))
    assert torch.equal(tangent.slope, torch.zeros(M, K)) and torch.equal(tangent.at(torch.zeros(K)), torch.ones(M))


def test_its_state_goes_on():
    first, _ = told(rounds=3)
    second = Tangent(K, M)
    second.load_state_dict(first.state_dict())
    z, s = np.random.default_rng(1).normal(size=(8, K)), torch.randn(8, M)
    for tangent in (first, second):
        tangent.update(z, s)
    assert torch.equal(first.slope, second.slope) and torch.equal(first.s, second.s)
