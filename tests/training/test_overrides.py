"""A subclass overrides what the library uses: the guidance holds all the same, or says by name what it needs."""

import collections
import logging

import pytest
import torch
from helpers import assert_equal_weights, tiny_bert, weights
from runs import text_trainer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptTrainer

PHASE = 5


def both(folder, form, trainer_kwargs=None, **kwargs):
    """The same script with our classes and with Trainer's, trained."""
    trainers = []
    for base, config in ((MetricOptTrainer, MetricOptConfig), (Trainer, TrainingArguments)):
        trainer = text_trainer(
            folder / base.__name__, type("Own", (form, base), {}), None, config, trainer_kwargs, **kwargs
        )
        trainer.train()
        trainers.append(trainer)
    return trainers


class Weighted:
    """Class weights (transformers 12997)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"], torch.tensor([1.0, 3.0, 1.0]))
        return (loss, outputs) if return_outputs else loss


class Noisy:
    """Draws random numbers and writes to the weights; logs by itself."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        with torch.no_grad():
            model.classifier.weight.add_(0.01 * torch.randn(3, 16))
        self.calls = getattr(self, "calls", 0) + 1
        self.log({"calls": self.calls})
        return super().training_step(model, inputs, num_items_in_batch)


class FGM:
    """Adversarial training as in GLiNER's trainer: behind the step another one up the loss in the embeddings."""

    attacks = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        table = model.bert.embeddings.word_embeddings.weight
        norm = torch.norm(table.grad)
        backup = table.data.clone()
        if norm != 0 and not torch.isnan(norm):
            table.data.add_(table.grad / norm)
            self.attacks += 1
        self.accelerator.backward(self.compute_loss(model, self._prepare_inputs(inputs)))
        table.data = backup
        return loss


class TwoRates:
    """A head that learns 100 times faster (transformers 10140)."""

    def create_optimizer(self, model=None):
        head = [p for n, p in self.model.named_parameters() if "classifier" in n]
        body = [p for n, p in self.model.named_parameters() if "classifier" not in n]
        self.optimizer = torch.optim.AdamW([{"params": body, "lr": 1e-5}, {"params": head, "lr": 1e-3}])
        return self.optimizer


class Old:
    """Written before num_items_in_batch; predicts by itself, and takes columns out of the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        labels = inputs.pop("labels")
        inputs["input_ids"] += 1
        with torch.no_grad():
            outputs = model(**inputs)
        return None, outputs.logits, labels


class Keep(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == PHASE:
            self.weights = weights(model)
        self.rates = {group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize("form", [Weighted, Noisy, FGM, TwoRates, Old])
def test_its_steps_are_trainer_s_up_to_the_phase_and_then_phi_moves(tmp_path, form):
    kept = [Keep(), Keep()]
    for i, (base, config) in enumerate(((MetricOptTrainer, MetricOptConfig), (Trainer, TrainingArguments))):
        trainer = text_trainer(
            tmp_path / str(i), type("Own", (form, base), {}), None, config, {"callbacks": [kept[i]]},
            lr_scheduler_type="constant",
        )
        trainer.train()
        if i == 0:
            ours = trainer
    assert_equal_weights(kept[0].weights, kept[1].weights)
    assert kept[0].rates == kept[1].rates and len(kept[0].rates) == (2 if form is TwoRates else 1)
    assert ours.ledger.calls["observe"] > 0 and ours.result.failed_calls == 0
    after, tuned = weights(ours.model), set(ours.phi.names)
    moved = {name for name in after if not torch.equal(after[name], kept[0].weights[name])}
    assert moved <= tuned | ({"classifier.weight"} if form is Noisy else set())
    if form is FGM:
        assert ours.attacks == PHASE
    if form is not Noisy:
        score = ours.predict(ours.selection_dataset).metrics["test_probability"]
        assert score == pytest.approx(ours.result.best_score, abs=1e-6)


class Books:
    """Numbers kept by the model's mode, as all of TRL's trainers do; losses gathered until they are logged."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept, self.total, self.count = collections.defaultdict(list), torch.tensor(0.0), 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.kept["train" if self.model.training else "eval"].append(len(outputs["logits"]))
        self.total += 1.0
        self.count += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        if self.kept[mode]:
            logs[f"{mode}_rows"] = sum(self.kept[mode])
        self.kept[mode].clear()
        super().log({**logs, "total": float(self.total), "count": self.count}, start_time)


def test_what_a_subclass_keeps_is_of_training_and_evaluation_alone(tmp_path):
    kwargs = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    names = ("train_rows", "eval_rows", "step", "total", "count")
    ours, plain = (
        [
            {name: entry[name] for name in names if name in entry}
            for entry in trainer.state.log_history
            if not {"metricopt/start_score", "metricopt/kept_score"} & entry.keys()
        ]
        for trainer in both(tmp_path, Books, **kwargs)
    )
    assert ours == plain


class Kept:
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_step_that_never_calls_the_one_it_overrides_is_refused_by_name(tmp_path):
    trainer = text_trainer(tmp_path, type("Kept", (Kept, MetricOptTrainer), {}))
    with pytest.raises(ConfigurationError, match=r"Kept\.training_step never calls super\(\)\.training_step"):
        trainer.train()
    assert trainer.state.global_step == 0

    class Hidden(MetricOptTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step < PHASE:
                return super().training_step(model, inputs, num_items_in_batch)
            return Kept.training_step(self, model, inputs)

    hidden = text_trainer(tmp_path, Hidden)
    with pytest.raises(ConfigurationError, match=r"Step 5 .* was not guided: Hidden takes its steps without"):
        hidden.train()


class SaveAtEnd(TrainerCallback):
    """As trackers' callbacks do (wandb 2949, peft 96)."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(self.folder / "callback")
        other = Trainer(model, TrainingArguments(str(self.folder), report_to=[], use_cpu=True))
        other.save_model(self.folder / "other")


def test_what_a_callback_saves_at_the_end_is_the_chosen_model(tmp_path):
    trainer = text_trainer(tmp_path, trainer_kwargs={"callbacks": [SaveAtEnd(tmp_path)]})
    trainer.train()
    assert trainer.result.chosen.kind != "start"
    for name in ("callback", "other"):
        assert_equal_weights(weights(trainer.model), weights(tiny_bert().from_pretrained(tmp_path / name)))


def test_whoever_saves_or_loads_in_the_phase_has_a_plain_model(tmp_path):
    class PutBack(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 6:
                self.saved = weights(model)
                assert set(self.saved) == set(weights(tiny_bert()))
            if state.global_step == 7:
                model.load_state_dict(self.saved)  # strict

    trainer = text_trainer(tmp_path, trainer_kwargs={"callbacks": [PutBack()]})
    trainer.train()
    assert trainer.state.global_step == 8


def test_a_direction_that_is_known_by_its_name(tmp_path, caplog):
    def mse(prediction):
        return {"mse": float((prediction.predictions.argmax(-1) != prediction.label_ids).mean())}

    with caplog.at_level(logging.WARNING, "metricopt_hf"):
        trainer = text_trainer(
            tmp_path, trainer_kwargs={"compute_metrics": mse}, metric_for_best_model="mse", greater_is_better=None
        )
        assert trainer.metric.greater_is_better is False
    assert "smaller values of mse" in caplog.text
    assert not trainer.args.greater_is_better  # Trainer's own choice of the best checkpoint, too
