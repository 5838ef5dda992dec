"""Compact coordinates: projections of phi, and where their bases come from."""

import pytest
import torch
from helpers import Quadratic

from metricopt_hf import Subset
from metricopt_hf.phi import Coordinates, gradient_pca, group_gradients, make_coordinates, random_basis

NAN = float("nan")


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


@pytest.mark.parametrize("make", [lambda g: gradient_pca(g, 2), group_gradients], ids=["pca", "groups"])
def test_batches_of_nan_infinity_or_nothing_are_left_out(make):
    good = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    bad = torch.stack([torch.full((5,), value) for value in (NAN, torch.inf, -torch.inf, 0.0)])
    bad = torch.cat([bad, torch.tensor([[1.0, NAN, 0, 0, 0]])])
    assert torch.equal(make(torch.cat([bad, good, bad])), make(good))
    assert make(bad) is None


@pytest.mark.parametrize("kind", ["gradient_pca", "group_gradients"])
@pytest.mark.parametrize("factor", [NAN, torch.inf, 0.0])
def test_where_no_batch_has_a_gradient_the_coordinates_are_random_and_it_is_said(kind, factor, caplog):
    phi = Subset(Quadratic(), "w")

    def loss(batch):
        return phi.model(batch)["loss"] * factor

    def coordinates(kind):
        return make_coordinates(
            kind, phi, 9, torch.Generator().manual_seed(0), lambda n: [torch.ones(2, 6)] * n,
            lambda: [torch.ones(2, 6)], loss,
        )  # fmt: skip

    found = coordinates(kind)
    assert found.kind == "random" and torch.equal(found.basis, coordinates("random").basis) and found.dim == 6
    assert len(caplog.messages) == 1 and f"coordinates={kind!r}" in caplog.text and "random" in caplog.text


def test_no_more_gradients_are_computed_than_phi_has_numbers_for():
    asked = []
    make_coordinates(
        "gradient_pca", Subset(Quadratic(), "w"), 1000, torch.Generator(),
        lambda n: asked.append(n) or [], lambda: [], None,
    )  # fmt: skip
    assert asked == [6 * 12]


def test_a_random_basis_comes_from_its_generator():
    first, again, other = (random_basis(9, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.allclose(first.T @ first, torch.eye(4), atol=1e-6)
    assert random_basis(3, 10, torch.Generator()).shape == (3, 3)
