"""One contract for every guide: those that a config names, and the user's own, of either kind."""

import pytest
import torch
from helpers import guide_context
from teaching import D, K, LearnedLoss, Truth, batch, coordinates, started, taught, trusted

from metricopt_hf import Guide, Trajectory, ValueFunctionGuide
from metricopt_hf.guides import GUIDES, from_spec
from metricopt_hf.guides.trust import NO_EVIDENCE, PREDICTIVE
from metricopt_hf.training import checkpoint
from metricopt_hf.value import ValueNetwork

MAKE = {
    **{name: (lambda name=name: from_spec(name)) for name in GUIDES},
    "value function given": lambda: ValueFunctionGuide(ValueNetwork(K, hidden_size=8)),
    "user's direction": Truth,
    "user's loss": LearnedLoss,
}
LOSSES = ("bridge", "loss_alignment", "user's loss")
DIRECTIONS = [name for name in MAKE if name not in LOSSES]
LEARNERS = [name for name in MAKE if name not in ("shuffled", "random")]  # those that can come to know the metric

every_guide = pytest.mark.parametrize("name", MAKE)


def answer(guide, phi=None):
    """What it answers when it is trusted: a direction, or else a loss."""
    direction = guide.direction(torch.zeros(D) if phi is None else phi)
    return guide.loss(*batch()) if direction is None else direction.vector


def assert_not_followed(guide, reason):
    """By `standing`, which gates a loss, and by the direction, where it has one."""
    trust, why = guide.standing
    assert trust == 0 and reason in why
    direction = guide.direction(torch.zeros(D))
    if direction is not None:
        assert direction.trust == 0 and reason in direction.reason
        assert torch.equal(direction.vector, torch.zeros(D))


@every_guide
def test_it_is_a_guide_that_answers_in_one_way(name):
    guide = started(MAKE[name]())
    assert isinstance(guide, Guide) and guide.scope in ("phi", "all")
    taught(guide)
    direction = trusted(guide).direction(torch.zeros(D))
    loss = guide.loss(*batch())
    assert (direction is None) != (loss is None)
    assert (direction is None) == (name not in DIRECTIONS)
    if loss is not None:
        assert loss.shape == () and loss.isfinite()


@every_guide
def test_before_there_is_evidence_it_is_not_followed(name):
    assert_not_followed(started(MAKE[name]()), NO_EVIDENCE)


@every_guide
def test_it_is_judged_before_it_is_told(name):
    guide = started(MAKE[name]())
    asked, learned = [], []
    predict, learn = guide.predict_round, guide.learn
    guide.predict_round = lambda observed: (
        asked.append((len(learned), len(observed.trajectory.last_round))) or predict(observed)
    )
    guide.learn = lambda observed: learned.append(len(observed.trajectory)) or learn(observed)
    taught(guide, rounds=3)
    assert asked == [(0, 8), (1, 8), (2, 8)]  # of the last round, before it was fitted to it
    assert learned == [8, 16, 24]


@pytest.mark.parametrize("name", LEARNERS)
def test_one_that_knows_the_metric_is_trusted(name):
    guide = started(MAKE[name]())
    taught(guide, rounds=8)
    trust, reason = guide.standing
    assert trust > 0.3 and reason == PREDICTIVE


@every_guide
def test_the_saved_state_goes_on_exactly(name, tmp_path):
    first = started(MAKE[name]())
    trajectory = taught(first, rounds=2)
    checkpoint.save(first.state_dict(), tmp_path)
    second = started(MAKE[name](), seed=1)  # even from another seed
    second.load_state_dict(checkpoint.load(tmp_path))

    taught(first, 2, first=2, trajectory=Trajectory(trajectory))
    taught(second, 2, first=2, trajectory=Trajectory(trajectory))
    phi = torch.randn(D)
    assert second.trust == first.trust and second.trust.evidence > 0
    assert torch.equal(answer(trusted(second), phi), answer(trusted(first), phi))


@every_guide
def test_a_state_from_before_the_first_round_can_be_saved_too(name, tmp_path):
    checkpoint.save(started(MAKE[name]()).state_dict(), tmp_path)
    guide = started(MAKE[name]())
    guide.load_state_dict(checkpoint.load(tmp_path))
    taught(guide)
    assert answer(trusted(guide)).norm() > 0


@every_guide
def test_the_seed_is_the_only_randomness(name):
    answers = []
    for seed in (0, 0, 1):
        torch.rand(1)  # the global state is another each time
        state = torch.get_rng_state()
        guide = started(MAKE[name](), seed=seed)
        taught(guide)
        answers.append(answer(trusted(guide)))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(answers[0], answers[1])
    assert name == "user's direction" or not torch.equal(answers[0], answers[2])


@every_guide
def test_switched_off_it_is_followed_no_more_until_the_next_phase(name, tmp_path):
    guide = started(MAKE[name]())
    taught(guide)
    trusted(guide).switch_off("the metric failed")
    checkpoint.save(guide.state_dict(), tmp_path)
    resumed = started(MAKE[name]())
    resumed.load_state_dict(checkpoint.load(tmp_path))
    for off in (guide, resumed):
        assert_not_followed(off, "the metric failed")
    guide.start(guide_context(coordinates()))
    assert_not_followed(guide, NO_EVIDENCE)


@every_guide
def test_a_new_phase_forgets_the_last(name):
    guide, fresh = started(MAKE[name]()), started(MAKE[name]())
    taught(guide)
    guide.start(guide_context(coordinates()))
    phi = torch.randn(D)
    for g in (guide, fresh):
        taught(g, rounds=2, first=7)
    assert guide.trust == fresh.trust
    assert torch.equal(answer(trusted(guide), phi), answer(trusted(fresh), phi))


@every_guide
def test_a_round_of_one_observation_is_no_trouble(name):
    guide = started(MAKE[name]())
    taught(guide, rounds=1, size=1)
    assert_not_followed(guide, NO_EVIDENCE)


# ---- those that answer a direction


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_is_a_vector_in_the_span_of_the_coordinates(name):
    guide = started(MAKE[name]())
    taught(guide)
    vector, basis = answer(trusted(guide), torch.randn(D)), guide.context.coordinates.basis
    assert vector.shape == (D,) and vector.isfinite().all() and vector.norm() > 0
    assert torch.allclose(basis @ (basis.T @ vector), vector, atol=1e-5)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_where_smaller_is_better_the_direction_is_the_opposite(name):
    phi, vectors = torch.randn(D), []
    for greater_is_better in (True, False):
        guide = started(MAKE[name](), greater_is_better)
        taught(guide)
        vectors.append(answer(trusted(guide), phi))
    assert torch.equal(vectors[0], -vectors[1])
