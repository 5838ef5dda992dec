"""Guides that read predictions, in a run: what rounds bring, and resuming."""

import pytest
import torch
from helpers import distance_to_optimum
from runs import Truth, quadratic_trainer, text_trainer

from metricopt_hf import BridgeGuide, LossAlignmentGuide


class Reads(Truth):
    """Keeps what rounds bring."""

    wants_predictions = True

    def __init__(self):
        super().__init__()
        self.rounds = []

    def learn(self, observed):
        self.rounds.append((observed.is_real, observed.predictions, observed.scores))


def test_interpolated_rounds_bring_predictions_too_and_the_metric_of_each(tmp_path):
    guide = Reads()
    trainer = quadratic_trainer(tmp_path, guide, observe="predictions", metric_call_budget=None)
    trainer.train()
    kinds = [is_real for is_real, *_ in guide.rounds]
    assert kinds.count(False) > 5 and kinds.count(True) > 1
    for _, predictions, scores in guide.rounds:
        assert len(predictions) == len(scores) > 1
        assert [distance_to_optimum(p) for p in predictions] == pytest.approx(list(scores))
    sizes = [len(predictions[0].label_ids) for _, predictions, _ in guide.rounds]
    assert sizes.count(4) > 5 and sizes.count(8) > 1  # half of the rows where they are interpolated
    assert distance_to_optimum(predictions[-1]) == pytest.approx(scores[-1])
    assert [distance_to_optimum(p) for p in predictions[1:3]] == pytest.approx(list(scores[1:3]))


def test_a_call_that_failed_leaves_no_prediction_behind(tmp_path):
    calls = []

    def metric(prediction):
        calls.append(1)
        if len(calls) % 7 == 0:
            raise RuntimeError("not now")
        return distance_to_optimum(prediction)

    guide = Reads()
    trainer = quadratic_trainer(tmp_path, guide, observe="predictions", max_steps=8)
    trainer._given_metric = metric
    trainer.train()
    assert trainer.result.failed_calls > 5
    for _, predictions, scores in guide.rounds:
        assert [distance_to_optimum(p) for p in predictions] == pytest.approx(list(scores))


@pytest.mark.parametrize("guide", [BridgeGuide, LossAlignmentGuide])
def test_a_run_with_it_is_resumed(tmp_path, guide):
    def trainer(folder):
        return text_trainer(
            folder,
            trainer_kwargs={"guide": guide(), "metric": None},
            metric_start_ratio=0,
            observe_steps=1,
            phi_dim=2,
            forward_pass_budget=18,  # two expansions
            save_strategy="steps",
            save_steps=3,
            max_steps=6,
            value_weight=5.0,
        )

    whole, resumed = trainer(tmp_path / "whole"), trainer(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert whole.result.trust > 0 and torch.equal(whole.result.last_phi, resumed.result.last_phi)
    assert whole.result.curve == resumed.result.curve
