"""The trainer of the tests of published forms, guided and as it is by Trainer."""

import shutil

import pytest
import torch
from helpers import Texts, tiny_bert
from runs import text_trainer
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from metricopt_hf import MetricOptConfig, MetricOptTrainer

STEPS, FIRST_PHASE = 8, 6  # of a run, and before its metric phase
SAVES = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
PHASE = {"metric_steps": STEPS - FIRST_PHASE, "metric_call_budget": 200, "phi_dim": 4, "guide": "pairs"}


class AsItIs:
    """A script that overrides nothing."""


def guided(folder, form=AsItIs, trainer_kwargs=None, **kwargs):
    """Args:
    form: what the script overrides, a class without a base.
    """
    data = {"train_dataset": Texts(96, seed=1), "eval_dataset": Texts(48, seed=2), **(trainer_kwargs or {})}
    cls = type(form.__name__, (form, MetricOptTrainer), {})
    return text_trainer(folder, cls, trainer_kwargs=data, **{"max_steps": STEPS, **PHASE, **kwargs})


def by_trainer(folder, form=AsItIs, trainer_kwargs=None, **kwargs):
    data = {"train_dataset": Texts(96, seed=1), "eval_dataset": Texts(48, seed=2), **(trainer_kwargs or {})}
    cls = type(form.__name__, (form, Trainer), {})
    kwargs = {"max_steps": STEPS, **kwargs}
    return text_trainer(folder, cls, config=TrainingArguments, trainer_kwargs=data, **kwargs)


def plain_and_guided(folder, form=AsItIs, trainer_kwargs=None, model=tiny_bert, **kwargs):
    """The same script with Trainer, which is trained, and guided."""
    data = {"train_dataset": Texts(96, seed=1), "eval_dataset": Texts(48, seed=2)}
    made = []
    for cls, config in ((Trainer, TrainingArguments), (MetricOptTrainer, MetricOptConfig)):
        settings = {"max_steps": STEPS, **PHASE, **kwargs}
        given = {**data, **(trainer_kwargs or {})}
        given["callbacks"] = [make() for make in given.get("callbacks", ())]
        torch.manual_seed(0)
        script = type(form.__name__, (form, cls), {})
        made.append(text_trainer(folder / cls.__name__, script, model(), config, given, **settings))
    made[0].train()
    return made


def assert_delivered(trainer):
    """It was guided, and the score that was selected is that of the model that comes out, as `predict` has it."""
    result = trainer.result
    assert trainer.ledger.calls["observe"] > 0 and result.failed_calls == 0 and result.curve
    out = trainer.predict(trainer.selection_dataset).metrics[f"test_{trainer.metric.name}"]
    assert result.chosen.known and out == pytest.approx(result.best_score, abs=1e-6)


def assert_no_worse_off(ours, folder, form=AsItIs, trainer_kwargs=None, **kwargs):
    """Trainer, with the same script, is not better off than `ours`, which has been trained.

    It goes no further, gives results of no other kinds, leaves the same parameters frozen, and saves a model that is
    loaded in the same way.
    """
    plain = by_trainer(folder / "plain", form, trainer_kwargs, **kwargs)
    plain.train()
    assert ours.state.global_step == plain.state.global_step == STEPS
    ours_end, plain_end = (_what_comes_out(trainer, folder / "saved") for trainer in (ours, plain))
    assert ours_end == plain_end


def _what_comes_out(trainer, folder):
    """Names of metrics, of what was logged and of files that were saved, and which parameters are trainable."""
    metrics = set(trainer.evaluate())
    logged = {key for entry in trainer.state.log_history for key in entry if not key.startswith("metricopt/")}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    shutil.rmtree(folder, ignore_errors=True)
    trainer.save_model(folder)
    files = {path.name for path in folder.iterdir()} - {"value_function"}
    loaded, ids = BertForSequenceClassification.from_pretrained(folder), Texts(20, seed=9).ids
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
    return metrics, logged, trainable, files
