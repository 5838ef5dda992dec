"""A loss that is nan, infinite or zero: nothing ends a run that Trainer would have finished."""

import pytest
import torch
from helpers import tiny_bert
from runs import text_trainer
from torch import nn


class Odd(nn.Module):
    """A classifier whose loss is multiplied by `factor` on some of its passes with labels in train mode."""

    def __init__(self, odd, factor):
        super().__init__()
        self.inner, self.odd, self.factor, self.passes = tiny_bert(), odd, factor, 0
        self.config = self.inner.config

    def forward(self, input_ids, labels=None):
        output = self.inner(input_ids=input_ids, labels=labels)
        if self.training:
            self.passes += 1
            if self.odd(self.passes - 1):
                output.loss = output.loss * self.factor
        return output


def hits(prediction):
    """Goes on answering when all is nan: the argmax of that is 0."""
    return {"probability": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("weight", [float("inf"), 1.0])
def test_in_the_metric_phase_it_moves_nothing_and_says_nothing_of_the_metric(tmp_path, factor, weight):
    model = Odd(lambda i: i >= 5, factor)
    trainer = text_trainer(tmp_path, model=model, trainer_kwargs={"compute_metrics": hits}, value_weight=weight)
    trainer.train()
    assert trainer.state.global_step == 8 and trainer.result.failed_calls == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert trainer.result.best_phi.isfinite().all()


def test_a_model_that_was_lost_before_is_what_trainer_would_have_left(tmp_path, caplog):
    model = Odd(lambda i: i == 1, float("nan"))
    trainer = text_trainer(tmp_path, model=model, trainer_kwargs={"compute_metrics": hits}, max_grad_norm=0.0)
    trainer.train()
    assert trainer.state.global_step == 8 and not torch.isfinite(model.inner.classifier.weight).all()
    assert trainer.result.ended == "the metric failed 3 times at its start" and "not finite" in caplog.text
