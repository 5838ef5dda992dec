"""The blend of the value gradient with the loss gradient: its length, its units, and what says nothing."""

import math

import pytest
import torch

from metricopt_hf.guides import blended

ASCENT, LOSS = torch.tensor([0.0, -0.2, 0.0]), torch.tensor([3.0, 4.0, 0.0])


def test_the_value_gradient_is_weight_times_as_long_as_the_loss_gradient():
    for weight in (0.5, 3.0):
        expected = weight * torch.tensor([0.0, -1.0, 0.0]) - torch.tensor([0.6, 0.8, 0.0])
        assert torch.allclose(blended(ASCENT, LOSS, weight), expected / expected.norm())


@pytest.mark.parametrize("weight", [0.0, 1.0, math.inf])
def test_no_unit_matters_and_the_length_is_one(weight):
    found = blended(ASCENT, LOSS, weight)
    assert torch.allclose(blended(1e6 * ASCENT, 1e-6 * LOSS, weight), found)
    assert float(found.norm()) == pytest.approx(1, abs=1e-6)


def test_with_an_infinite_weight_the_loss_has_no_say():
    assert torch.equal(blended(ASCENT, LOSS, math.inf), blended(ASCENT, None, 1.0))


def test_with_no_weight_the_value_has_no_say():
    assert torch.allclose(blended(ASCENT, LOSS, 0.0), -LOSS / 5)


@pytest.mark.parametrize("nothing", [torch.zeros(3), torch.full((3,), math.nan), torch.tensor([math.inf, 0.0, 0.0])])
def test_what_is_zero_or_not_finite_says_nothing(nothing):
    assert torch.allclose(blended(nothing, LOSS, 1.0), -LOSS / 5)
    assert torch.allclose(blended(ASCENT, nothing, 1.0), ASCENT / 0.2)
    assert torch.equal(blended(nothing, nothing, 1.0), torch.zeros(3))


def test_tiny_and_huge_gradients_keep_their_direction():
    for scale in (1e-30, 1e30):
        assert torch.allclose(blended(scale * ASCENT, None, math.inf), ASCENT / 0.2)
