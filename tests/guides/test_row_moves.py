"""Row moves: which metrics they serve, what calls they make, and that they find the labels."""

import numpy as np
import pytest
import torch
from local_metrics import DIM, ROWS, Local, accuracy, cosine, right_probability, started, taught
from scipy.stats import rankdata

from metricopt_hf.guides import RowMovesGuide, row_moves


def ranking(prediction) -> float:
    """Area under the ROC curve."""
    ranks = rankdata(prediction.predictions[:, 1] - prediction.predictions[:, 0])
    positive = prediction.label_ids == 1
    wins = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return float(wins / (positive.sum() * (~positive).sum()))


@pytest.mark.parametrize(("function", "applies"), [(accuracy, True), (ranking, False), (right_probability, False)])
def test_it_serves_metrics_of_decisions_alone(function, applies):
    local = Local(function)
    assert started(RowMovesGuide(), local).applies(local.metric()) is applies


def test_without_a_linearization_or_on_all_rows_alone_it_has_nothing_to_say():
    local = Local(linearised=False)
    assert not started(RowMovesGuide(), local).applies(local.metric())
    local = Local()
    metric = local.metric()
    metric.on_all_rows = True
    assert not started(RowMovesGuide(), local).applies(metric)


def test_without_labels_it_has_nothing_to_say():
    local = Local()
    local.linearization.centre.label_ids = None
    assert not started(RowMovesGuide(), local).applies(local.metric())


def test_exchangeable_rows_share_a_call():
    """Labels and decision alike: a metric that looks at nothing else cannot tell them apart."""
    local = Local()
    taught(started(RowMovesGuide(), local), local, updates=1)
    assert local.ledger.calls["observe"] <= 1 + 2 * 2  # as it is, and one row for each label and decision


def test_of_more_moves_than_there_are_calls_some_are_drawn():
    local = Local(budget=3)
    guide = taught(started(RowMovesGuide(), local), local, updates=1)
    assert local.ledger.calls["observe"] == 3
    assert guide.gradient(torch.zeros(DIM)).isfinite().all()


def test_what_rows_are_worth_is_what_their_labels_say():
    """Of accuracy: the true class raises it where another is decided, and the other lowers it where it is decided."""
    local = Local()
    guide = taught(started(RowMovesGuide(), local), local, updates=8)
    known = guide.count.min(1) > 0
    labels = local.labels.numpy()
    worth = guide.worth / np.maximum(guide.count, 1e-9)
    assert known.mean() > 0.8 and (worth.argmax(1) == labels)[known].mean() > 0.95
    assert guide.worth.shape == (ROWS, 2)


def test_its_gradient_is_that_of_a_weighted_cross_entropy():
    """Where every row is worth the same, it is the gradient of the loss."""
    local = Local()
    guide = taught(started(RowMovesGuide(), local), local, updates=8)
    z = torch.zeros(DIM, requires_grad=True)
    leaf = local.linearization.decisions
    loss = torch.nn.functional.cross_entropy(leaf.outputs + leaf.jacobian @ z, local.labels)
    (gradient,) = torch.autograd.grad(loss, z)
    assert cosine(guide.gradient(torch.zeros(DIM)), -gradient) > 0.9


def test_one_logit_per_row_is_two_classes():
    two = torch.randn(5, 2)
    assert row_moves.two_sided(two) is two
    for one in (two[:, 0], two[:, :1]):
        assert torch.equal(row_moves.two_sided(one), torch.stack([torch.zeros(5), two[:, 0]], 1))
