"""What a guide is given in a run beside scores: predictions and labels, and the metric itself."""

import pytest
from helpers import distance_to_optimum, true_class_probability
from runs import Truth, faulty_trainer, quadratic_trainer

from metricopt_hf import MetricError


def trained(folder, guide, **kwargs):
    trainer = quadratic_trainer(folder, guide, **kwargs)
    trainer.train()
    return trainer


class Wants(Truth):
    """Keeps the rounds."""

    wants_predictions = True

    def __init__(self):
        super().__init__()
        self.rounds = []

    def learn(self, observed):
        scores = [o.score for o in observed.trajectory.last_round]
        self.rounds.append((scores, observed.predictions))


def test_rounds_bring_predictions_and_labels_where_they_are_wanted(tmp_path):
    guide = Wants()
    trained(tmp_path, guide)
    assert len(guide.rounds) == 20
    for scores, predictions in guide.rounds:
        assert len(scores) == len(predictions) == 8
        assert [distance_to_optimum(prediction) for prediction in predictions] == pytest.approx(scores)
        assert {len(prediction.label_ids) for prediction in predictions} == {8}


def test_of_calls_that_failed_there_are_none(tmp_path):
    calls = []

    def metric(prediction):
        calls.append(1)
        if len(calls) in (4, 5):  # the first is the check, then one for selection
            raise RuntimeError("not now")
        return true_class_probability(prediction)

    class Labelled(Wants):
        def predict(self, z):
            return None

    trainer = faulty_trainer(tmp_path, metric, guide=(guide := Labelled()))
    trainer.train()
    assert [len(scores) for scores, _ in guide.rounds][0] == 2
    for scores, predictions in guide.rounds:
        assert [true_class_probability(prediction) for prediction in predictions] == pytest.approx(scores)


def test_elsewhere_they_are_not_kept(tmp_path):
    class Unwanted(Wants):
        wants_predictions = False

    guide = Unwanted()
    trained(tmp_path, guide, max_steps=4)
    assert [predictions for _, predictions in guide.rounds] == [None] * 4


def test_the_metric_that_a_guide_calls_is_charged_as_an_observation(tmp_path):
    class Calls(Wants):
        def learn(self, observed):
            super().learn(observed)
            answers.append((self.context.metric(observed.predictions[0]), observed.trajectory.last_round[0].score))

    answers = []
    trainer = trained(tmp_path, Calls(), max_steps=5, metric_call_budget=None)
    assert len(answers) == 5 and all(answer == score for answer, score in answers)
    assert trainer.ledger.calls["observe"] == 5 * 8 + 5 and len(trainer.observations) == 5 * 8


def test_within_the_budget(tmp_path):
    class Calls(Wants):
        def learn(self, observed):
            super().learn(observed)
            self.context.metric(observed.predictions[0])

    trainer = trained(tmp_path, Calls(), max_steps=5, metric_call_budget=18)
    assert trainer.ledger.calls["observe"] == 18 and trainer.ledger.remaining == 0
    assert len(trainer.observations) == 8 + 8  # 8 and a call of its own, 8 and another


def test_a_guide_hears_of_a_metric_that_fails(tmp_path):
    class Calls(Wants):
        def learn(self, observed):
            broken = observed.predictions[0]
            broken.predictions = broken.predictions * float("nan")
            with pytest.raises(MetricError, match="finite"):
                self.context.metric(broken)
            failed.append(observed.trajectory[-1].step)

    failed = []
    trainer = trained(tmp_path, Calls(), max_steps=3, metric_call_budget=None)
    assert failed == [0, 1, 2] and trainer.ledger.calls["observe"] == 3 * 8 + 3
