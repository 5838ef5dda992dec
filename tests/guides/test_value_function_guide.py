"""What is particular to our guides: how the value function is followed, and by whom it is judged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from teaching import SLOPE, D, K, Truth, Wrong, started, taught, trusted

from metricopt_hf import (
    BehaviourGuide,
    BridgeGuide,
    ConfigurationError,
    LossAlignmentGuide,
    RandomGuide,
    Trajectory,
    ValueFunctionGuide,
)
from metricopt_hf.guides import GUIDES, ShuffledGuide, from_spec
from metricopt_hf.guides.blend import correction
from metricopt_hf.guides.trust import NOT_PREDICTIVE, PREDICTIVE
from metricopt_hf.phi import Coordinates
from metricopt_hf.value import ValueNetwork


@pytest.mark.parametrize("greater_is_better", [True, False])
@pytest.mark.parametrize(
    "make",
    [ValueFunctionGuide, lambda: ValueFunctionGuide(ValueNetwork(K, hidden_size=8)), Truth],
    ids=["value function", "value function given", "user's"],
)
def test_a_step_against_the_direction_improves_the_metric(make, greater_is_better):
    guide = started(make(), greater_is_better)
    taught(guide)
    direction = guide.direction(guide.context.coordinates.origin)
    assert direction.reason == PREDICTIVE and direction.trust > 0.3
    improvement = guide.context.coordinates.basis.T @ -direction.vector @ torch.as_tensor(SLOPE)
    assert improvement * (1 if greater_is_better else -1) > 0


def test_a_guide_that_predicts_the_opposite_is_not_followed():
    guide = started(Wrong())
    taught(guide)
    assert guide.direction(torch.zeros(D)).trust == 0
    assert guide.direction(torch.zeros(D)).reason == NOT_PREDICTIVE


def test_it_is_followed_less_where_it_is_not_certain():
    class Doubtful(Truth):
        def gradient_agreement(self, phi):
            return float(phi[0])

    guide = trusted(started(Doubtful()))
    full = trusted(started(Truth())).direction(torch.zeros(D))
    for gradient_agreement in (1.0, 0.25, 0.0):
        direction = guide.direction(torch.full((D,), gradient_agreement))
        assert direction.trust == pytest.approx(gradient_agreement * full.trust)
        assert torch.equal(direction.vector, full.vector)


def test_a_value_function_is_as_certain_as_its_members_agree():
    guide = started(ValueFunctionGuide())
    taught(guide)
    phi = torch.randn(D)
    agreement = float(guide.network.agreement(guide.context.coordinates.encode(phi)))
    assert 0 < agreement < 1 and guide.gradient_agreement(phi) == pytest.approx(agreement)
    assert trusted(guide).direction(phi).trust == pytest.approx(agreement * guide.standing[0])


def test_guides_that_know_nothing_are_followed_less_than_one_that_learns():
    def mean_trust(name):
        guide, values = started(from_spec(name)), []
        trajectory = Trajectory()
        for step in range(8):
            taught(guide, 1, first=step, trajectory=trajectory, noise=0.5)
            values.append(guide.direction(torch.zeros(D)).trust)
        return np.mean(values)

    assert mean_trust("value_function") > 0.3 > 2 * max(mean_trust("shuffled"), mean_trust("random"))


def test_a_value_function_of_another_size_is_refused():
    with pytest.raises(ConfigurationError, match="3 coordinates, this phi 4"):
        started(ValueFunctionGuide(ValueNetwork(3)))


def test_a_string_names_a_guide():
    given = ValueNetwork(K)
    kinds = {
        "random": RandomGuide,
        "shuffled": ShuffledGuide,
        "value_function": ValueFunctionGuide,
        "behaviour": BehaviourGuide,
        "bridge": BridgeGuide,
        "loss_alignment": LossAlignmentGuide,
    }
    assert {name: type(from_spec(name)) for name in GUIDES} == kinds
    guide = started(from_spec("value_function", given))
    assert guide.predict(np.zeros((2, K), np.float32)).shape == (2,)
    assert guide.network is not given  # fitted on, it would not be what its owner passed
    with pytest.raises(ConfigurationError, match="value_function, behaviour, shuffled, random"):
        from_spec("evolution")


def test_what_it_has_fitted_is_told_once_it_is_fitted():
    guide = started(ValueFunctionGuide())
    assert guide.network is None and guide.predict(np.zeros((2, K), np.float32)) is None
    taught(guide, rounds=1)
    assert guide.network.num_coordinates == K
    assert started(Truth()).network is None


def test_a_step_waits_for_no_device():
    """On the meta device nothing can be asked for its numbers, as on an accelerator nothing should be."""
    guide = trusted(started(ValueFunctionGuide()))
    taught(guide)
    expected = guide.direction(torch.zeros(D))
    here = guide.context.coordinates
    there = Coordinates(here.origin.to("meta"), here.basis.to("meta"))
    guide.context = replace(guide.context, coordinates=there)
    direction = guide.direction(torch.zeros(D, device="meta"))
    added = correction(torch.ones(D, device="meta"), direction.vector, direction.trust, 3.0)
    assert added.device.type == "meta" and added.shape == (D,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(direction.trust)
    guide.context = replace(guide.context, coordinates=here)
    again = guide.direction(torch.zeros(D))
    assert torch.equal(again.vector, expected.vector) and torch.equal(again.trust, expected.trust)


def test_the_copy_on_another_device_is_of_the_last_fit():
    guide = started(ValueFunctionGuide())
    taught(guide)
    first = guide._network_on(torch.device("meta"))
    assert guide._network_on(torch.device("meta")) is first
    taught(guide)
    assert guide._network_on(torch.device("meta")) is not first
