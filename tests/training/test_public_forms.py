"""Scripts in the forms in which users publish them: with the class names changed they run guided, or say what is amiss.

What each is after stands beside it, as repository and number of an issue. "By Trainer" is the same script with
Trainer itself.
"""

import collections

import numpy as np
import pytest
import torch
from forms import FIRST_PHASE, STEPS, AsItIs, assert_delivered, assert_no_worse_off, by_trainer, guided
from helpers import assert_equal_weights, tiny_bert, weights
from runs import probability
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import TrainerCallback, default_data_collator

from metricopt_hf import ConfigurationError, Metric, MetricError

# What is set up when training begins: class weights computed in a callback, a temperature per epoch


class Weighted:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits, inputs["labels"], self.class_weights)
        return (loss, outputs) if return_outputs else loss


class SetsUp(Weighted):
    """By a callback, when training begins."""

    event = "on_train_begin"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

        def set_up(callback, *args, **kwargs):
            self.class_weights = torch.tensor([1.0, 2.0, 1.0])

        self.add_callback(type("SetUp", (TrainerCallback,), {self.event: set_up}))


class SetsUpByEpoch(SetsUp):
    event = "on_epoch_begin"


# Several losses, each kept until they are logged (transformers 29972, 31081)


class SeveralLosses:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts, self.total, self.count = {"train": collections.defaultdict(list)}, torch.tensor(0.0), 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        size = outputs.logits.pow(2).mean()
        self.parts["train"]["size"].append(size.item())
        self.total += size.detach()
        self.count += 1
        return (loss + size, outputs) if return_outputs else loss + size

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, "sizes": self.parts["train"].pop("size"), "total": float(self.total), "count": self.count}
        super().log(logs, start_time)


def test_what_a_subclass_keeps_of_its_losses_is_of_training_alone(tmp_path):
    logged = []
    for make in (guided, by_trainer):
        trainer = make(tmp_path / make.__name__, SeveralLosses, logging_steps=2)
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "sizes" in entry]
        logged.append([[entry[name] for name in ("sizes", "total", "count")] for entry in entries])
    ours, plain = logged
    assert ours[:3] == plain[:3] and len(ours) == 4
    assert len(ours[3][0]) == 2 and ours[3][2] == STEPS  # in the metric phase too


# A loss with parameters of its own, which the optimizer holds (sentence-transformers 2872, pytorch-metric-learning 355)


class OwnHead:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(3)
        self.head = nn.Linear(3, 3)

    def create_optimizer(self, *args):
        super().create_optimizer(*args)
        self.optimizer.add_param_group({"params": list(self.head.parameters()), "lr": 1e-2})
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = functional.cross_entropy(self.head(outputs.logits), inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Keep(TrainerCallback):
    """What the weights were before the metric phase."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == FIRST_PHASE:
            self.weights = {**weights(model), **{f"head.{k}": v for k, v in weights(self.trainer.head).items()}}


def test_a_loss_with_parameters_of_its_own_is_trained_as_by_trainer(tmp_path):
    kept = []
    for make in (guided, by_trainer):
        keep = Keep()
        keep.trainer = make(tmp_path / make.__name__, OwnHead, {"callbacks": [keep]})
        keep.trainer.train()
        kept.append(keep.weights)
    assert_equal_weights(*kept)


# A loader for evaluation of one's own, beside a collator that mixes (pytorch/vision 7772)


def mixing(rows):
    labels = functional.one_hot(torch.stack([row["labels"] for row in rows]), 3).float()
    mixed = 0.7 * labels + 0.3 * labels[torch.randperm(len(labels))]
    return {"input_ids": torch.stack([row["input_ids"] for row in rows]), "labels": mixed}


class Mixes:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["input_ids"])
        loss = functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class ByArgument(Mixes):
    def get_eval_dataloader(self, eval_dataset=None):
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.accelerator.prepare(DataLoader(eval_dataset, 16, collate_fn=default_data_collator))


class ByAttribute(Mixes):
    def get_eval_dataloader(self, eval_dataset=None):
        return DataLoader(self.eval_dataset, 16, collate_fn=default_data_collator)


class ByCollator(Mixes):
    def get_eval_dataloader(self, eval_dataset=None):
        collator, self.data_collator = self.data_collator, default_data_collator
        loader = super().get_eval_dataloader(eval_dataset)
        self.data_collator = collator
        return loader


@pytest.mark.parametrize("form", [ByArgument, ByCollator])
def test_the_metric_is_observed_on_batches_of_a_loader_of_one_s_own(tmp_path, form):
    trainer = guided(tmp_path, form, {"data_collator": mixing}, eval_strategy="steps", eval_steps=4)
    trainer.train()
    assert trainer.ledger.calls["observe"] > 0 and trainer.result.failed_calls == 0
    assert len(trainer.accelerator._dataloaders) < 6  # of training, and two evaluations


def test_a_loader_that_does_not_look_at_what_it_is_asked_for_is_refused(tmp_path):
    trainer = guided(tmp_path, ByAttribute, {"data_collator": mixing})
    with pytest.raises(ConfigurationError, match="24 rows, it made one of 48"):
        trainer.train()
    assert trainer.state.global_step == 0


# Predicting in a way of one's own (trl 1222, transformers 11923)


class Predicts:
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        labels = inputs.pop("labels")
        inputs["input_ids"] += 1  # as a script does that shifts tokens
        with torch.no_grad():
            logits = model(**inputs).logits
        return functional.cross_entropy(logits, labels), logits, labels


@pytest.mark.parametrize("observe", ["predictions", "scores"])
def test_a_prediction_step_may_take_columns_out_and_write_to_them(tmp_path, observe):
    trainer = guided(tmp_path, Predicts, observe=observe)
    trainer.train()
    assert_delivered(trainer)


# Metrics that evaluate() makes itself (trl 5811)


class Evaluates:
    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        return {**metrics, "eval_certainty": 0.5}


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"compute_metrics": None}, "metric_for_best_model='certainty' names a metric, but there is no compute"),
        ({}, "compute_metrics is given, but metric_for_best_model names none"),
        ({"compute_metrics": None, "metric_for_best_model": None}, None),
    ],
)
def test_a_run_that_has_something_of_a_metric_and_is_not_guided_says_so(tmp_path, kwargs, told, caplog):
    names = {"metric_for_best_model": "certainty" if kwargs else None, **kwargs}
    metrics = {"compute_metrics": names.pop("compute_metrics")} if "compute_metrics" in names else {}
    trainer = guided(tmp_path, Evaluates, metrics, max_steps=1, greater_is_better=None, **names)
    trainer.train()
    assert trainer.phase is None
    assert (told or "nothing is guided") in caplog.text if told else "nothing is guided" not in caplog.text


@pytest.mark.parametrize("name", ["evaluate", "evaluation_loop"])
def test_a_metric_that_compute_metrics_does_not_return_is_asked_for_by_name(tmp_path, name):
    form = type("Overrides", (), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(MetricError, match=rf"'certainty'.*\n.*{name}\(\) is overridden .*metric=Metric\("):
        guided(tmp_path, form, metric_for_best_model="certainty").train()


def test_where_evaluate_renames_it_the_metric_given_is_optimised(tmp_path):
    class Renames:
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return {**metrics, "eval_certainty": metrics.pop("eval_probability")}

    names = {"metric_for_best_model": "certainty", "greater_is_better": True}
    saves = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    metric = {"metric": Metric(probability, "probability", True)}
    trainer = guided(tmp_path, Renames, metric, load_best_model_at_end=True, **names, **saves)
    trainer.train()
    assert trainer.metric.name == "probability" and trainer.state.best_metric is not None


# Forms that were right from the start


class SwappedAndPopped:  # transformers 36331
    def compute_loss(self, model, inputs, num_items_in_batch=None, return_outputs=False):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        cross_entropy = functional.cross_entropy(outputs[0], labels, reduction="none")
        loss = ((1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy).mean()
        return (loss, outputs) if return_outputs else loss


class RDrop:  # dropreg/R-Drop 24
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = model(**inputs), model(**inputs)
        p, q = (functional.log_softmax(outputs.logits, -1) for outputs in (first, second))
        distance = functional.kl_div(p, q, reduction="sum", log_target=True)
        loss = (first.loss + second.loss) / 2 + distance
        return (loss, first) if return_outputs else loss


class Distils:  # transformers 25182, 25619
    def __init__(self, model=None, args=None, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self.student, self.teacher = model, tiny_bert(seed=5).eval()

    def compute_loss(self, student, inputs, return_outputs=False, **kwargs):
        outputs = self.student(**inputs)
        with torch.no_grad():
            target = functional.softmax(self.teacher(**inputs).logits / 5, -1)
        loss = outputs.loss + functional.cross_entropy(outputs.logits / 5, target)
        return (loss, outputs) if return_outputs else loss


class Oversamples:  # Multimodal-Toolkit 6
    def get_train_dataloader(self):
        labels = self.train_dataset.labels.numpy()
        sampler = WeightedRandomSampler((1 / np.bincount(labels))[labels], len(labels))
        return DataLoader(self.train_dataset, 8, sampler=sampler, collate_fn=self.data_collator)


class Anneals:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        done = self.state.global_step / self.state.max_steps + self.state.epoch / self.args.num_train_epochs
        loss = loss * (1 + done + self.lr_scheduler.get_last_lr()[0])
        return (loss, outputs) if return_outputs else loss


class SharpnessAware:  # davda54/sam 31
    """A step of its own, which never calls Trainer's."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        self.accelerator.backward(self.compute_loss(model, self._prepare_inputs(inputs)))
        return torch.tensor(0.0)


def test_a_step_of_one_s_own_is_refused_by_name_before_training(tmp_path):
    trainer = guided(tmp_path, SharpnessAware)
    with pytest.raises(ConfigurationError, match=r"SharpnessAware\.training_step never calls super\(\)"):
        trainer.train()
    assert trainer.state.global_step == 0


class Features:
    """What a hook on a frozen layer has caught is part of the prediction."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.bert.embeddings.register_forward_hook(lambda module, x, y: setattr(self, "features", y[:, 0]))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, (logits, self.features.detach()), labels


def of_features(prediction):
    (logits, features), labels = prediction.predictions, prediction.label_ids
    chosen = torch.softmax(torch.as_tensor(logits), -1).numpy()[np.arange(len(labels)), labels]
    return {"probability": float((chosen * (1 + features[:, 0])).mean())}


class Unfreezes(TrainerCallback):
    """Layer by layer (discuss.huggingface.co 5501)."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.bert.requires_grad_(False)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.bert.encoder.requires_grad_(True)


MIXES = {"data_collator": mixing}


@pytest.mark.parametrize(
    ("form", "trainer_kwargs"),
    [
        (AsItIs, {}),
        (SwappedAndPopped, {}),
        (RDrop, {}),
        (Distils, {}),
        (Oversamples, {}),
        (Anneals, {}),
        (Features, {"compute_metrics": of_features}),
        (AsItIs, {"callbacks": [Unfreezes()]}),
        (SetsUp, {}),
        (SetsUpByEpoch, {}),
        (SeveralLosses, {}),
        (OwnHead, {}),
        (ByArgument, MIXES),
        (ByCollator, MIXES),
        (Predicts, {}),
        (Evaluates, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else ",".join(value),
)
def test_it_is_guided_and_delivers_what_was_selected_and_trainer_is_not_better_off(tmp_path, form, trainer_kwargs):
    trainer = guided(tmp_path / "ours", form, trainer_kwargs, logging_steps=2)
    trainer.train()
    if trainer_kwargs is not MIXES:  # `predict` would mix, as it does with Trainer
        assert_delivered(trainer)
    assert_no_worse_off(trainer, tmp_path, form, trainer_kwargs, logging_steps=2)
