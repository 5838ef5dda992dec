"""What is particular to the guide that adapts a loss: the loss, its parameters, the policy, and whom it answers to."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import guide_context, true_class_probability
from teaching import batch, coordinates, predictions_of, started, trusted
from transformers import EvalPrediction

from metricopt_hf import LossAlignmentGuide, Observation, Round, Trajectory
from metricopt_hf.guides.aligned_losses import ClassLoss, PairLoss
from metricopt_hf.guides.loss_alignment import BETA
from metricopt_hf.guides.outputs import CLASSES, IDENTITIES, Rows
from metricopt_hf.guides.trust import NOT_PREDICTIVE


def rows_of(size=20, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(size, classes, generator=generator, requires_grad=True)
    return Rows(outputs, torch.randint(classes, (size,), generator=generator), CLASSES)


def told(guide, metric, rounds=6, z=None):
    """Rounds of predictions, with the metric of each."""
    trajectory = Trajectory()
    for step in range(rounds):
        points = np.random.default_rng(step).normal(size=(6, 4)).astype(np.float32) if z is None else z
        predictions = predictions_of(points, step)
        scores = np.array([metric(p) for p in predictions])
        trajectory.extend([Observation(p, float(s), 0.0, step, 0.1) for p, s in zip(points, scores, strict=True)])
        guide.observe(Round(trajectory, predictions=predictions, scores=scores))
    return guide


# ---- the losses


def test_at_the_start_phi_is_the_identity_and_the_loss_is_of_the_true_class_alone():
    loss, rows = ClassLoss(3), rows_of()
    assert torch.equal(loss.matrix(loss.start), torch.eye(3))
    log_p = rows.outputs.log_softmax(-1).gather(1, rows.labels[:, None])
    assert torch.allclose(loss(rows, loss.start), -torch.sigmoid(log_p).mean())


def test_phi_is_symmetric_and_the_loss_as_the_paper_writes_it():
    loss, rows = ClassLoss(3), rows_of()
    parameters = torch.linspace(-1, 1, 6)
    phi = loss.matrix(parameters)
    assert torch.equal(phi, phi.T) and torch.equal(phi[loss.pairs[0], loss.pairs[1]], parameters)
    by_hand = [
        -torch.sigmoid(F.one_hot(y, 3).float() @ phi @ f.log_softmax(-1))
        for f, y in zip(rows.outputs, rows.labels, strict=True)
    ]
    assert torch.allclose(loss(rows, parameters), torch.stack(by_hand).mean())


def test_a_negative_entry_pushes_two_classes_apart():
    loss = ClassLoss(3)
    logits = torch.zeros(1, 3, requires_grad=True)
    rows = Rows(logits, torch.tensor([0]), CLASSES)
    (neutral,) = torch.autograd.grad(loss(rows, loss.start), logits)
    apart = loss.start - 0.5 * ((loss.pairs[0] == 0) & (loss.pairs[1] == 1))
    (pushed,) = torch.autograd.grad(loss(rows, apart), logits)
    assert pushed[0, 1] > pushed[0, 2] and neutral[0, 1] == pytest.approx(float(neutral[0, 2]))


def test_errors_are_confusions():
    logits = F.one_hot(torch.tensor([0, 0, 1, 1, 1, 2]), 3).float()
    errors = ClassLoss(3).errors(Rows(logits, torch.tensor([0, 1, 1, 1, 1, 2]), CLASSES))
    named = dict(zip([(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)], errors.tolist(), strict=True))
    assert named == {(0, 0): 0, (0, 1): 0.125, (0, 2): 0, (1, 1): 0.25, (1, 2): 0, (2, 2): 0}


def test_the_loss_of_pairs_draws_together_what_belongs_together():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(24, 5, generator=generator, requires_grad=True)
    rows, loss = Rows(points, torch.arange(24) % 6 + 10, IDENTITIES), PairLoss()

    def gap(x):
        together, apart = loss._similarities(Rows(x, rows.labels, IDENTITIES))
        return float(together.mean() - apart.mean())

    (gradient,) = torch.autograd.grad(loss(rows, loss.start), points)
    assert gap((points - gradient).detach()) > gap(points.detach())
    errors = loss.errors(Rows(points.detach(), rows.labels, IDENTITIES))
    separated = F.one_hot(torch.arange(24) % 6).float()
    assert errors.min() > 0.2 and loss.errors(Rows(separated, rows.labels, IDENTITIES)).tolist() == [0, 0]
    values = [loss(rows, torch.tensor([m, t])).item() for m, t in ((0.5, 0.0), (0.1, 0.0), (0.5, 0.5))]
    assert len({round(value, 4) for value in values}) == 3
    assert loss(Rows(points[:1], rows.labels[:1], IDENTITIES), loss.start) == 0


# ---- the policy


def test_an_episode_moves_every_parameter_by_beta_or_not_at_all_and_within_bounds():
    before = None
    for rounds in (1, 2, 3, 14, 15):
        guide = told(started(LossAlignmentGuide()), true_class_probability, rounds)
        assert guide.parameters.abs().max() <= 1 and guide.episodes == rounds
        if rounds in (2, 3, 15):
            moved = ((guide.parameters - before) / BETA).abs()
            assert torch.allclose(moved, moved.round(), atol=1e-4) and moved.max() <= 1.01
        before = guide.parameters


class Rewarded(LossAlignmentGuide):
    """`factor` is 1 for the guide as it is; broken on purpose with 0 and -1."""

    factor = 1.0

    def _reward(self, reward):
        super()._reward(self.factor * reward)


def parameters_after(factor, rounds=45):
    """The mean of the free parameters, where the metric is better the greater they are."""
    guide = Rewarded()
    guide.factor = factor
    guide = started(guide)
    free = torch.tensor([False, True, True, False, True, False])  # of the pairs of two classes
    told(guide, lambda _: 0.0 if guide.parameters is None else float(guide.parameters[free].mean()), rounds)
    return float(guide.parameters[free].mean())


def test_the_policy_learns_what_improves_the_metric_and_does_not_without_its_reward():
    assert parameters_after(1.0) > 0.6
    assert parameters_after(0.0) < 0.4
    assert parameters_after(-1.0) < 0.0


def test_rounds_of_one_step_are_one_episode():
    guide = started(LossAlignmentGuide())
    z = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    trajectory = Trajectory([Observation(p, float(i), 0.0, 3, 0.1) for i, p in enumerate(z)])
    for _ in range(3):
        guide.observe(Round(trajectory, predictions=predictions_of(z, 0), scores=np.arange(6.0)))
    assert guide.episodes == 1


# ---- as a guide


def test_it_is_trusted_where_its_loss_ranks_the_metric_and_only_there():
    assert told(started(LossAlignmentGuide()), true_class_probability).standing[0] > 0.5
    against = told(started(LossAlignmentGuide()), lambda prediction: -true_class_probability(prediction))
    assert against.standing == (0.0, NOT_PREDICTIVE)
    smaller = told(started(LossAlignmentGuide(), False), lambda prediction: -true_class_probability(prediction))
    assert smaller.standing[0] > 0.5


def test_it_stands_in_for_the_task_s_loss_as_long_as_the_weight_says():
    guide, context = LossAlignmentGuide(), guide_context(coordinates())
    guide.start(type(context)(context.coordinates, True, context.generator, context.metric, 4.0))
    trusted(told(guide, true_class_probability, rounds=2))
    inputs, outputs, task_loss = batch()
    losses = (guide.loss(inputs, outputs, task_loss), task_loss)
    ours, task = (torch.autograd.grad(x, outputs["logits"], retain_graph=True)[0] for x in losses)
    assert float(ours.norm()) == pytest.approx(4 * float(task.norm()), rel=1e-4)
    raised = (-ours).gather(1, inputs["labels"][:, None]).mean()
    assert raised > 0  # of the true class


def test_of_embeddings_it_adapts_a_margin_and_a_temperature():
    guide, rng = started(LossAlignmentGuide()), np.random.default_rng(0)
    labels, trajectory = np.arange(30) % 6 + 50, Trajectory()
    for step in range(3):
        predictions = [EvalPrediction(rng.normal(size=(30, 4)).astype(np.float32), labels) for _ in range(4)]
        trajectory.extend([Observation(np.zeros(4, np.float32), float(i), 0.0, step, 0.1) for i in range(4)])
        guide.observe(Round(trajectory, predictions=predictions, scores=np.arange(4.0)))
    assert guide.kind == IDENTITIES and guide.parameters.shape == (2,)
    x = torch.randn(12, 4, requires_grad=True)
    loss = guide.loss({"labels": torch.arange(12) % 3}, {"logits": x}, x.square().mean())
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.norm() > 0


def test_of_numbers_it_switches_itself_off(caplog):
    guide = started(LossAlignmentGuide())
    prediction = EvalPrediction(np.zeros((5, 1), np.float32), np.linspace(0, 1, 5, dtype=np.float32))
    trajectory = Trajectory([Observation(np.zeros(4, np.float32), 0.0, 0.0, 0, 0.1)])
    guide.observe(Round(trajectory, predictions=[prediction], scores=np.zeros(1)))
    assert guide.standing[0] == 0 and "numbers" in guide.standing[1] and "cannot guide this run" in caplog.text
