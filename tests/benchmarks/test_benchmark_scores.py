"""The metrics of the tasks: against scikit-learn, and where they are not defined."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_score, recall_score
from transformers import EvalPrediction

from benchmarks import scores


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    logits, labels = generator.normal(size=(40, 2)), generator.integers(2, size=40)
    prediction, decided = EvalPrediction(logits, labels), logits.argmax(-1)
    recalls = recall_score(labels, decided, average=None)
    assert scores.f1(prediction) == pytest.approx(f1_score(labels, decided))
    assert scores.mcc(prediction) == pytest.approx(matthews_corrcoef(labels, decided))
    assert scores.worst_class_recall(prediction) == pytest.approx(recalls.min())
    assert scores.g_mean(prediction) == pytest.approx(recalls.prod() ** 0.5)
    assert scores.misclassification(prediction) == pytest.approx(1 - accuracy_score(labels, decided))
    # the greatest recall among thresholds that are precise enough, one threshold per example
    margin = logits[:, 1] - logits[:, 0]
    chosen = [margin >= threshold for threshold in margin]
    enough = [recall_score(labels, c) for c in chosen if precision_score(labels, c) >= scores.PRECISION]
    assert scores.recall_at_precision(prediction) == pytest.approx(max(enough, default=0.0))


def test_metrics_where_they_are_not_defined():
    negative = EvalPrediction(np.array([[1.0, 0.0]] * 3), np.zeros(3, int))
    assert (scores.f1(negative), scores.mcc(negative)) == (0, 0)
    assert scores.spearman(EvalPrediction(np.ones((3, 1)), np.arange(3.0))) == 0


def test_the_opaque_cost_is_asymmetric_noisy_and_repeatable():
    logits, labels = np.zeros((500, 2)), np.repeat([0, 1], 250)
    none, every = logits.copy(), logits.copy()
    none[:, 0], every[:, 1] = 1, 1
    missed, called = (scores.opaque_cost(EvalPrediction(x, labels)) for x in (none, every))
    assert called == pytest.approx(0.5)  # a call each for those who would not buy
    assert 2 < missed < 4  # half of them, at 6 on average
    assert missed == scores.opaque_cost(EvalPrediction(none, labels))
    turned = none.copy()
    turned[0] = [0, 1]  # one more call changes all draws
    assert abs(scores.opaque_cost(EvalPrediction(turned, labels)) - missed) > 0.01
