"""Calibration: intervals that hold what they promise, from errors made before the guide was told."""

import numpy as np
import pytest
import torch
from helpers import guide_context

from metricopt_hf import Observation, Round, Trajectory, ValueFunctionGuide
from metricopt_hf.guides.calibration import LEVEL, Calibration
from metricopt_hf.phi import Coordinates
from metricopt_hf.value import ValueNetwork

K = 3


def round_of(step, noise, size=8, shift=0.0):
    rng = np.random.default_rng(step)
    z = rng.normal(size=(size, K)).astype(np.float32)
    scores = z.sum(1) + shift + noise * rng.normal(size=size)
    return [Observation(point, float(score), float("nan"), step, 0.0) for point, score in zip(z, scores, strict=True)]


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_new_observations_lie_in_the_intervals_as_often_as_said(noise):
    shares = []
    for seed in range(4):
        guide, trajectory = ValueFunctionGuide(), Trajectory()
        guide.start(guide_context(Coordinates(torch.zeros(K), None), True, seed))
        for step in range(25):
            trajectory.extend(round_of(100 * seed + step, noise))
            guide.observe(Round(trajectory))
            shares.append(guide.coverage)
    assert shares[0] is None  # there was nothing to predict with
    assert abs(np.mean([share for share in shares if share is not None]) - LEVEL) < 0.05


def test_the_noise_is_the_error_that_disagreement_does_not_explain():
    network, latest = ValueNetwork(K), Trajectory(round_of(0, noise=1.0))
    with torch.no_grad():
        members = network(torch.as_tensor(latest.z))
    mean, variance = members.mean(0).numpy(), members.var(0, correction=0).numpy()
    calibration = Calibration()
    calibration.apply(network)
    assert network.noise == 0  # no evidence: as it was
    calibration.update(network, latest)
    calibration.apply(network)
    expected = np.mean((latest.scores - mean) ** 2 - variance) ** 0.5
    assert network.noise == pytest.approx(expected, rel=1e-4)
    _, std = network.predict(torch.as_tensor(latest.z))
    np.testing.assert_allclose(std.numpy() ** 2, variance + expected**2, rtol=1e-4)


def test_old_rounds_fade():
    network, calibration = ValueNetwork(K), Calibration()
    calibration.update(network, Trajectory(round_of(0, noise=1.0, shift=100.0)))
    for step in range(1, 30):
        calibration.update(network, Trajectory(round_of(step, noise=1.0)))
    calibration.apply(network)
    assert 0 < network.noise < 5


def test_members_that_disagree_more_than_they_err_leave_no_noise():
    network = ValueNetwork(K)
    for weight in network.weights:
        weight.data.mul_(5)
    with torch.no_grad():
        latest = round_of(0, noise=0.0)
        mean, _ = network.predict(torch.as_tensor(np.stack([o.z for o in latest])))
    exact = [Observation(o.z, float(m), o.variance, o.step, o.cost) for o, m in zip(latest, mean, strict=True)]
    calibration = Calibration()
    calibration.update(network, Trajectory(exact))
    calibration.apply(network)
    assert network.noise == 0 and calibration.coverage == 1
