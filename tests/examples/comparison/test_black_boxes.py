"""Comparisons by a metric of the model: every row has its numbers."""

import pytest
from helpers import Texts
from runs import text_trainer

from comparison.methods import METHODS, by_loss_alone, run_method, run_start
from metricopt_hf import MetricOptTrainer, ModelMetric

pytestmark = pytest.mark.slow

SPLITS = {"observation": Texts(40, seed=3), "selection": Texts(40, seed=4), "report": Texts(40, seed=5)}
SHORT = {"max_steps": 4, "phi_dim": 2, "metric_call_budget": 8}


def maker(folder, trainer_kwargs, **options):
    def make(follows_metric=True, **changes):
        cls = MetricOptTrainer if follows_metric else by_loss_alone(MetricOptTrainer)
        return text_trainer(folder, cls, trainer_kwargs=trainer_kwargs, **{**SHORT, **options, **changes})

    return make


def test_a_metric_of_the_model_is_asked_about_it_on_every_split(tmp_path):
    sizes = []

    def rows(model, dataset):
        sizes.append(len(dataset))
        return float(len(dataset)) + float(model.classifier.bias[0])

    kwargs = {"metric": ModelMetric(rows, "rows"), "compute_metrics": None}
    make = maker(tmp_path, kwargs)
    (start,) = run_start(make(), SPLITS, class_bias=True)
    trainer, runs = run_method(METHODS["loss_only"], make, SPLITS, class_bias=True)
    assert len(runs) == 1  # a bias cannot be tuned on predictions that the metric does not read
    for scores in (start.scores, runs[0].scores):
        assert scores.keys() == SPLITS.keys()
    assert runs[0].scores["report"] == pytest.approx(40 + trainer.model.classifier.bias[0].item())
