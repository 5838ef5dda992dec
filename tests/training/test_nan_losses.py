"""A loss that is nan, infinite or zero: nothing ends a run that Trainer would have finished."""

import pytest
import torch
from helpers import Texts, tiny_bert
from runs import planned
from torch import nn
from transformers import TrainerCallback

from metricopt_hf import MetricOptConfig, MetricOptTrainer

NAN, INF = float("nan"), float("inf")
STEPS, START, DIM = 24, 6, 4
GRADIENTS = 12 * DIM  # behind the first phase, for the coordinates


class Odd(nn.Module):
    """A classifier whose loss is multiplied by `factor` on some of the passes that have a gradient."""

    def __init__(self, odd, factor):
        super().__init__()
        self.inner, self.odd, self.factor, self.passes = tiny_bert(), odd, factor, 0
        self.config = self.inner.config

    def forward(self, input_ids, labels=None):
        output = self.inner(input_ids=input_ids, labels=labels)
        if torch.is_grad_enabled():
            self.passes += 1
            if self.odd(self.passes - 1):
                output.loss = output.loss * self.factor
        return output


class Begin(TrainerCallback):
    """The passes of the rehearsal, at the beginning of the first step, are not of the run."""

    def __init__(self, model):
        self.model = model

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.model.passes = 0


def hits(prediction):
    """Goes on answering when all is nan: the argmax of that is 0."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(folder, odd, factor, **kwargs):
    args = MetricOptConfig(
        str(folder),
        max_steps=STEPS,
        metric_start_ratio=START / STEPS,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        metric_call_budget=64,
        phi_dim=DIM,
        learning_rate=1e-3,
        phi_learning_rate=5e-3,
        observe="scores",
        tune_output_bias=False,
    )
    trainer = planned(MetricOptTrainer, {"observe_steps": 1})(
        Odd(odd, factor),
        args,
        train_dataset=Texts(160, seed=1),
        eval_dataset=Texts(80, seed=2),
        compute_metrics=hits,
        **kwargs,
    )
    trainer.add_callback(Begin(trainer.model))
    trainer.train()
    assert trainer.state.global_step == STEPS
    return trainer


@pytest.mark.parametrize("factor", [NAN, INF])
def test_before_the_coordinates_such_batches_are_left_out(tmp_path, factor):
    trainer = run(tmp_path, lambda i: i in (START + 1, START + 9), factor)
    assert trainer.result.coordinates.kind == "gradient_pca" and trainer.result.coordinates.origin.isfinite().all()
    assert trainer.result.failed_calls == 0


@pytest.mark.parametrize("factor", [NAN, INF])
def test_where_all_are_such_the_coordinates_are_random(tmp_path, factor, caplog):
    trainer = run(tmp_path, lambda i: START < i <= START + GRADIENTS, factor)
    assert trainer.result.coordinates.kind == "random" and "random directions instead" in caplog.text
    assert trainer.result.failed_calls == 0 and len(trainer.observations) == 64


def test_a_loss_that_has_reached_zero_is_no_end(tmp_path, caplog):
    trainer = run(tmp_path, lambda i: i > START, 0.0)
    assert trainer.result.coordinates.kind == "random" and "random directions instead" in caplog.text
    assert trainer.result.failed_calls == 0 and len(trainer.observations) > 0


@pytest.mark.parametrize("factor", [NAN, INF])
@pytest.mark.parametrize("preprocess", [None, lambda logits, labels: logits], ids=["", "preprocessed"])
def test_one_in_the_metric_phase_is_noticed_and_what_was_selected_before_comes_out(
    tmp_path, factor, preprocess, caplog
):
    odd = START + GRADIENTS + 4
    trainer = run(tmp_path, lambda i: i == odd, factor, preprocess_logits_for_metrics=preprocess)
    assert trainer.result.failed_calls > 0 and "phi is not finite" in caplog.text
    assert all(torch.as_tensor(o.z).isfinite().all() for o in trainer.observations)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert trainer.result.best_phi.isfinite().all()


def test_a_model_that_was_lost_in_the_first_phase_is_what_trainer_would_have_left(tmp_path, caplog):
    trainer = run(tmp_path, lambda i: i == 1, NAN)
    assert trainer.result.best_phi is None and trainer.observations == [] and "phi is not finite" in caplog.text
