"""The trainer of the tests of published forms, guided and as it is by Trainer."""

import pytest
from helpers import Texts, weights
from runs import text_trainer
from transformers import Trainer, TrainingArguments

from metricopt_hf import MetricOptTrainer

STEPS, FIRST_PHASE = 8, 6  # a schedule that is constant makes the first phase a shorter run of Trainer
BUDGETS = {"metric_call_budget": 60, "forward_pass_budget": 12, "phi_dim": 2}


def guided(folder, cls=MetricOptTrainer, trainer_kwargs=None, **kwargs):
    data = {"train_dataset": Texts(96, seed=1), "eval_dataset": Texts(48, seed=2), **(trainer_kwargs or {})}
    return text_trainer(folder, cls, trainer_kwargs=data, **{"max_steps": STEPS, **BUDGETS, **kwargs})


def by_trainer(folder, cls=Trainer, trainer_kwargs=None, **kwargs):
    data = {"train_dataset": Texts(96, seed=1), "eval_dataset": Texts(48, seed=2), **(trainer_kwargs or {})}
    kwargs = {"max_steps": FIRST_PHASE, **kwargs}
    return text_trainer(folder, cls, config=TrainingArguments, trainer_kwargs=data, **kwargs)


def assert_delivered(trainer):
    """It was guided, and the score that was selected is that of the model that comes out, as `predict` has it."""
    best = trainer.phase.selection.best
    assert trainer.ledger.calls["observe"] > 0 and trainer.phase.faults.total == 0
    assert not any("film" in name for name in weights(trainer.model))
    out = trainer.predict(trainer.selection_dataset).metrics[f"test_{trainer.metric.name}"]
    assert best.phi is not None and out == pytest.approx(best.score, abs=1e-6)
