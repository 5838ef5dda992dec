"""A network of a metric of which smaller is better, for a guide that goes up."""

import torch

from metricopt_hf.value import ValueNetwork, fit


def test_it_predicts_the_negative_and_its_gradient_points_the_other_way():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 3, generator=generator)
    network = ValueNetwork(3)
    fit(network, z, 2 * z[:, 0] + 5, generator)
    points = z[:7]
    negated = network.negated()
    assert torch.allclose(negated.predict(points)[0], -network.predict(points)[0], atol=1e-5)
    assert torch.allclose(negated.gradient(points), -network.gradient(points), atol=1e-6)
    assert network.gradient(points)[:, 0].min() > 0
