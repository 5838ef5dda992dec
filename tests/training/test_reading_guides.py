"""Guides that read predictions, in a run: what rounds bring, resuming, and every guide by name under every form of outputs."""

import numpy as np
import pytest
import torch
from helpers import OPTIMUM, distance_to_optimum
from runs import Truth, quadratic_trainer, text_trainer

from metricopt_hf import BridgeGuide, LossAlignmentGuide, Trajectory


class Reads(Truth):
    """Keeps what rounds bring."""

    wants_predictions = True

    def __init__(self):
        super().__init__()
        self.rounds = []

    def learn(self, observed):
        told = observed.interpolated if len(observed.interpolated) else observed.trajectory
        self.rounds.append((observed.is_real, observed.predictions, observed.scores, told))


def test_interpolated_rounds_bring_predictions_too_and_the_metric_of_each(tmp_path):
    guide = Reads()
    trainer = quadratic_trainer(tmp_path, guide, observe="predictions", observation_folds=1, metric_call_budget=None)
    trainer.train()
    kinds = [is_real for is_real, *_ in guide.rounds]
    assert kinds.count(False) > 5 and kinds.count(True) > 1
    halves = 0
    for _, predictions, scores, _ in guide.rounds:
        assert len(predictions) == len(scores) > 1
        assert [distance_to_optimum(p) for p in predictions] == pytest.approx(list(scores))
        halves += len(predictions[0].label_ids) == 4
    assert halves == sum(len(p[0].label_ids) < 8 for _, p, *_ in guide.rounds) > 5  # of 8 rows
    assert distance_to_optimum(predictions[-1]) == pytest.approx(scores[-1])
    assert len(predictions[1:3]) == 2


def test_a_call_that_failed_leaves_no_prediction_behind(tmp_path):
    calls = []

    def metric(prediction):
        calls.append(1)
        if len(calls) % 7 == 0:
            raise RuntimeError("not now")
        return distance_to_optimum(prediction)

    guide = Reads()
    trainer = quadratic_trainer(tmp_path, guide, observe="predictions", observation_folds=1, max_steps=8)
    trainer._given_metric = metric
    trainer.train()
    assert trainer.result.failed_calls > 5
    for _, predictions, scores, _ in guide.rounds:
        assert [distance_to_optimum(p) for p in predictions] == pytest.approx(list(scores))


@pytest.mark.parametrize("guide", [BridgeGuide, LossAlignmentGuide])
def test_a_run_with_it_is_resumed(tmp_path, guide):
    def trainer(folder):
        return text_trainer(
            folder,
            trainer_kwargs={"guide": guide(), "metric": None},
            metric_start_ratio=0,
            observe_steps=2,
            save_strategy="steps",
            save_steps=4,
            max_steps=8,
            value_weight=5.0,
        )

    whole, resumed = trainer(tmp_path / "whole"), trainer(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert whole.result.trust > 0 and torch.equal(whole.result.last_phi, resumed.result.last_phi)
    assert whole.result.curve == resumed.result.curve
    loss_only = text_trainer(tmp_path / "loss", metric_start_ratio=0, max_steps=8, value_weight=0.0, guide="random")
    loss_only.train()
    assert not torch.equal(whole.result.last_phi, loss_only.result.last_phi)
