"""The observer: rounds of antithetic points, phi put back, the same on every rank."""

import numpy as np
import pytest
import torch
from torch import nn

from metricopt_hf import Ledger, Metric, MetricError, Subset
from metricopt_hf.evaluation import evaluator
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator
from metricopt_hf.evaluation.observer import Observer, pair_variance
from metricopt_hf.phi import Coordinates, random_basis

D, K = 10, 4


class Score:
    """A metric that is linear in phi, which it is given as the prediction; fails where asked for."""

    def __init__(self, fails=()):
        self.fails, self.seen = set(fails), []

    def __call__(self, prediction):
        phi = torch.as_tensor(prediction.predictions)
        self.seen.append(phi)
        if len(self.seen) - 1 in self.fails:
            raise MetricError(f"no number in call {len(self.seen) - 1}")
        return float(phi.sum())


def setting(fails=(), seed=0, **kwargs):
    phi = Subset(nn.Linear(D, 1, bias=False), "weight")
    phi.write(torch.linspace(-1, 1, D))
    score = Score(fails)
    made = Evaluator(
        phi,
        lambda label: BatchOutput(phi.read(), label),
        lambda: [torch.tensor([0])],
        Metric(score, "score"),
        Ledger(budget=100),
        max_bytes=1e6,
        **kwargs,
    )
    coordinates = Coordinates(torch.zeros(D), random_basis(D, K, torch.Generator().manual_seed(0)))
    return Observer(made, 0.1, seed), coordinates, score


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_round_is_antithetic_pairs_and_phi_itself_if_odd(count):
    taken, coordinates, score = setting()
    observed = taken.observe(coordinates, 7, count)
    observations, errors = observed.observations, observed.errors
    z = np.stack([o.z for o in observations]) - coordinates.encode(taken.evaluator.phi.read()).numpy()
    assert len(observations) == count == len(score.seen) and not errors
    assert z.dtype == np.float32 and {o.step for o in observations} == {7}
    if count % 2:
        assert np.allclose(z[0], 0)
    pairs = z[count % 2 :].reshape(-1, 2, K)
    assert np.allclose(pairs[:, 0], -pairs[:, 1], atol=1e-6) and (np.abs(pairs) > 0).all()


def test_an_observation_is_where_the_metric_was_taken():
    taken, coordinates, score = setting()
    observations = taken.observe(coordinates, 0, 4).observations
    for observation, phi in zip(observations, score.seen, strict=True):
        assert np.allclose(observation.z, coordinates.encode(phi), atol=1e-6)
        assert observation.score == float(phi.sum()) and 0 < observation.cost < 1


def test_perturbation_stays_in_the_coordinates_and_has_the_size_asked_for():
    taken, coordinates, score = setting()
    taken.observe(coordinates, 0, 200)
    moves = torch.stack(score.seen) - taken.evaluator.phi.read()
    assert torch.allclose(moves @ coordinates.basis @ coordinates.basis.T, moves, atol=1e-6)
    assert torch.allclose((moves @ coordinates.basis).std(0), torch.full((K,), 0.1), rtol=0.3)


@pytest.mark.parametrize("fails", [(), (0, 3), range(6)])
def test_phi_is_put_back_and_failed_calls_are_dropped_with_their_message(fails):
    taken, coordinates, score = setting(fails)
    before = taken.evaluator.phi.read()
    observed = taken.observe(coordinates, 0, 6)
    observations, errors = observed.observations, observed.errors
    assert torch.equal(taken.evaluator.phi.read(), before)
    assert len(observations) == 6 - len(fails) and len(errors) == len(fails)
    assert all(f"call {i}" in error for i, error in zip(fails, errors, strict=True))
    assert all(np.isfinite(o.score) for o in observations)
    assert taken.evaluator.ledger.calls["observe"] == 6


def test_phi_is_put_back_from_any_other_error():
    taken, coordinates, score = setting()
    before = taken.evaluator.phi.read()
    taken.evaluator._data.predict = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        taken.observe(coordinates, 0, 2)
    assert torch.equal(taken.evaluator.phi.read(), before)


def test_perturbation_has_a_generator_of_its_own_that_can_be_resumed():
    taken, coordinates, score = setting()
    global_state = torch.get_rng_state()
    taken.observe(coordinates, 0, 2)
    state = taken.generator.get_state()
    second = taken.observe(coordinates, 1, 2).observations
    assert torch.equal(torch.get_rng_state(), global_state)

    resumed, *_ = setting(seed=5)
    resumed.generator.set_state(state)
    assert np.array_equal(resumed.observe(coordinates, 1, 2).observations[0].z, second[0].z)
    assert not np.allclose(second[0].z, taken.observe(coordinates, 2, 2).observations[0].z)


def test_variance_is_the_scatter_of_the_pairs_means_twice():
    assert pair_variance(np.array([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]])) == pytest.approx(2 * 4.0)
    assert pair_variance(np.array([[1.0, 3.0], [2.0, np.nan], [0.0, 0.0]])) == pytest.approx(2 * 2.0)
    assert np.isnan(pair_variance(np.array([[1.0, 3.0]]))) and np.isnan(pair_variance(np.empty((0, 2))))


def test_nothing_but_the_perturbation_is_drawn():
    taken, coordinates, score = setting()
    expected = taken.observe(coordinates, 0, 4).observations
    again, *_ = setting()
    z = coordinates.encode(again.evaluator.phi.read()) + again.offsets(4, K)
    assert np.allclose([o.z for o in expected], z)
    following = [o.z for o in taken.observe(coordinates, 1, 4).observations]
    assert np.allclose(following, coordinates.encode(again.evaluator.phi.read()) + again.offsets(4, K))


def test_variance_estimates_the_noise_and_not_the_slope():
    taken, coordinates, score = setting()
    rng, noiseless = np.random.default_rng(0), taken.evaluator.metric
    quiet = max(taken.observe(coordinates, 0, count).observations[0].variance for count in (100, 101))
    taken.evaluator.metric = Metric(lambda prediction: noiseless(prediction) + 0.3 * rng.normal(), "noisy")
    noisy = taken.observe(coordinates, 1, 400).observations[0].variance
    assert quiet < 1e-9 and noisy == pytest.approx(0.09, rel=0.3)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_ranks_share_a_round_and_agree_on_it(monkeypatch, count):
    alone, coordinates, _ = setting(fails=(0,))
    expected = alone.observe(coordinates, 0, count)

    class HandedIn(Exception):
        pass

    def hand_in(mine):
        everything.extend(mine)
        raise HandedIn

    everything = []  # of both ranks, for which each would wait for the other
    for gather in (hand_in, lambda mine: list(everything)):
        monkeypatch.setattr(evaluator, "gather_object", gather)
        for rank in range(2):
            taken, _, score = setting(fails=(0,) if rank == 0 else (), rank=rank, world_size=2)
            if gather is hand_in:
                with pytest.raises(HandedIn):
                    taken.observe(coordinates, 0, count)
                assert len(score.seen) == len(range(rank, count, 2))
                continue
            observed = taken.observe(coordinates, 0, count)
            assert observed.errors == expected.errors and len(observed.observations) == count - 1
            assert taken.evaluator.ledger.calls["observe"] == count
            for a, b in zip(observed.observations, expected.observations, strict=True):
                assert np.array_equal(a.z, b.z) and a.score == b.score
                assert a.variance == b.variance or np.isnan([a.variance, b.variance]).all()


def test_elsewhere_is_another_phi_and_for_a_while():
    taken, coordinates, _ = setting()
    before = taken.evaluator.phi.read()
    with taken.moved(coordinates):
        assert not torch.allclose(taken.evaluator.phi.read(), before)
    assert torch.equal(taken.evaluator.phi.read(), before)
    assert torch.equal(taken.generator.get_state(), setting()[0].generator.get_state())


def test_predictions_come_on_demand_one_for_each_observation():
    taken, coordinates, score = setting(fails=(1,))
    assert taken.observe(coordinates, 0, 2).predictions is None
    score.seen.clear()
    observed = taken.observe(coordinates, 1, 5, predictions=True)
    assert len(observed.errors) == 1 and len(observed.predictions) == len(observed.observations) == 4
    for observation, prediction in zip(observed.observations, observed.predictions, strict=True):
        assert np.allclose(coordinates.encode(torch.as_tensor(prediction.predictions)), observation.z, atol=1e-6)
        assert prediction.label_ids.tolist() == [0]
