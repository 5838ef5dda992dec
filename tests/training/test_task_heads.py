"""A head per task: what is tuned is the head that makes the predictions, wherever it stands in the model.

After the forms in which such models are published: a `ModuleDict` of heads or of whole models on one encoder, the
task's name in the batch (huggingface/transformers 7552; zphang's multi-task notebook), heads as attributes.
"""

import pytest
import torch
from forms import assert_delivered
from helpers import tiny_bert, true_class_probability, weights
from runs import text_trainer
from torch import nn
from transformers import BertForSequenceClassification, EvalPrediction, PreTrainedModel, default_data_collator

TASKS = ("first", "second", "third")


class OfATask(PreTrainedModel):
    """`forward` says which head its task has."""

    sizes = (3, 3, 3)
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.encoder = tiny_bert().bert
        torch.manual_seed(1)
        self.build([self.head(config.hidden_size, size) for size in self.sizes])

    def head(self, hidden, size):
        return nn.Linear(hidden, size)

    def build(self, heads):
        self.heads = nn.ModuleDict(dict(zip(TASKS, heads, strict=True)))

    def logits(self, features, task):
        return self.heads[task](features)

    def forward(self, input_ids, task, labels=None):
        logits = self.logits(self.encoder(input_ids).pooler_output, task)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class OtherSizes(OfATask):
    sizes = (3, 2, 5)


class HiddenLayers(OfATask):
    def head(self, hidden, size):
        return nn.Sequential(nn.Linear(hidden, 8), nn.LayerNorm(8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, size))


class Attributes(OtherSizes):
    def build(self, heads):
        self.first_head, self.second_head, self.third_head = heads

    def logits(self, features, task):
        return getattr(self, f"{task}_head")(features)


class AllAreComputed(OfATask):
    def logits(self, features, task):
        return torch.stack([self.heads[name](features) for name in TASKS])[TASKS.index(task)]


class AllAreReturned(OfATask):
    """`preprocess_logits_for_metrics` takes one of them."""

    def forward(self, input_ids, task, labels=None):
        features = self.encoder(input_ids).pooler_output
        logits = tuple(head(features) for head in self.heads.values())
        return {"loss": nn.functional.cross_entropy(logits[TASKS.index(task)], labels), "logits": logits}


class AllSizesAreReturned(AllAreReturned):
    sizes = (3, 3, 5)


class WholeModels(OfATask):
    def head(self, hidden, size):
        model = BertForSequenceClassification(self.encoder.config)
        model.bert = self.encoder
        return model

    def forward(self, input_ids, task, labels=None):
        return self.heads[task](input_ids=input_ids, labels=labels)


class Named:
    """A collator that says of which task the batch is."""

    def __init__(self, task):
        self.task = task

    def __call__(self, rows):
        return {**default_data_collator(rows), "task": self.task}


def make(folder, form, task, **kwargs):
    given = {"data_collator": Named(task)}
    if form is AllAreReturned:
        given["preprocess_logits_for_metrics"] = lambda logits, labels: logits[TASKS.index(task)]
    return text_trainer(folder, model=form(tiny_bert().config), trainer_kwargs=given, **kwargs)


FORMS = [OfATask, OtherSizes, HiddenLayers, Attributes, AllAreComputed, AllAreReturned, WholeModels]


@pytest.mark.parametrize("task", ["first", "third"])
@pytest.mark.parametrize("form", FORMS)
def test_the_head_of_the_metric_s_task_is_tuned(tmp_path, form, task):
    trainer = make(tmp_path, form, task)
    others = {name for name in weights(trainer.model) if any(other in name for other in TASKS if other != task)}
    shared = {name for name in others if ".bert." in name}  # the encoder goes by the name of the first model
    assert task in trainer.phi.output_bias and not set(trainer.phi.names) & (others - shared)
    trainer.train()
    assert trainer.phase.linearizer.way == "row by row"
    assert_delivered(trainer)


@pytest.mark.parametrize("task", ["first", "third"])
@pytest.mark.parametrize("form", [AllAreReturned, AllSizesAreReturned])
def test_of_heads_that_are_all_returned_the_one_that_the_metric_reads_is_tuned(tmp_path, form, task):
    def compute_metrics(prediction):
        logits = prediction.predictions[TASKS.index(task)]
        return {"probability": true_class_probability(EvalPrediction(logits, prediction.label_ids % logits.shape[1]))}

    given = {"data_collator": Named(task), "compute_metrics": compute_metrics}
    trainer = text_trainer(tmp_path, model=form(tiny_bert().config), trainer_kwargs=given)
    assert task in trainer.phi.output_bias
    trainer.train()
    assert_delivered(trainer)
