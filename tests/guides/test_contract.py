"""One contract for every guide: those that a config names, and the experimental ones."""

import copy

import pytest
import torch
from local_metrics import DIM, Local, accuracy, cosine, error, started, taught

from metricopt_hf.experimental import EXPERIMENTAL
from metricopt_hf.guides import AUTO, GUIDES, Guide, from_spec
from metricopt_hf.linear.local_metric import BudgetSpent

EVERY = {**GUIDES, **EXPERIMENTAL}
CONTROLS = ("shuffled", "random")
LEARNERS = [name for name in EVERY if name not in CONTROLS]
CALLING = [name for name in EVERY if name != "random"]

every_guide = pytest.mark.parametrize("name", EVERY)


@pytest.fixture(scope="module")
def shared():
    return Local()


@every_guide
def test_it_applies_to_decisions_and_gives_a_direction(name, shared):
    guide = started(EVERY[name](), shared)
    assert isinstance(guide, Guide) and guide.applies(shared.metric()) and shared.dim == DIM
    taught(guide, shared, updates=1)
    gradient = guide.gradient(torch.zeros(DIM))
    assert gradient.shape == (DIM,) and gradient.isfinite().all() and gradient.norm() > 0


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize(("function", "greater"), [(accuracy, True), (error, False)])
def test_its_gradient_goes_where_the_metric_improves(name, function, greater):
    """Whichever way the metric goes: the slope is that of what is compared, of which more is better."""
    local = Local(function, greater)
    guide = taught(started(EVERY[name](), local), local, updates=6)
    assert cosine(guide.gradient(torch.zeros(DIM)), local.slope()) > 0.3


def both_generators(guide, local):
    return guide.context.generator.get_state(), local.generator.get_state()


@every_guide
def test_the_saved_state_goes_on_exactly(name, tmp_path, shared):
    first = taught(started(EVERY[name](), shared), shared, updates=2)
    own, theirs = both_generators(first, shared)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    taught(first, shared, updates=2)

    second = started(EVERY[name](), shared, seed=1)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.context.generator.set_state(own)
    shared.generator.set_state(theirs)
    taught(second, shared, updates=2)
    point = 0.1 * torch.ones(DIM)
    assert torch.equal(first.gradient(point), second.gradient(point))


@every_guide
def test_what_was_saved_does_not_change_with_what_is_learned(name, shared):
    guide = taught(started(EVERY[name](), shared), shared, updates=1)
    state = guide.state_dict()
    before = copy.deepcopy(state)
    flat, same = (torch.utils._pytree.tree_leaves(s) for s in (state, before))
    for a, b in zip(flat, same, strict=True):
        assert type(a) in (torch.Tensor, float, int, bool) and torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@every_guide
def test_a_state_from_before_the_first_update_can_be_saved_too(name, shared):
    state = started(EVERY[name](), shared).state_dict()
    guide = started(EVERY[name](), shared)
    guide.load_state_dict(state)
    assert taught(guide, shared, updates=1).gradient(torch.zeros(DIM)).norm() > 0


@every_guide
def test_the_generators_are_the_only_randomness(name):
    found = []
    for seed in (0, 0, 1):
        local = Local(seed=seed)
        state = torch.get_rng_state()
        guide = taught(started(EVERY[name](), local, seed), local, updates=2)
        found.append(guide.gradient(torch.zeros(DIM)))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@every_guide
def test_a_new_phase_forgets_the_last(name):
    found = []
    for before in (True, False):
        local = Local()
        guide = started(EVERY[name](), local)
        if before:
            taught(guide, Local(seed=3), updates=2)
            started(guide, local)
        found.append(taught(guide, local, updates=1).gradient(torch.zeros(DIM)))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", CALLING)
def test_it_stops_where_the_budget_does(name):
    local = Local(budget=1)
    guide = started(EVERY[name](), local)
    with pytest.raises(BudgetSpent):
        guide.fit(local.metric(), torch.zeros(DIM))
    assert local.ledger.calls["observe"] == 0


@pytest.mark.parametrize("name", CALLING)
def test_calls_that_fail_are_left_out(name):
    calls = []

    def fails_at_times(prediction):
        calls.append(1)
        return accuracy(prediction) if len(calls) % 3 != 2 else float("nan")

    local = Local(fails_at_times)
    guide = taught(started(EVERY[name](), local), local, updates=2)
    assert guide.gradient(torch.zeros(DIM)).isfinite().all()


def test_a_spec_names_guides_by_whether_calls_cost_a_pass():
    assert list(from_spec(AUTO, linearised=True)) == ["rows", "pairs"]
    assert list(from_spec(AUTO, linearised=False)) == ["value_function"]
    assert list(from_spec("random", linearised=True)) == ["random"]
