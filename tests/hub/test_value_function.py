"""A value function is shared: saved, loaded, and which runs it can serve."""

import logging

import pytest
import torch
from helpers import true_class_probability
from runs import bert_trainer

from metricopt_hf import Metric, ValueFunction, ValueFunctionError
from metricopt_hf.phi.coordinates import random_directions
from metricopt_hf.value import Signature, Trajectory, ValueNetwork, fit

D, K = 8, 5
PHI = {"kind": "Subset", "parameters": [["w", [D]]]}


def fitted(k=5):
    """A value network that was fitted to random numbers."""
    generator = torch.Generator().manual_seed(0)
    network = ValueNetwork(k, hidden_size=16, num_members=3)
    fit(network, torch.randn(40, k, generator=generator), torch.randn(40, generator=generator), generator)
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


def signed():
    """What a run hands out, with observations of all coordinates in [-1, 1]."""
    z, seen = 2 * torch.rand(30, K, generator=torch.Generator().manual_seed(0)) - 1, Trajectory()
    seen.extend(z, z[:, 0], step=0, seconds=0.1)
    origin, basis = torch.arange(D).float(), random_directions(D, K, torch.Generator().manual_seed(0))
    return ValueFunction.of(fitted(), Signature("Quadratic", PHI, "jacobian", "distance", False, origin, basis), seen)


def test_its_coordinates_are_taken_over_wherever_a_run_starts(tmp_path, caplog):
    signed().save_pretrained(tmp_path)
    loaded = ValueFunction.from_pretrained(tmp_path)
    start = loaded.signature.origin + 0.5 * loaded.signature.basis[:, 0]
    found = loaded.coordinates_from(start)
    assert found.kind == "jacobian" and torch.equal(found.origin, signed().signature.origin)
    assert torch.allclose(found.encode(start), torch.tensor([0.5, 0, 0, 0, 0]), atol=1e-6)
    assert not caplog.records


def test_a_start_far_from_all_that_it_saw_is_told(caplog):
    made = signed()
    with caplog.at_level(logging.WARNING):
        made.coordinates_from(made.signature.origin + 100 * made.signature.basis[:, 0])
    assert "has to learn anew" in caplog.text


def test_another_model_s_phi_is_refused():
    other = {"kind": "FiLM", "parameters": [["norm.weight", [4]]]}
    with pytest.raises(ValueFunctionError, match=r"another phi space.*Quadratic.*only there: w.*only here: norm"):
        signed().signature.check(other, "distance", False)
    with pytest.raises(ValueFunctionError, match=r"of another shape: w \[8\] there, \[2, 4\] here"):
        signed().signature.check({"kind": "Subset", "parameters": [["w", [2, 4]]]}, "distance", False)


def test_another_metric_is_refused():
    signature = signed().signature
    signature.check(PHI, "distance", False)
    with pytest.raises(ValueFunctionError, match="smaller is better.*greater is better"):
        signature.check(PHI, "distance", True)
    with pytest.raises(ValueFunctionError, match=r"metric=Metric\(function, 'distance', False\)"):
        signature.check(PHI, "f1", False)


def test_learning_on_does_not_spoil_it():
    """A new round is narrower and lies elsewhere; standardised anew, the same weights would be another function."""
    z = torch.randn(60, K, generator=torch.Generator().manual_seed(0))
    scores, near = 3.0 * z[:, 0] - z[:, 1], 2 + 0.1 * z[:8]
    given = ValueNetwork(K, hidden_size=16, num_members=3)
    fit(given, z, scores, torch.Generator().manual_seed(0))

    def error(standardise):
        network = ValueNetwork.started(K, given, torch.Generator())
        generator = torch.Generator().manual_seed(0)
        fit(network, near, 3.0 * near[:, 0] - near[:, 1], generator, 1, standardise)
        return float((network.predict(z)[0] - scores).square().mean())

    before = float((given.predict(z)[0] - scores).square().mean())
    assert error(standardise=False) < max(1.5 * before, 0.1) < error(standardise=True) / 3


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folder of a model that a run has saved with its value function."""
    folder = tmp_path_factory.mktemp("shared")
    first = bert_trainer(folder)
    first.train()
    first.save_model()
    return folder


@pytest.mark.parametrize("form", ["object", "folder"])
def test_a_run_starts_from_the_value_function_that_another_saved(shared, tmp_path, form):
    given = ValueFunction.from_pretrained(shared)
    second = bert_trainer(tmp_path, value_function=given if form == "object" else str(shared), seed=1)
    second.train()
    assert torch.equal(second.result.coordinates.basis, given.signature.basis)
    assert set(second.result.curve[0]["tried"]) == {"pairs", "value_function"}


def test_a_run_of_another_metric_refuses_it_by_name(shared, tmp_path):
    other = bert_trainer(
        tmp_path,
        metric=Metric(true_class_probability, "another", greater_is_better=True),
        value_function=str(shared),
    )
    with pytest.raises(ValueFunctionError, match="predicts true_class_probability .*judged by another "):
        other.train()
