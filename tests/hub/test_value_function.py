"""A value function is shared: saved, loaded, and what a second run makes of it."""

import numpy as np
import pytest
import torch
from helpers import config, guide_context
from runs import bert_trainer, quadratic_trainer

from metricopt_hf import (
    ConfigurationError,
    Metric,
    Round,
    Trajectory,
    ValueFunction,
    ValueFunctionError,
    ValueFunctionGuide,
)
from metricopt_hf.guides.trust import NOT_PREDICTIVE
from metricopt_hf.phi import Coordinates
from metricopt_hf.value import ValueNetwork, fit


def load(folder):
    return ValueFunction.from_pretrained(folder)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Folder of a value function that knows the quadratic toy."""
    folder = tmp_path_factory.mktemp("learned")
    # a weight of its own, so that what it has seen, and how well it fits that, does not hang on the default
    settings = {"value_weight": 3.0, "perturbation_std": 0.3, "metric_call_budget": None, "observe_steps": 4}
    run = quadratic_trainer(folder, max_steps=40, **settings)
    run.train()
    run.save_model()
    return folder / "value_function"


@pytest.fixture(scope="module")
def loss_only(tmp_path_factory):
    run = quadratic_trainer(tmp_path_factory.mktemp("loss"), value_weight=0, max_steps=24)
    run.train()
    return run


def warm(tmp_path, start, **kwargs):
    settings = {"max_steps": 24, "perturbation_std": 0.3, "metric_call_budget": None, "observe_steps": 4}
    return quadratic_trainer(tmp_path, value_function_name_or_path=str(start), **{**settings, **kwargs})


def test_a_second_run_trusts_it_from_the_first_round(tmp_path, learned):
    second = warm(tmp_path, learned, seed=7)
    second.train()
    assert second.result.curve[0]["trust"] > 0.3
    assert len(second.observations) == 48
    assert torch.equal(second.value_function.z_mean, load(learned).z_mean)  # what its weights were learned in
    assert not torch.equal(second.value_function.weights[0], load(learned).weights[0])


def test_learning_on_does_not_spoil_it(learned):
    """A new round is narrower and lies elsewhere; standardised anew, the same weights would be another function."""
    given = load(learned)
    seen = given.observations
    z, scores = seen.z[-8:], seen.scores[-8:]

    def error(function):
        return float(np.mean((function.predict(torch.as_tensor(seen.z))[0].numpy() - seen.scores) ** 2))

    before = error(given)
    fit(given, z, scores, seen.variances[-8:], torch.Generator().manual_seed(0), steps=1, standardise=False)
    assert error(given) < 1.5 * before
    anew = load(learned)
    fit(anew, z, scores, seen.variances[-8:], torch.Generator().manual_seed(0), steps=1)
    assert error(anew) > 3 * before


def turned_round(folder, learned):
    """Predicts the opposite."""
    wrong = load(learned)
    with torch.no_grad():
        for part in (wrong.weights[-1], wrong.biases[-1], wrong.slopes, wrong.intercepts):
            part.neg_()
    wrong.save_pretrained(folder)


def says_nothing(folder, learned):
    """Predicts the same everywhere."""
    constant = load(learned)
    with torch.no_grad():
        constant.weights[-1].zero_()
        constant.slopes.zero_()
    constant.save_pretrained(folder)


def at_random(folder, learned):
    useless = load(learned)
    useless.reset_parameters(torch.Generator().manual_seed(3))
    useless.save_pretrained(folder)


@pytest.mark.parametrize("spoil", [turned_round, says_nothing])
def test_one_that_misleads_is_not_followed(tmp_path, learned, loss_only, spoil, monkeypatch):
    """As long as it has learned nothing here, the run is that of the loss alone, to the bit."""
    monkeypatch.setattr("metricopt_hf.guides.value_function.fit", lambda *args, **kwargs: None)
    spoil(tmp_path / "shared", learned)
    misled = warm(tmp_path, tmp_path / "shared")
    misled.train()
    trusts = [(row["trust"], row["reason"]) for row in misled.result.curve if row["trust"] is not None]
    assert trusts == [(0.0, NOT_PREDICTIVE)] * len(trusts)
    assert torch.equal(misled.result.last_phi, loss_only.result.last_phi)


@pytest.mark.parametrize("spoil", [turned_round, says_nothing, at_random])
def test_one_that_misleads_does_no_harm(tmp_path, learned, loss_only, spoil):
    spoil(tmp_path / "shared", learned)
    misled = warm(tmp_path, tmp_path / "shared")
    misled.train()
    # of one drawn at random a single round says little: see below
    assert spoil is at_random or misled.result.curve[0]["trust"] < 0.2
    assert misled.result.best_score <= 1.02 * loss_only.result.best_score


def test_those_drawn_at_random_are_hardly_trusted_after_a_round(learned):
    seen, trusts = load(learned).observations, []
    for seed in range(20):
        useless = load(learned)
        useless.reset_parameters(torch.Generator().manual_seed(seed))
        guide = ValueFunctionGuide(useless)
        guide.start(guide_context(Coordinates(useless.signature.origin, None), False, seed))
        guide.observe(Round(Trajectory(list(seen.last_round))))
        trusts.append(guide.standing[0])
    assert np.mean(trusts) < 0.2


def test_its_coordinates_are_taken_over(tmp_path, learned):
    """z is relative to the origin that it was learned at, wherever this run starts."""
    second = warm(tmp_path, learned, coordinates="gradient_pca", phi_dim=2)
    with torch.no_grad():
        second.model.w.add_(0.5)
    second.train()
    signature = load(learned).signature
    assert signature.basis is None and second.result.coordinates.kind == signature.coordinates == "identity"
    assert torch.equal(second.result.coordinates.origin, signature.origin)
    first_round = second.result.trajectory.z[:8]
    np.testing.assert_allclose(first_round.mean(0), 0.5 - signature.origin.numpy(), atol=1e-5)  # antithetic pairs


def test_a_start_far_from_all_that_it_saw_is_told(tmp_path, learned, caplog):
    second = warm(tmp_path, learned, max_steps=4)
    with torch.no_grad():
        second.model.w.add_(100.0)
    second.train()
    assert "has to learn anew" in caplog.text


def test_another_model_s_phi_is_refused_before_training(tmp_path, learned):
    with pytest.raises(ValueFunctionError, match=r"another phi space.*Quadratic.*only there: w.*only here: .*film"):
        bert_trainer(tmp_path, value_function_name_or_path=str(learned)).settle()
    other = load(learned)
    other.signature.phi["parameters"][0][1] = [7]
    other.save_pretrained(tmp_path / "other")
    config(tmp_path / "other", signature__phi__parameters=[["w", [2, 3]]])
    with pytest.raises(ValueFunctionError, match=r"of another shape: w \[2, 3\] there, \[6\] here"):
        warm(tmp_path, tmp_path / "other").settle()


def test_another_metric_is_refused_before_training(tmp_path, learned):
    config(learned, signature__metric__greater_is_better=True)
    try:
        with pytest.raises(ValueFunctionError, match="greater is better.*smaller is better"):
            warm(tmp_path, learned).settle()
    finally:
        config(learned, signature__metric__greater_is_better=False)
    signature = load(learned).signature
    with pytest.raises(ValueFunctionError, match=r"metric=Metric\(function, 'distance_to_optimum', False\)"):
        signature.check(signature.phi, Metric(len, "f1").name, False)


def test_one_without_a_signature_must_fit_the_coordinates(tmp_path):
    ValueFunction(3).save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigurationError, match="3 coordinates, this run 6: set phi_dim"):
        warm(tmp_path, tmp_path / "plain").settle()


def fitted(k=5):
    """A value network that was fitted to random numbers."""
    rng = np.random.default_rng(0)
    network = ValueNetwork(k, hidden_size=16, num_members=3)
    z = rng.normal(size=(40, k)).astype(np.float32)
    fit(network, z, rng.normal(size=40), np.full(40, np.nan), torch.Generator().manual_seed(0))
    return network


def test_saved_and_loaded_it_predicts_the_same(tmp_path):
    value_function = ValueFunction.of(fitted(), None, Trajectory())
    value_function.save_pretrained(tmp_path)
    loaded = ValueFunction.from_pretrained(tmp_path)
    z = torch.randn(4, 5)
    assert loaded.num_members == 3
    for first, second in zip(value_function.predict(z), loaded.predict(z), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(value_function.gradient(z), loaded.gradient(z))


def test_it_is_a_copy_of_the_network():
    """What is fitted on afterwards does not move what was handed out."""
    network = fitted()
    made = ValueFunction.of(network, None, Trajectory())
    z = torch.randn(4, 5)
    before = network.predict(z)[0]
    assert torch.equal(made.predict(z)[0], before) and made.hidden_size == 16
    with torch.no_grad():
        network.weights[0].add_(1.0)
    assert torch.equal(made.predict(z)[0], before) and not torch.equal(network.predict(z)[0], before)


def test_a_trainer_hands_out_a_fresh_copy_each_time_and_none_before_a_fit(tmp_path):
    run = quadratic_trainer(tmp_path, max_steps=4)
    assert run.value_function is None and run.result is None
    run.train()
    first, second = run.value_function, run.value_function
    assert first is not second
    with torch.no_grad():
        first.weights[0].zero_()
    assert second.weights[0].any() and run.result.value_function.weights[0].any()
    assert len(second.observations) == len(run.observations) and second.signature.metric == "distance_to_optimum"

    unfitted = quadratic_trainer(tmp_path, max_steps=4, metric_call_budget=0)
    unfitted.train()
    assert unfitted.value_function is None and unfitted.result.value_function is None
