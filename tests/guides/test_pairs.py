"""Pairs: the slope of a linear metric, whatever calls fail, with or without a linearization."""

import numpy as np
import torch
from local_metrics import SPREAD, Local, cosine, right_probability, seeded, started, taught

from metricopt_hf.guides import PairsGuide


def mean_margin(prediction) -> float:
    """Linear in the outputs, and so in z."""
    logits = prediction.predictions
    signs = 2 * prediction.label_ids - 1
    return float((signs * (logits[:, 1] - logits[:, 0])).mean())


def true_slope(local):
    jacobian = local.linearization.decisions.jacobian
    return ((2 * local.labels - 1)[:, None] * (jacobian[:, 1] - jacobian[:, 0])).mean(0)


def test_it_finds_the_slope_of_a_linear_metric():
    local = Local(mean_margin)
    guide = taught(started(PairsGuide(count=64), local), local, updates=1)
    assert cosine(guide.gradient(torch.zeros(local.dim)), true_slope(local)) > 0.8


def test_without_a_linearization_each_call_is_a_pass_and_phi_stays():
    local = Local(right_probability, linearised=False)
    before = local.evaluator.phi.read()
    guide = taught(started(PairsGuide(count=16), local), local, updates=1)
    assert local.ledger.passes["observe"] == local.ledger.calls["observe"] == 32
    assert torch.equal(local.evaluator.phi.read(), before)
    assert cosine(guide.gradient(torch.zeros(local.dim)), local.slope(100)) > 0.3


def test_its_calls_are_antithetic_and_on_one_half_of_the_rows():
    seen = []

    def watched(prediction):
        seen.append(prediction.predictions)
        return mean_margin(prediction)

    local = Local(watched)
    z, calls = torch.full((local.dim,), 0.1), len(seen)
    taught(started(PairsGuide(count=3), local), local, updates=1, z=z)
    assert len(seen) == calls + 6 and all(len(logits) == 30 for logits in seen[calls:])
    first, second = np.stack(seen[calls : calls + 3]), np.stack(seen[calls + 3 :])
    np.testing.assert_allclose(first + second, np.broadcast_to((first + second)[:1], first.shape), atol=1e-5)
    assert len(local.trajectory) == 6
    spread = float((local.trajectory.z - local.metric().origin - 0.1).std(correction=0))
    assert 0.3 * SPREAD < spread < 3 * SPREAD


def test_a_pair_of_which_an_end_failed_says_nothing():
    local, metric = Local(mean_margin), None
    metric = local.metric()
    offsets = torch.randn(4, local.dim, generator=seeded(1))
    metric.draw = lambda count: offsets
    values = metric.values
    metric.values = lambda z: np.where(np.arange(8) == 1, np.nan, values(z))
    guide = started(PairsGuide(count=4), local)
    guide.fit(metric, torch.zeros(local.dim))
    differences = [2 * float(true_slope_of(metric, offset)) for offset in offsets]
    differences[1] = 0.0
    expected = torch.tensor(differences) @ offsets
    assert torch.allclose(guide.gradient(torch.zeros(local.dim)), expected, rtol=1e-3, atol=1e-4)


def true_slope_of(metric, offset):
    leaf, labels = metric.part.decisions, torch.as_tensor(metric.part.centre.label_ids)
    moved = leaf.jacobian @ offset
    return ((2 * labels - 1) * (moved[:, 1] - moved[:, 0])).mean()
