"""The blend: how long the value gradient is beside the task gradient."""

import pytest
import torch

from metricopt_hf.guides.blend import correction

G, V = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, -0.2, 0.0])


def test_its_length_is_weight_times_trust_times_the_task_gradients():
    added = correction(G, V, trust=0.5, weight=3.0)
    assert torch.allclose(added, torch.tensor([0.0, -7.5, 0.0]))


def test_the_unit_of_the_metric_does_not_matter_and_that_of_the_loss_carries_over():
    added = correction(G, V, 0.5, 3.0)
    assert torch.allclose(correction(G, 1e6 * V, 0.5, 3.0), added)
    assert torch.allclose(correction(65536 * G, V, 0.5, 3.0), 65536 * added)


@pytest.mark.parametrize(
    ("task", "value", "trust", "weight"),
    [
        (0 * G, V, 1.0, 1.0),
        (G, 0 * V, 1.0, 1.0),
        (G, V, 0.0, 1.0),
        (G, V, 1.0, 0.0),
        (G, V * float("nan"), 1.0, 1.0),
        (G, torch.tensor([0.0, float("inf"), 0.0]), 1.0, 1.0),
    ],
    ids=["no task gradient", "no value gradient", "no trust", "no weight", "nan direction", "infinite direction"],
)
def test_there_are_cases_in_which_nothing_is_added(task, value, trust, weight):
    assert torch.equal(correction(task, value, trust, weight), torch.zeros(3))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_of_the_task_gradient_shows(bad):
    assert not correction(torch.tensor([bad, 1.0, 1.0]), V, 0.5, 1.0).isfinite().all()
