"""The value function as a guide: what it keeps, what it starts from."""

import torch
from local_metrics import Local, cosine, right_probability, seeded, started, taught

from metricopt_hf.guides import GuideContext, ValueFunctionGuide, value_function
from metricopt_hf.value import ValueNetwork, fit


def test_it_is_fitted_to_the_latest_observations(monkeypatch):
    monkeypatch.setattr(value_function, "MOST", 12)
    local = Local(right_probability)
    guide = taught(started(ValueFunctionGuide(), local), local, updates=3)
    assert len(guide.z) == len(guide.values) == 12


def test_a_given_network_is_what_it_starts_from_and_stays_as_it_was():
    local = Local(right_probability)
    slope, given = local.slope(), ValueNetwork(local.dim, hidden_size=8)
    z = torch.randn(60, local.dim, generator=seeded())
    fit(given, z, z @ slope, seeded())
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    guide = ValueFunctionGuide()
    guide.start(GuideContext(local.dim, seeded(), given))
    zero = torch.zeros(local.dim)
    assert cosine(guide.gradient(zero), slope) > 0.9
    taught(guide, local, updates=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert guide.network.hidden_size == 8 and torch.equal(guide.network.z_mean, given.z_mean)  # not standardised anew
