"""Compact coordinates: projections of phi, and where their bases come from."""

import pytest
import torch

from metricopt_hf.errors import ConfigurationError
from metricopt_hf.phi import Coordinates, gradient_pca, group_gradients, random_basis


def coordinates(kind, d=12, k=4):
    origin = torch.randn(d)
    return Coordinates(origin, None if kind == "identity" else random_basis(d, k, torch.Generator().manual_seed(0)))


def projector(basis):
    return basis @ basis.T


@pytest.mark.parametrize("kind", ["basis", "identity"])
def test_a_step_in_the_coordinates_is_that_step_in_phi(kind):
    c = coordinates(kind)
    z = torch.randn(c.dim)
    assert c.dim == (12 if kind == "identity" else 4)
    assert torch.allclose(c.encode(c.origin), torch.zeros(c.dim))
    assert torch.allclose(c.encode(c.origin + c.lift(z)), z, atol=1e-6)


@pytest.mark.parametrize("kind", ["basis", "identity"])
def test_a_gradient_in_the_coordinates_lifts_to_the_gradient_in_phi(kind):
    c = coordinates(kind)
    phi = torch.randn(12, requires_grad=True)
    z = c.encode(phi)
    z.square().sum().backward()
    assert torch.allclose(c.lift(2 * z.detach()), phi.grad, atol=1e-5)


@pytest.mark.parametrize("make", [lambda g: gradient_pca(g, 3), group_gradients], ids=["pca", "groups"])
def test_bases_are_orthonormal_and_span_the_gradients(make):
    directions = torch.randn(3, 20)
    gradients = torch.eye(3) @ directions
    basis = make(gradients)
    assert basis.shape == (20, 3) and basis.dtype == torch.float32
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-6)
    assert torch.allclose(projector(basis) @ gradients.T, gradients.T, atol=1e-5)


def test_pca_takes_the_strongest_directions_and_keeps_the_mean():
    scales = torch.tensor([0.0, 3.0, 0.3, 0.0])
    gradients = torch.randn(200, 4) * scales + torch.tensor([10.0, 0.0, 0.0, 0.0])
    basis = gradient_pca(gradients, 2)
    assert torch.allclose(projector(basis).diag(), torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=0.01)


def test_there_are_no_more_coordinates_than_gradients_differ():
    gradients = torch.randn(6, 2) @ torch.randn(2, 30)
    assert gradient_pca(gradients, 5).shape == (30, 2)


def test_a_quiet_group_counts_as_much_as_a_loud_one():
    loud, quiet = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e-6, 0.0]])
    assert torch.allclose(projector(group_gradients(torch.cat([loud, quiet]))), torch.diag(torch.tensor([1.0, 1, 0])))


def test_a_group_without_a_gradient_is_left_out():
    assert group_gradients(torch.stack([torch.zeros(5), torch.ones(5)])).shape == (5, 1)


def test_no_gradient_at_all_is_an_error():
    with pytest.raises(ConfigurationError, match="depend on phi"):
        gradient_pca(torch.zeros(4, 5), 2)


def test_a_random_basis_comes_from_its_generator():
    first, again, other = (random_basis(9, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.allclose(first.T @ first, torch.eye(4), atol=1e-6)
    assert random_basis(3, 10, torch.Generator()).shape == (3, 3)
