"""The guides that go through outputs: to which predictions they apply, and what they learn."""

import numpy as np
import pytest
import torch
from local_metrics import DIM, Local, accuracy, cosine, started, taught
from torch import nn
from transformers import EvalPrediction

from metricopt_hf.experimental import BridgeGuide, LossAlignmentGuide
from metricopt_hf.experimental.labels import classes_of, labels_of
from metricopt_hf.experimental.loss_alignment import aligned_loss, descent
from metricopt_hf.experimental.set_network import expected, features, set_network
from metricopt_hf.guides.row_moves import two_sided
from metricopt_hf.linear.linearization import Linearization, LinearLeaf


def linearization(outputs, labels, k=3):
    outputs = torch.as_tensor(outputs, dtype=torch.float32)
    jacobian = torch.randn(*outputs.shape, k, generator=torch.Generator().manual_seed(0))
    return Linearization(EvalPrediction(outputs.numpy(), labels), {0: LinearLeaf(outputs, jacobian)})


LOGITS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
CASES = {
    "classes": (LOGITS, np.array([0, 1, 2, 2, 1, 0]), True, True),
    "one logit": (LOGITS[:, 0], np.array([0, 1, 1, 1, 0, 0]), True, True),
    "one logit in a column": (LOGITS[:, :1], np.array([0, 1, 1, 1, 0, 0]), True, True),
    "numbers": (LOGITS[:, 0], LOGITS[:, 1], True, False),
    "several numbers": (LOGITS, LOGITS[:, ::-1].copy(), True, False),
    "labels that are no classes": (LOGITS, np.array([0, 1, 2, 3, -100, 0]), True, False),
    "no labels": (LOGITS, None, False, False),
    "two columns of labels": (LOGITS, (np.zeros(6), np.ones(6)), False, False),
    "labels per token": (LOGITS[:, :, None].repeat(2, 2), np.zeros((6, 3)), False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_to_what_they_apply(case):
    outputs, labels, bridge, alignment = CASES[case]
    local = Local()
    local.linearization = linear = linearization(outputs, labels)
    assert (labels_of(linear) is not None, classes_of(linear) is not None) == (bridge, alignment)
    assert started(BridgeGuide(), local).applies(local.metric()) is bridge
    assert started(LossAlignmentGuide(), local).applies(local.metric()) is alignment
    local.linearised = False
    assert not started(BridgeGuide(), local).applies(local.metric())
    assert not started(LossAlignmentGuide(), local).applies(local.metric())


@pytest.mark.parametrize("case", [name for name, (*_, bridge, _) in CASES.items() if bridge])
def test_a_set_network_reads_rows_in_any_order_and_number(case):
    outputs, labels, *_ = CASES[case]
    order = np.random.default_rng(1).permutation(6)
    network = None
    found = []
    for rows in (np.arange(6), order, np.repeat(order, 2)):
        linear = linearization(outputs[rows], labels[rows])
        read = features(linear, linear.decisions.outputs)
        network = network or set_network(read.shape[1], torch.Generator().manual_seed(0))
        found.append(expected(network, read).detach())
    assert found[0].shape == () and torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.allclose(found[0], found[2], atol=1e-5)


def squared_error(prediction) -> float:
    outputs = prediction.predictions if prediction.predictions.ndim == 1 else prediction.predictions[:, 1]
    return float(((outputs - prediction.label_ids) ** 2).mean())


def test_the_bridge_serves_numbers_too():
    """A model of one number per row."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(DIM, generator=generator)
    jacobian = torch.randn(60, DIM, generator=generator)
    local = Local(squared_error, greater_is_better=False)
    target = (jacobian @ truth).numpy()
    local.linearization = Linearization(
        EvalPrediction(np.zeros(60, np.float32), target), {0: LinearLeaf(torch.zeros(60), jacobian)}
    )
    guide = started(BridgeGuide(), local)
    taught(guide, local, updates=6)
    assert cosine(guide.gradient(torch.zeros(DIM)), truth) > 0.5


def misses(prediction) -> float:
    """Share of the rows of class 1 that are taken for class 0."""
    return float((prediction.predictions.argmax(1) == 0)[prediction.label_ids == 1].mean())


def test_the_aligned_loss_follows_a_metric_that_the_plain_one_runs_against():
    """Where misses are wanted, Phi comes to let class 1 pass for class 0."""
    local = Local(misses)
    guide = started(LossAlignmentGuide(), local)
    slope, plain = local.slope(), descent(local.linearization, torch.zeros(DIM), torch.eye(2))
    taught(guide, local, updates=20)
    assert cosine(plain, slope) < 0 < 0.5 < cosine(guide.gradient(torch.zeros(DIM)), slope)
    assert torch.equal(guide.matrix, guide.matrix.mT) and guide.matrix.abs().max() <= 1


def test_with_the_identity_the_loss_is_of_the_true_class_s_probability():
    logits, labels = torch.as_tensor(LOGITS), torch.tensor([0, 1, 2, 2, 1, 0])
    chances = logits.softmax(1)[torch.arange(6), labels]
    assert torch.allclose(aligned_loss(logits, labels, torch.eye(3)), -torch.sigmoid(chances.log()).mean())


def test_the_descent_is_the_loss_s_gradient():
    linear = linearization(LOGITS.astype(np.float32), np.array([0, 1, 2, 2, 1, 0]))
    matrix, labels = torch.randn(3, 3), classes_of(linear)
    z = torch.zeros(3, requires_grad=True)
    leaf = linear.decisions
    (gradient,) = torch.autograd.grad(aligned_loss(two_sided(leaf.outputs + leaf.jacobian @ z), labels, matrix), z)
    assert torch.allclose(descent(linear, torch.zeros(3), matrix), -gradient, atol=1e-6)


def test_networks_are_drawn_from_the_generator_alone():
    first, same, other = (set_network(4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert isinstance(first["rows"], nn.Sequential)
    for a, b in zip(first.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_accuracy_of_the_toy_can_be_improved():
    """Else the sign of a slope would say nothing."""
    local = Local(accuracy)
    slope = local.slope()
    better, worse = local.metric().values(torch.stack([slope, -slope]) / slope.norm())
    assert better > worse
