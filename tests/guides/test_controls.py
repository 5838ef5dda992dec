"""Controls: as many calls as the guide that they stand beside, and nothing of what those say."""

import numpy as np
import torch
from local_metrics import Local, cosine, right_probability, started, taught

from metricopt_hf.guides import PairsGuide, RandomGuide, ShuffledGuide


def test_shuffled_makes_the_calls_of_pairs_at_the_same_points():
    points = []
    for guide in (PairsGuide(), ShuffledGuide()):
        local = Local(right_probability)
        taught(started(guide, local), local, updates=2)
        points.append(local.trajectory.z.clone())
    assert np.array_equal(*points)


def test_shuffled_knows_nothing_of_the_slope():
    found = []
    for seed in range(20):
        local = Local(right_probability, seed=seed)
        guide = taught(started(ShuffledGuide(), local, seed), local, updates=1)
        found.append(cosine(guide.gradient(torch.zeros(local.dim)), local.slope(50)))
    assert abs(np.mean(found)) < 3 * np.std(found) / 20**0.5


def test_random_makes_no_call_and_keeps_its_direction():
    local = Local()
    guide = taught(started(RandomGuide(), local), local, updates=1)
    first = guide.gradient(torch.zeros(local.dim))
    taught(guide, local, updates=3)
    assert local.ledger.calls["observe"] == 0 and torch.equal(guide.gradient(torch.ones(local.dim)), first)
