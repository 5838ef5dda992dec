"""What is particular to the guide that bridges the metric: a network of sets, and its gradient through the loss."""

import numpy as np
import pytest
import torch
from helpers import OPTIMUM, guide_context
from runs import quadratic_trainer
from teaching import batch, coordinates, predictions_of, started, taught

from metricopt_hf import BridgeGuide, Observation, Round, Trajectory, ValueFunctionGuide
from metricopt_hf.guides import bridge
from metricopt_hf.guides.outputs import Rows, of_prediction
from metricopt_hf.guides.set_network import SetNetwork


def network_of(kind="classes"):
    outputs = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3 if kind == "classes" else outputs[:, :1] * 2 + 1
    rows = Rows(outputs, labels, kind)
    return SetNetwork(rows, torch.Generator().manual_seed(1)), rows


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_a_set_has_no_order_and_no_size(kind):
    network, rows = network_of(kind)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    whole = network.predict(rows)
    assert torch.allclose(network.predict(Rows(rows.outputs[order], rows.labels[order], kind)), whole, atol=1e-6)
    twice = Rows(rows.outputs.repeat(2, 1), torch.cat([rows.labels, rows.labels]), kind)
    assert torch.allclose(network.predict(twice), whole, atol=1e-6)
    other = Rows(rows.outputs, rows.labels[order], kind)
    assert not torch.allclose(network.predict(other), whole, atol=1e-4)


def test_its_gradient_is_smooth_in_the_outputs():
    network, rows = network_of()
    outputs = rows.outputs.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda o: network.double()(o, rows.labels), (outputs,))


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_a_step_against_its_loss_improves_the_metric(greater_is_better):
    """The metric is the margin of the true class, so the margin has to grow, or to shrink."""
    guide = started(BridgeGuide(), greater_is_better)
    taught(guide)
    inputs, outputs, task_loss = batch()
    logits, labels = outputs["logits"], inputs["labels"]
    added = guide.loss(inputs, outputs, task_loss) - task_loss
    (gradient,) = torch.autograd.grad(added, logits)
    stepped = -gradient
    margin = stepped.gather(1, labels[:, None]).mean() - stepped.mean()
    assert margin * (1 if greater_is_better else -1) > 0.01 * gradient.abs().mean()


def test_beside_the_task_s_its_gradient_is_as_long_as_the_weight_says():
    guide = BridgeGuide()
    context = guide_context(coordinates())
    guide.start(type(context)(context.coordinates, True, context.generator, context.metric, 5.0))
    taught(guide, rounds=1)
    inputs, outputs, task_loss = batch()
    loss = guide.loss(inputs, outputs, task_loss)
    losses = (loss - task_loss, task_loss)
    ours, task = (torch.autograd.grad(x, outputs["logits"], retain_graph=True)[0] for x in losses)
    assert float(ours.norm()) == pytest.approx(5 * float(task.norm()), rel=1e-3)


def told(guide, metric, rounds=6, seed=0):
    trajectory = Trajectory()
    for step in range(rounds):
        z = np.random.default_rng(step).normal(size=(8, 4)).astype(np.float32)
        predictions = predictions_of(z, step)
        scores = np.array([metric(p) for p in predictions])
        trajectory.extend([Observation(p, float(s), 0.0, step, 0.1) for p, s in zip(z, scores, strict=True)])
        guide.observe(Round(trajectory, predictions=predictions, scores=scores))
    return guide


def smooth_worst_recall(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return min(chance[labels == c, c].mean() for c in np.unique(labels))


def test_it_comes_to_know_a_metric_of_sets():
    assert told(started(BridgeGuide()), smooth_worst_recall).standing[0] > 0.4


def test_what_is_no_function_of_the_predictions_it_cannot_know():
    """Broken on purpose: the same rounds with scores of no connection to them."""
    rng = np.random.default_rng(0)
    assert told(started(BridgeGuide()), lambda prediction: rng.normal()).standing[0] < 0.15


def test_the_oldest_rounds_are_forgotten(monkeypatch):
    monkeypatch.setattr(bridge, "MOST_NUMBERS", 3 * 8 * 60 * 3)
    guide = told(started(BridgeGuide()), smooth_worst_recall, rounds=5)
    assert len(guide._rounds) == 3


def test_sets_of_other_examples_are_kept_apart():
    guide = started(BridgeGuide())
    z = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    predictions = [p for step in (0, 1) for p in predictions_of(z[:2], step)]
    trajectory = Trajectory([Observation(p, float(i), 0.0, 0, 0.1) for i, p in enumerate(z)])
    guide.observe(Round(trajectory, predictions=predictions, scores=np.arange(4.0)))
    assert [len(scores) for *_, scores in guide._rounds] == [2, 2]
    assert torch.equal(guide._rounds[1][1], of_prediction(predictions[2]).labels)


def test_of_other_predictions_it_switches_itself_off(caplog):
    guide = started(BridgeGuide())
    predictions = predictions_of(np.zeros((2, 4), np.float32), 0)
    for prediction in predictions:
        prediction.label_ids = prediction.label_ids + 5  # no classes of the outputs
    trajectory = Trajectory([Observation(np.zeros(4, np.float32), float(i), 0.0, 0, 0.1) for i in range(2)])
    guide.observe(Round(trajectory, predictions=predictions, scores=np.arange(2.0)))
    assert guide.standing == (0.0, "switched off: the labels are identities, and it knows of classes and numbers")
    assert guide.loss(*batch()) is None and "cannot guide this run" in caplog.text


# ---- in a run


class ZeroGradient(BridgeGuide):
    """Broken on purpose."""

    def loss(self, inputs, outputs, task_loss):
        loss = super().loss(inputs, outputs, task_loss)
        return None if loss is None else task_loss + 0 * (loss - task_loss)


class Negated(BridgeGuide):
    """Broken on purpose: as good a prophet, and its gradient leads away."""

    def loss(self, inputs, outputs, task_loss):
        loss = super().loss(inputs, outputs, task_loss)
        return None if loss is None else 2 * task_loss - loss


def distance_after(folder, guide, observe="predictions"):
    """Of phi from the metric's optimum, after a short run."""
    trainer = quadratic_trainer(
        folder,
        guide,
        observe=observe,
        observe_steps=4,
        metric_call_budget=None,
        value_weight=0.0 if guide is None else 6.0,
    )
    trainer.train()
    assert guide is None or trainer.result.trust > 0.3
    return float((trainer.result.last_phi - torch.as_tensor(OPTIMUM)).norm())


def test_it_leads_a_run_to_the_metric_and_only_its_gradient_does(tmp_path):
    loss_only = distance_after(tmp_path, None)
    assert distance_after(tmp_path, BridgeGuide()) < 0.8 * loss_only
    assert distance_after(tmp_path, ZeroGradient()) == pytest.approx(loss_only, rel=1e-4)
    assert distance_after(tmp_path, Negated()) > 1.1 * loss_only


def test_it_does_so_too_where_scores_are_observed(tmp_path):
    assert distance_after(tmp_path, BridgeGuide(), "scores") < 0.8 * distance_after(tmp_path, None)


def test_it_makes_no_pass_and_no_call_of_its_own(tmp_path):
    spent = []
    for guide in (ValueFunctionGuide(), BridgeGuide()):
        trainer = quadratic_trainer(
            tmp_path, guide, observe="predictions", metric_call_budget=None, max_steps=8
        )
        trainer.train()
        spent.append((dict(trainer.ledger.calls), dict(trainer.ledger.passes)))
    assert spent[0] == spent[1]
