"""Compact coordinates: projections of phi, and where their bases come from."""

import pytest
import torch

from metricopt_hf.phi import Coordinates
from metricopt_hf.phi import coordinates as module
from metricopt_hf.phi.coordinates import MOST_EXACT, OVERSAMPLED, Sketch, random_directions

NAN = float("nan")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def projector(basis):
    return basis @ basis.T


def test_a_step_in_the_coordinates_is_that_step_in_phi():
    c = Coordinates(torch.randn(12), random_directions(12, 4, generator()))
    z = torch.randn(4)
    assert c.dim == 4 and torch.equal(c.encode(c.origin), torch.zeros(4))
    assert torch.allclose(c.encode(c.origin + c.lift(z)), z, atol=1e-6)


def directions(jacobian, dim, parts=1):
    """Of rows [n, d], or of several outputs of each [n, outputs, d], taken in part by part."""
    jacobian = jacobian[:, None] if jacobian.dim() == 2 else jacobian
    sketch = Sketch(jacobian.shape[-1], dim)
    for part in jacobian.chunk(parts):
        sketch.add(part)
    return sketch.directions()


@pytest.mark.parametrize("shape", [(3, 20), (40, 20)], ids=["wide", "tall"])
@pytest.mark.parametrize("most_exact", [20, 19])
def test_directions_are_those_of_the_leading_singular_values(shape, most_exact, monkeypatch):
    monkeypatch.setattr(module, "MOST_EXACT", most_exact)
    rows = torch.randn(shape[0], 12) @ torch.randn(12, shape[1])
    basis = directions(rows, 3, parts=3)
    expected = torch.linalg.svd(rows).Vh[:3].T
    assert basis.shape == (20, 3) and basis.dtype == torch.float32
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)
    assert torch.allclose(projector(basis), projector(expected), atol=1e-4)


def test_of_a_wide_phi_directions_hold_nearly_as_much_in_memory_that_is_linear():
    torch.manual_seed(0)
    scales = 1 / torch.arange(1.0, 301)  # a spectrum that falls slowly
    rows = torch.randn(300, 300) * scales @ torch.linalg.qr(torch.randn(MOST_EXACT + 1, 300)).Q.T
    sketch = Sketch(MOST_EXACT + 1, 16)
    sketch.add(rows[:, None])
    assert sketch.sum.shape == (MOST_EXACT + 1, 16 + OVERSAMPLED)
    held = (rows @ sketch.directions()).square().sum()
    most = torch.linalg.svdvals(rows)[:16].square().sum()
    at_random = (rows @ random_directions(MOST_EXACT + 1, 16, generator())).square().sum()
    assert held > 0.98 * most and at_random < 0.1 * most


def test_there_are_no_more_directions_than_rows_differ():
    assert directions(torch.randn(6, 2) @ torch.randn(2, 30), 5).shape == (30, 2)
    assert directions(torch.randn(1, 2) * torch.ones(50, 1), 5).shape == (2, 1)
    assert directions(torch.randn(6, 2) @ torch.randn(2, MOST_EXACT + 1), 5).shape == (MOST_EXACT + 1, 2)


def test_rows_of_nan_infinity_or_nothing_are_left_out():
    good = torch.randn(4, 5, generator=generator())
    bad = torch.stack([torch.full((5,), value) for value in (NAN, torch.inf, -torch.inf, 0.0)])
    bad = torch.cat([bad, torch.tensor([[1.0, NAN, 0, 0, 0]])])
    assert torch.allclose(directions(torch.cat([bad, good, bad]), 2), directions(good, 2), atol=1e-6)
    assert directions(bad, 2) is None and directions(bad[:0], 2) is None


def test_sums_of_several_ranks_add_up():
    rows, first, second = torch.randn(20, 3, 8), Sketch(8, 4), Sketch(8, 4)
    first.add(rows[:9])
    second.add(rows[9:])
    first.sum = first.sum + second.sum
    assert torch.allclose(first.directions(), directions(rows, 4), atol=1e-5)


def test_what_moves_all_outputs_alike_decides_nothing():
    common, apart = torch.zeros(6, 3, 4), torch.zeros(6, 3, 4)
    common[..., 0] = 100.0
    apart[:, 0, 2] = torch.randn(6)
    assert torch.allclose(projector(directions(common + apart, 1)).diag(), torch.eye(4)[2], atol=1e-5)
    assert torch.allclose(projector(directions(common[:, :1], 1)).diag(), torch.eye(4)[0], atol=1e-5)


def test_random_directions_come_from_their_generator():
    first, again, other = (random_directions(9, 4, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.allclose(first.T @ first, torch.eye(4), atol=1e-6)
    assert random_directions(3, 10, generator()).shape == (3, 3)
