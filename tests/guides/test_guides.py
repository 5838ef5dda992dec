"""One contract for every guide, the user's own included; then what is particular to ours."""

import numpy as np
import pytest
import torch

from metricopt_hf import ConfigurationError, Guide, Observation, RandomGuide, Trajectory, ValueFunction, checkpoint
from metricopt_hf import ValueFunctionGuide as Fitted
from metricopt_hf.guides.base import from_spec
from metricopt_hf.guides.trust import NO_EVIDENCE, NOT_PREDICTIVE, PREDICTIVE, Trust
from metricopt_hf.phi import Coordinates, random_basis

D, K = 12, 4
SLOPE = np.array([1.0, -2.0, 0.5, 1.5], np.float32)


class Truth(Guide):
    """A guide of a user's: knows the slope."""

    def predict(self, z):
        return z @ SLOPE

    def fit(self, trajectory):
        pass

    def ascent(self, phi):
        return self.coordinates.lift(torch.as_tensor(SLOPE))


class Wrong(Truth):
    def predict(self, z):
        return -(z @ SLOPE)


GUIDES = {
    "value function": Fitted,
    "value function given": lambda: Fitted(ValueFunction(K, hidden_size=8)),
    "shuffled": lambda: Fitted(shuffled=True),
    "random": RandomGuide,
    "user's": Truth,
}


def coordinates():
    return Coordinates(torch.ones(D), random_basis(D, K, torch.Generator().manual_seed(0)))


def started(name, greater_is_better=True, seed=0):
    guide = GUIDES[name]() if isinstance(name, str) else name()
    guide.start(coordinates(), greater_is_better, seed)
    return guide


def taught(guide, rounds=4, first=0, trajectory=None, size=8, noise=0.1):
    """Tell rounds of a metric that is linear in z; returns the trajectory."""
    trajectory = Trajectory() if trajectory is None else trajectory
    for step in range(first, first + rounds):
        rng = np.random.default_rng(step)
        z = rng.normal(size=(size, K)).astype(np.float32)
        scores = z @ SLOPE + noise * rng.normal(size=size)
        trajectory.extend([Observation(p, float(s), noise**2, step, 0.1) for p, s in zip(z, scores, strict=True)])
        guide.learn(trajectory)
    return trajectory


def trusted(guide):
    guide.trust = Trust(evidence=100.0, correlation_sum=90.0)
    return guide


@pytest.mark.parametrize("name", GUIDES)
def test_before_there_is_evidence_there_is_no_direction(name):
    direction = started(name).direction(torch.zeros(D))
    assert direction.trust == 0 and direction.reason == NO_EVIDENCE
    assert torch.equal(direction.vector, torch.zeros(D))


@pytest.mark.parametrize("name", GUIDES)
def test_a_direction_is_a_vector_in_the_span_of_the_coordinates(name):
    guide = started(name)
    taught(guide)
    vector, basis = trusted(guide).direction(torch.randn(D)).vector, guide.coordinates.basis
    assert vector.shape == (D,) and vector.isfinite().all() and vector.norm() > 0
    assert torch.allclose(basis @ (basis.T @ vector), vector, atol=1e-5)


@pytest.mark.parametrize("name", GUIDES)
def test_where_smaller_is_better_the_direction_is_the_opposite(name):
    phi, vectors = torch.randn(D), []
    for greater_is_better in (True, False):
        guide = started(name, greater_is_better)
        taught(guide)
        vectors.append(trusted(guide).direction(phi).vector)
    assert torch.equal(vectors[0], -vectors[1])


@pytest.mark.parametrize("greater_is_better", [True, False])
@pytest.mark.parametrize("name", ["value function", "value function given", "user's"])
def test_a_step_against_the_direction_improves_the_metric(name, greater_is_better):
    guide = started(name, greater_is_better)
    taught(guide)
    direction = guide.direction(guide.coordinates.origin)
    assert direction.reason == PREDICTIVE and direction.trust > 0.3
    improvement = guide.coordinates.basis.T @ -direction.vector @ torch.as_tensor(SLOPE)
    assert improvement * (1 if greater_is_better else -1) > 0


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_is_judged_before_it_is_told(name):
    guide = started(name)
    asked = []
    predict = guide.predict
    guide.predict = lambda z: asked.append((fits, len(z))) or predict(z)
    fits = 0
    fit = guide.fit

    def counted(trajectory):
        nonlocal fits
        fits += 1
        fit(trajectory)

    guide.fit = counted
    taught(guide, rounds=3)
    assert asked == [(0, 8), (1, 8), (2, 8)]  # of the last round, before it was fitted to it


@pytest.mark.parametrize("name", GUIDES)
def test_the_saved_state_goes_on_exactly(name, tmp_path):
    first = started(name)
    trajectory = taught(first, rounds=2)
    checkpoint.save(first.state_dict(), tmp_path)
    second = started(name, seed=1)  # even from another seed
    second.load_state_dict(checkpoint.load(tmp_path))

    taught(first, 2, first=2, trajectory=Trajectory(trajectory))
    taught(second, 2, first=2, trajectory=Trajectory(trajectory))
    phi = torch.randn(D)
    assert second.trust == first.trust and second.trust.evidence > 0
    assert torch.equal(trusted(second).direction(phi).vector, trusted(first).direction(phi).vector)


@pytest.mark.parametrize("name", GUIDES)
def test_a_state_from_before_the_first_round_can_be_saved_too(name, tmp_path):
    checkpoint.save(started(name).state_dict(), tmp_path)
    guide = started(name)
    guide.load_state_dict(checkpoint.load(tmp_path))
    taught(guide)
    assert trusted(guide).direction(torch.zeros(D)).vector.norm() > 0


@pytest.mark.parametrize("name", GUIDES)
def test_the_seed_is_the_only_randomness(name):
    vectors = []
    for seed in (0, 0, 1):
        torch.rand(1)  # the global state is another each time
        state = torch.get_rng_state()
        guide = started(name, seed=seed)
        taught(guide)
        vectors.append(trusted(guide).direction(torch.zeros(D)).vector)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(vectors[0], vectors[1])
    assert name == "user's" or not torch.equal(vectors[0], vectors[2])


@pytest.mark.parametrize("name", GUIDES)
def test_switched_off_it_is_followed_no_more_until_the_next_phase(name, tmp_path):
    guide = started(name)
    taught(guide)
    trusted(guide).switch_off("the metric failed")
    checkpoint.save(guide.state_dict(), tmp_path)
    resumed = started(name)
    resumed.load_state_dict(checkpoint.load(tmp_path))
    for off in (guide, resumed):
        direction = off.direction(torch.zeros(D))
        assert direction.trust == 0 and "the metric failed" in direction.reason
        assert not direction.vector.any()
    guide.start(coordinates(), True, 0)
    assert guide.direction(torch.zeros(D)).reason == NO_EVIDENCE


@pytest.mark.parametrize("name", [n for n in GUIDES if n != "value function given"])
def test_a_new_phase_forgets_the_last(name):
    guide, fresh = started(name), started(name)
    taught(guide)
    guide.start(coordinates(), True, 0)
    phi = torch.randn(D)
    for g in (guide, fresh):
        taught(g, rounds=2, first=7)
    assert guide.trust == fresh.trust
    assert torch.equal(trusted(guide).direction(phi).vector, trusted(fresh).direction(phi).vector)


@pytest.mark.parametrize("name", GUIDES)
def test_a_round_of_one_observation_is_no_trouble(name):
    guide = started(name)
    taught(guide, rounds=1, size=1)
    assert guide.direction(torch.zeros(D)).trust == 0


def test_a_guide_that_predicts_the_opposite_is_not_followed():
    guide = started(Wrong)
    taught(guide)
    assert guide.direction(torch.zeros(D)).trust == 0
    assert guide.direction(torch.zeros(D)).reason == NOT_PREDICTIVE


def test_it_is_followed_less_where_it_is_not_certain():
    class Doubtful(Truth):
        def gradient_agreement(self, phi):
            return float(phi[0])

    guide = trusted(started(Doubtful))
    full = trusted(started(Truth)).direction(torch.zeros(D))
    for gradient_agreement in (1.0, 0.25, 0.0):
        direction = guide.direction(torch.full((D,), gradient_agreement))
        assert direction.trust == pytest.approx(gradient_agreement * full.trust)
        assert torch.equal(direction.vector, full.vector)


def test_a_value_function_is_as_certain_as_its_members_agree():
    guide = started("value function")
    taught(guide)
    phi = torch.randn(D)
    agreement = float(guide.value_function.agreement(guide.coordinates.encode(phi)))
    assert 0 < agreement < 1 and guide.gradient_agreement(phi) == pytest.approx(agreement)
    assert trusted(guide).direction(phi).trust == pytest.approx(agreement * guide.standing[0])


def two_folds(guide, slopes, rounds=12, size=16, noise=0.05, level=3.0):
    """Tell rounds of a metric with another slope in each of two folds; the second is harder by `level`."""
    trajectory = Trajectory()
    for step in range(rounds):
        rng = np.random.default_rng(step)
        z = rng.normal(size=(size, K)).astype(np.float32)
        folds = np.arange(size) // 2 % 2
        scores = np.einsum("nk,nk->n", z, np.stack(slopes)[folds]) - level * folds + noise * rng.normal(size=size)
        trajectory.extend(
            [Observation(p, float(s), noise**2, step, 0.1, int(f)) for p, s, f in zip(z, scores, folds, strict=True)]
        )
        guide.learn(trajectory)
    return trajectory


def test_what_holds_in_both_folds_is_trusted_however_much_harder_one_is():
    guide = started("value function")
    two_folds(guide, [SLOPE, SLOPE])
    assert guide.standing[0] > 0.8 and guide.gradient_agreement(guide.coordinates.origin) > 0.8


def test_what_holds_in_one_fold_alone_is_not_trusted():
    """Orthogonal slopes: the metric of each fold can be predicted, and to follow it is to fit its examples."""
    apart = [np.array([2.0, 0, 1, 0], np.float32), np.array([0, 2.0, 0, -1], np.float32)]
    guide = started("value function")
    trajectory = two_folds(guide, apart)
    assert guide.standing[0] < 0.1 and guide.gradient_agreement(guide.coordinates.origin) < 0.2

    one_fold = started("value function")  # the same points and scores, of which nobody says whose they are
    told = Trajectory()
    for step in range(12):
        told.extend([Observation(o.z, o.score, o.variance, o.step, o.cost) for o in trajectory if o.step == step])
        one_fold.learn(told)
    assert one_fold.standing[0] > 0.1


def test_it_is_judged_by_those_who_did_not_learn_the_fold():
    guide = started("value function")
    trajectory = two_folds(guide, [SLOPE, -SLOPE], rounds=6, level=0.0)
    predicted, latest = guide.predict_held_out(trajectory), trajectory.last_round
    own = np.array([SLOPE, -SLOPE])[latest.folds]
    assert np.corrcoef(predicted, np.einsum("nk,nk->n", latest.z, own))[0, 1] < -0.8


def test_guides_that_know_nothing_are_followed_less_than_one_that_learns():
    def mean_trust(name):
        guide, values = started(name), []
        trajectory = Trajectory()
        for step in range(8):
            taught(guide, 1, first=step, trajectory=trajectory, noise=0.5)
            values.append(guide.direction(torch.zeros(D)).trust)
        return np.mean(values)

    assert mean_trust("value function") > 0.3 > 2 * max(mean_trust("shuffled"), mean_trust("random"))


def test_a_value_function_of_another_size_is_refused():
    with pytest.raises(ConfigurationError, match="3 coordinates, this phi 4"):
        started(lambda: Fitted(ValueFunction(3)))


def test_a_string_names_a_guide():
    given = ValueFunction(K)
    assert type(from_spec("random")) is RandomGuide
    assert from_spec("shuffled").shuffled and not from_spec("value_function").shuffled
    guide = from_spec("value_function", given)
    guide.start(coordinates(), True, 0)
    assert guide.predict(np.zeros((2, K), np.float32)).shape == (2,)
    assert guide.value_function is not given  # fitted on, it would not be what its owner passed
    with pytest.raises(ConfigurationError, match="value_function, shuffled, random"):
        from_spec("evolution")
