"""Comparisons by a metric of the model, and under constraints: every row has its numbers, and says what holds."""

import math

import pytest
from helpers import Texts
from runs import text_trainer

from comparison.methods import METHODS, by_loss_alone, run_method, run_start
from comparison.report import MethodRun, constraints_note
from metricopt_hf import MetricOptTrainer, ModelMetric

pytestmark = pytest.mark.slow

SPLITS = {"observation": Texts(40, seed=3), "selection": Texts(40, seed=4), "report": Texts(40, seed=5)}
SHORT = {"max_steps": 4, "phi_dim": 2, "metric_call_budget": 8}


def accuracies(prediction):
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right.mean()), "first": float(right[prediction.label_ids == 0].mean())}


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


def test_rows_under_constraints_say_which_hold_where(tmp_path):
    make = maker(
        tmp_path,
        {"compute_metrics": accuracies},
        metric_for_best_model="accuracy",
        metric_constraints="first>=0.9",
        metric_call_budget=80,
    )
    trainer, runs = run_method(METHODS["metricopt"], make, SPLITS, class_bias=True)
    assert [run.method for run in runs] == ["MetricOpt", "MetricOpt + class bias"]
    for made in runs:
        assert made.details["constraints"].keys() == SPLITS.keys()
    output = trainer.predict(SPLITS["report"])
    (check,) = runs[0].details["constraints"]["report"]
    assert check["value"] == pytest.approx(output.metrics["test_first"]) and 0 <= check["noise"] < 0.3
    assert check["holds"] == (check["value"] >= 0.9)
    # the tuned bias puts the constraint first, and on the split it was tuned on that can be had
    assert runs[1].details["constraints"]["observation"][0]["holds"]
    note = constraints_note(runs, ("selection", "report"))
    assert note.count("first>=0.9 holds on selection in") == 2 and "of a run's rows" in note


def test_the_note_counts_seeds_and_is_empty_without_constraints():
    def details(holds, noise):
        check = {"constraint": "a>=1", "value": 1.0, "holds": holds, "noise": noise}
        return {"constraints": {"selection": [check], "report": [check]}}

    runs = [MethodRun("ours", seed, {"report": 0.5}) for seed in range(3)]
    assert constraints_note(runs, ("selection", "report")) == ""
    for made, holds in zip(runs, (True, False, True), strict=True):
        made.details.update(details(holds, math.nan))
    assert constraints_note(runs, ("selection", "report")).strip() == (
        "ours: a>=1 holds on selection in 2 of 3 (1.000), on report in 2 of 3 (1.000)."
    )
