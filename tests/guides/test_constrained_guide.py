"""The guide of a metric with constraints: to where they hold first, and only then to where the metric is better."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import guide_context
from teaching import D, K, coordinates

from metricopt_hf import Observation, Round, Trajectory, ValueFunctionGuide
from metricopt_hf.evaluation import constraints
from metricopt_hf.guides import ConstrainedGuide
from metricopt_hf.training import checkpoint

BOUNDS = constraints.parse("up>=0.5, down<=0.5")
UP, DOWN, BETTER = np.eye(K)[:3]  # which way each number rises


def made(cls=ConstrainedGuide):
    guide = cls(ValueFunctionGuide(), BOUNDS, [ValueFunctionGuide() for _ in BOUNDS])
    guide.start(guide_context(coordinates()))
    return guide


def taught(guide, up, down, rounds=4):
    """By rounds round the origin, where the constraints' numbers are `up` and `down`."""
    rng, trajectory = np.random.default_rng(0), Trajectory()
    for step in range(rounds):
        half = rng.normal(size=(6, K)).astype(np.float32)
        z = np.concatenate([half, -half])
        raw = [(up + x @ UP, down + x @ DOWN) for x in z]
        trajectory.extend([Observation(x, x @ BETTER, np.nan, step, 0.0, raw=r) for x, r in zip(z, raw, strict=True)])
        guide.observe(Round(trajectory))
    return guide


def towards(guide):
    """Where a step along its answer goes, in the coordinates."""
    answer = guide.direction(torch.zeros(D))
    assert answer.trust > 0.3
    z = guide.context.coordinates.encode(guide.context.coordinates.origin - answer.vector).numpy()
    return z / np.linalg.norm(z)


def test_where_all_hold_the_metric_is_followed():
    guide = taught(made(), up=0.7, down=0.2)
    assert guide.violated == [] and towards(guide) @ BETTER > 0.9
    assert "towards" not in guide.standing[1]


@pytest.mark.parametrize(
    ("up", "down", "expected", "told"),
    [(0.3, 0.2, UP, "up>=0.5"), (0.7, 0.9, -DOWN, "down<=0.5"), (0.3, 0.9, (UP - DOWN) / 2**0.5, "up>=0.5, down<=0.5")],
)
def test_elsewhere_those_that_do_not_hold(up, down, expected, told):
    guide = taught(made(), up, down)
    assert towards(guide) @ expected > 0.9
    assert guide.standing[1].endswith(f"towards {told}")


def test_a_guide_that_never_looks_at_them_goes_elsewhere():
    class Blind(ConstrainedGuide):
        violated = ()

    assert towards(taught(made(Blind), up=0.3, down=0.2)) @ UP < 0.5


def test_each_is_trusted_by_what_it_predicts_itself():
    guide = made()
    rng, trajectory = np.random.default_rng(1), Trajectory()
    for step in range(5):
        z = rng.normal(size=(12, K)).astype(np.float32)
        trajectory.extend([Observation(x, x @ BETTER, np.nan, step, 0.0, raw=(rng.normal() - 3, 0.0)) for x in z])
        guide.observe(Round(trajectory))
    assert guide.violated == [0] and guide.objective.standing[0] > 0.5
    assert guide.standing[0] < 0.3 and guide.direction(torch.zeros(D)).trust < 0.3


def test_switched_off_it_is_not_followed_and_its_state_comes_back(tmp_path):
    guide = taught(made(), up=0.3, down=0.9)
    checkpoint.save(guide.state_dict(), tmp_path)
    again = made()
    again.load_state_dict(checkpoint.load(tmp_path))
    assert again.violated == guide.violated and again.standing == guide.standing
    assert torch.equal(again.direction(torch.zeros(D)).vector, guide.direction(torch.zeros(D)).vector)
    guide.switch_off("a fault")
    assert guide.standing[0] == 0 and guide.direction(torch.zeros(D)).trust == 0


class Reads(ValueFunctionGuide):
    """Keeps the scores that it is told of predictions."""

    wants_predictions = True

    def learn(self, observed):
        self.told = observed.scores


@pytest.mark.parametrize("is_real", [True, False])
def test_a_guard_that_reads_predictions_is_told_its_own_number_of_them(is_real):
    guide = ConstrainedGuide(Reads(), BOUNDS, [Reads() for _ in BOUNDS])
    guide.start(guide_context(coordinates()))
    z = np.random.default_rng(0).normal(size=(3, K)).astype(np.float32)
    new = Trajectory([Observation(x, 1.0, np.nan, 0, 0.0, raw=(0.25, 0.75)) for x in z])
    old = Trajectory([Observation(x + 1, 2.0, np.nan, 0, 0.0, raw=(5.0, 6.0)) for x in z])
    real, interpolated = (new, old) if is_real else (old, new)
    guide.observe(Round(real, interpolated, [None] * 3, np.ones(3), is_real, z))
    assert guide.objective.told.tolist() == [1.0] * 3
    assert [guard.told.tolist() for guard in guide.guards] == [[0.25] * 3, [0.75] * 3]


def test_a_guard_that_asks_the_metric_hears_of_its_own_number():
    guide = ConstrainedGuide(ValueFunctionGuide(), BOUNDS, [ValueFunctionGuide() for _ in BOUNDS])

    class Answer(float):
        values = (0.25, 0.75)

    guide.start(replace(guide_context(coordinates()), metric=lambda prediction: Answer(0.5)))
    assert [guard.context.metric(None) for guard in guide.guards] == [0.25, 0.75]
    assert [guard.context.greater_is_better for guard in guide.guards] == [True, False]
