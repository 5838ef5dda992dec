"""Further forms from public reports: optimizers, callbacks, and models with other inputs, labels and outputs.

What each is after stands beside it, as repository and number of an issue. Each is run by Trainer too.
"""

import copy

import numpy as np
import pytest
import torch
from forms import AsItIs, assert_delivered, assert_no_worse_off, by_trainer, guided
from helpers import Texts, tiny_bert
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    default_data_collator,
)

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}

# ---- Optimizers


class MakesBoth:  # transformers 18635
    def create_optimizer_and_scheduler(self, num_training_steps):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: 1 - step / num_training_steps)


class ChoosesOptimizer:  # transformers 31875
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.RAdam, {"lr": 4e-3, "betas": (0.9, 0.99)}


GIVEN = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05})}  # transformers 34358


# ---- Callbacks


class ScoresTraining:  # transformers 13759
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        trainer = self

        class Scores(TrainerCallback):
            def on_epoch_end(self, args, state, control, **kwargs):
                before = copy.deepcopy(control)
                trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")
                return before

        self.add_callback(Scores())


@pytest.mark.parametrize(
    ("form", "trainer_kwargs"),
    [(MakesBoth, {}), (ChoosesOptimizer, {}), (AsItIs, GIVEN), (ScoresTraining, {})],
    ids=lambda value: value.__name__ if isinstance(value, type) else ",".join(value),
)
def test_guided_it_delivers_what_was_selected_and_trainer_is_not_better_off(tmp_path, form, trainer_kwargs):
    trainer = guided(tmp_path / "ours", form, trainer_kwargs, logging_steps=2)
    trainer.train()
    assert_delivered(trainer)
    assert_no_worse_off(trainer, tmp_path, form, trainer_kwargs, logging_steps=2)


# ---- Inputs, labels, outputs


class ManyLabels:  # transformers 10232
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.binary_cross_entropy_with_logits(outputs.logits, labels.float())
        return (loss, outputs) if return_outputs else loss


def several(size, seed):
    """Which tokens occur more than twice."""
    ids = Texts(size, seed).ids
    labels = torch.stack([(ids == token).sum(1) > 2 for token in (2, 3, 4)], 1).long()
    return [{"input_ids": row, "labels": y} for row, y in zip(ids, labels, strict=True)]


def agreement(prediction):
    """Of sigmoids with labels."""
    p = torch.sigmoid(torch.as_tensor(prediction.predictions)).numpy()
    return {"probability": float(np.where(prediction.label_ids == 1, p, 1 - p).mean())}


class TwoHeads(nn.Module):  # transformers 33193
    def __init__(self):
        super().__init__()
        self.encoder = BertModel(BertConfig(**SIZES))
        self.first, self.second = nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask=None, first_labels=None, second_labels=None):
        hidden = self.encoder(input_ids, attention_mask).pooler_output
        logits = self.first(hidden), self.second(hidden)
        loss = None
        if first_labels is not None:
            loss = functional.cross_entropy(logits[0], first_labels)
            loss = loss + functional.cross_entropy(logits[1], second_labels)
        return {"loss": loss, "first_logits": logits[0], "second_logits": logits[1]}


def two_labels(size, seed):
    texts = Texts(size, seed)
    return [
        {"input_ids": x, "first_labels": y, "second_labels": (y > 0).long()}
        for x, y in zip(texts.ids, texts.labels, strict=True)
    ]


def of_both(prediction):
    right = [
        torch.softmax(torch.as_tensor(z), -1).numpy()[np.arange(len(y)), y]
        for z, y in zip(prediction.predictions, prediction.label_ids, strict=True)
    ]
    return {"probability": float(np.mean(right))}


class Preference:  # trl 404
    """A reward that is greater for what was chosen; a batch holds both, and no labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen = model(input_ids=inputs["input_ids_chosen"]).logits[:, 0]
        rejected = model(input_ids=inputs["input_ids_rejected"]).logits[:, 0]
        loss = -functional.logsigmoid(chosen - rejected).mean()
        return (loss, {"chosen": chosen, "rejected": rejected}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, rewards = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        logits = torch.stack(list(rewards.values()), 1).softmax(1)
        return loss, logits, torch.zeros(len(logits))


def pairs(size, seed):
    ids = torch.sort((Texts(size, seed).ids == 2).sum(1), stable=True).indices
    low, high = Texts(size, seed).ids[ids[: size // 2]], Texts(size, seed).ids[ids[size // 2 :]]
    return [{"input_ids_chosen": a, "input_ids_rejected": b} for a, b in zip(high, low, strict=True)]


def preferred(prediction):
    return {"probability": float(prediction.predictions[:, 0].mean())}


class Siamese(nn.Module):  # transformers 11094
    """One encoder, used twice; the similarity is the logit."""

    def __init__(self):
        super().__init__()
        self.encoder = BertModel(BertConfig(**SIZES))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids_a, ids_b, labels=None):
        a, b = (self.encoder(ids).last_hidden_state.mean(1) for ids in (ids_a, ids_b))
        logits = self.scale * functional.cosine_similarity(a, b)
        loss = None if labels is None else functional.binary_cross_entropy_with_logits(logits, labels)
        return {"loss": loss, "logits": logits}


def likenesses(size, seed):
    a, b = Texts(size, seed), Texts(size, seed + 50)
    return [
        {"ids_a": x, "ids_b": z, "labels": float(p == q)}
        for x, z, p, q in zip(a.ids, b.ids, a.labels, b.labels, strict=True)
    ]


def padded(rows):
    """To the longest of the batch, labels with -100."""
    longest = max(len(row["input_ids"]) for row in rows)
    columns = {
        "input_ids": [functional.pad(row["input_ids"], (0, longest - len(row["input_ids"]))) for row in rows],
        "attention_mask": [(torch.arange(longest) < len(row["input_ids"])).long() for row in rows],
        "labels": [functional.pad(row["labels"], (0, longest - len(row["labels"])), value=-100) for row in rows],
    }
    return {name: torch.stack(column) for name, column in columns.items()}


def tagged(size, seed):  # transformers 7168
    """A tag says whether the token is that of before; rows of several lengths."""
    rows = []
    for i, ids in enumerate(Texts(size, seed).ids):
        ids = ids[: 3 + i % 6]
        rows.append({"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), (ids[1:] == ids[:-1]).long()])})
    return rows


def of_tokens(prediction):
    kept = prediction.label_ids != -100
    logits = torch.as_tensor(prediction.predictions[kept])
    right = torch.softmax(logits, -1).numpy()[np.arange(len(logits)), prediction.label_ids[kept]]
    return {"probability": float(right.mean())}


def language(size, seed):  # transformers 15466
    return [{"input_ids": ids.sort().values, "labels": ids.sort().values} for ids in Texts(size, seed).ids]


def likelihoods(logits, labels):
    """Of the next tokens, so that the logits of a vocabulary are not kept."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None])[..., 0]


def of_likelihoods(prediction):
    return {"probability": float(prediction.predictions.mean())}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def with_hidden_states():  # transformers 30104
    return tiny_bert(output_hidden_states=True)


def of_first(prediction):
    logits = prediction.predictions[0]
    right = torch.softmax(torch.as_tensor(logits), -1).numpy()[np.arange(len(logits)), prediction.label_ids]
    return {"probability": float(right.mean())}


MODELS = {
    "several labels": (ManyLabels, tiny_bert, several, {"compute_metrics": agreement}, {}),
    "two heads": (
        AsItIs, TwoHeads, two_labels, {"compute_metrics": of_both}, {"label_names": ["first_labels", "second_labels"]},
    ),
    "preference": (
        Preference, tiny_bert, pairs, {"compute_metrics": preferred, "data_collator": default_data_collator},
        {"remove_unused_columns": False},
    ),
    "siamese": (AsItIs, Siamese, likenesses, {"compute_metrics": agreement}, {}),
    "tokens": (
        AsItIs, lambda: BertForTokenClassification(BertConfig(**SIZES, num_labels=2)), tagged,
        {"compute_metrics": of_tokens, "data_collator": padded}, {},
    ),
    "language": (
        AsItIs, gpt2, language,
        {"compute_metrics": of_likelihoods, "preprocess_logits_for_metrics": likelihoods}, {},
    ),
    "hidden states": (AsItIs, with_hidden_states, Texts, {"compute_metrics": of_first}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_with_other_inputs_labels_and_outputs(tmp_path, name):
    """Metrics have the same names as by Trainer."""
    form, model, rows, given, kwargs = MODELS[name]
    sets = {"train_dataset": rows(96, 1), "eval_dataset": rows(48, 2)}
    ends = []
    for make in (guided, by_trainer):
        torch.manual_seed(0)
        trainer = make(tmp_path / make.__name__, form, {**sets, **given}, model=model(), **kwargs)
        trainer.train()
        if make is guided:
            assert_delivered(trainer)
        ends.append(set(trainer.evaluate()))
    assert ends[0] == ends[1]
