"""Forms from further public reports, each with Trainer and guided: models, losses, labels, callbacks, arguments.

What it is after stands beside it, if there is one: repository and number of an issue or pull request, or a thread.
"""

import numpy as np
import pytest
import torch
from forms import SAVES, STEPS, assert_delivered, guided, plain_and_guided
from helpers import Texts, tiny_bert
from torch import nn
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    TrainerCallback,
    default_data_collator,
)

from metricopt_hf import ConfigurationError

SIZES = {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


# ---- Models


class OnABackbone(nn.Module):  # transformers 19050
    """Predictions alone without labels, with labels a tuple."""

    def __init__(self):
        super().__init__()
        self.backbone = tiny_bert()

    def forward(self, input_ids, labels=None):
        output = self.backbone(input_ids=input_ids)[0]
        return output if labels is None else (functional.smooth_l1_loss(output[:, 0], labels.float()), output)


def nearness(prediction):
    return {"probability": -float(np.abs(prediction.predictions[:, 0] - prediction.label_ids).mean())}


def of_first(prediction):  # transformers 7247, 15742
    first = prediction.predictions[0]
    chosen = torch.softmax(torch.as_tensor(first), -1).numpy()[np.arange(len(first)), prediction.label_ids]
    return {"probability": float(chosen.mean())}


def bart():
    config = BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16, num_labels=3, **SIZES,
    )  # fmt: skip
    return BartForSequenceClassification(config)


def closed(rows):
    """Each text with its end, which BART's head reads."""
    batch = default_data_collator(rows)
    ends = torch.ones(len(rows), 1, dtype=torch.long)
    return {**batch, "input_ids": torch.cat([batch["input_ids"], ends], 1)}


def gpt2(cls=GPT2ForSequenceClassification, **kwargs):
    return cls(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **SIZES, **kwargs))


def token_model():
    return BertForTokenClassification(tiny_bert().config)


class Tokens(torch.utils.data.Dataset):
    """Of two lengths; a label per token, some of them -100."""

    def __init__(self, size, seed):
        self.texts = Texts(size, seed)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        ids = self.texts.ids[i][: 5 + 3 * (i % 2)]
        labels = torch.where(torch.arange(len(ids)) == 0, -100, ids - 2)
        return {"input_ids": ids, "labels": labels}


def padded(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True)
    labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def of_tokens(prediction):
    known = prediction.label_ids != -100
    p = torch.softmax(torch.as_tensor(prediction.predictions), -1).numpy()[known]
    return {"probability": float(p[np.arange(len(p)), prediction.label_ids[known]].mean())}


class Weighted:  # evaluate 478
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.get("labels")
        outputs = model(**inputs)
        logits = outputs.get("logits")
        loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0]))(logits.view(-1, 3), labels.view(-1))
        return (loss, outputs) if return_outputs else loss


class WithCRF(nn.Module):  # lonePatient/BERT-NER-Pytorch 54
    """Tags are decoded in forward, so that predictions are whole numbers."""

    def __init__(self):
        super().__init__()
        self.bert = token_model()
        self.transitions = nn.Parameter(torch.zeros(3, 3))

    def forward(self, input_ids, attention_mask=None, labels=None):
        scores = self.bert(input_ids, attention_mask).logits
        scores = scores + functional.pad(scores[:, :-1].softmax(-1) @ self.transitions, (0, 0, 1, 0))
        tags = scores.argmax(-1)
        if labels is None:
            return (tags,)
        return functional.cross_entropy(scores.transpose(1, 2), labels), tags


class LossInTrainModeOnly(nn.Module):  # as of torchvision's detectors
    def __init__(self):
        super().__init__()
        self.net = token_model()

    def forward(self, input_ids, attention_mask=None, labels=None):
        output = self.net(input_ids, attention_mask, labels=labels)
        return {"loss": output.loss} if self.net.training else {"logits": output.logits}


class LossWhereTheRootTrains(LossInTrainModeOnly):
    def forward(self, input_ids, attention_mask=None, labels=None):
        output = self.net(input_ids, attention_mask, labels=labels)
        return {"loss": output.loss} if self.training else {"logits": output.logits}


class PredictsWithoutLoss:
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return None, model(**inputs)["logits"], inputs["labels"]


def right_tags(prediction):
    known = prediction.label_ids != -100
    return {"probability": float((prediction.predictions[known] == prediction.label_ids[known]).mean())}


TOKENS = {"train_dataset": Tokens(96, 1), "eval_dataset": Tokens(48, 2), "data_collator": padded}


# ---- Losses and labels


class LogsInside:  # transformers 45558
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.log({"size": float(outputs.logits.detach().abs().mean())})
        return (loss, outputs) if return_outputs else loss


class WithWeights:  # autogluon 1312
    """Each row has a weight, in the loss as in the metric."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight = inputs.pop("weight")
        outputs = model(**inputs)
        loss = (functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none") * weight).mean()
        return (loss, outputs) if return_outputs else loss


def weighted(size, seed):
    return [{**row, "weight": torch.tensor(1.0 + i % 3)} for i, row in enumerate(Texts(size, seed))]


def weighted_mean(prediction):
    labels, weight = prediction.label_ids
    p = torch.softmax(torch.as_tensor(prediction.predictions), -1).numpy()[np.arange(len(labels)), labels]
    return {"probability": float((p * weight).sum() / weight.sum())}


class Takes(nn.Module):  # after transformers 34278, with labels
    """An encoder of pairs, whose forward names no argument."""

    def __init__(self):
        super().__init__()
        self.encoder = tiny_bert()

    def forward(self, **batch):
        first, second = (self.encoder.bert(batch[name]).pooler_output for name in ("first", "second"))
        likeness = functional.cosine_similarity(first, second)
        return {"loss": (likeness - batch["labels"]).square().mean(), "logits": likeness}


def pairs(size, seed):
    texts = Texts(size, seed)
    same = [texts.labels[i] == texts.labels[-1 - i] for i in range(size)]
    return [{"first": texts.ids[i], "second": texts.ids[-1 - i], "labels": same[i].float()} for i in range(size)]


def agreement(prediction):
    return {"probability": -float(np.square(prediction.predictions - prediction.label_ids).mean())}


def next_tokens(prediction):  # the example run_clm: argmax as soon as logits are there
    predictions, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"probability": float((predictions == labels).mean())}


def texts(rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


class Augmented(Texts):
    """Rows are never twice the same."""

    def __getitem__(self, i):
        row = super().__getitem__(i)
        return {**row, "input_ids": row["input_ids"][torch.randperm(len(row["input_ids"]))]}


# ---- Callbacks and arguments


class ShuffledNoise(TrainerCallback):  # discuss.huggingface.co 5501: what is trained is changed between epochs
    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        model.bert.embeddings.requires_grad_(state.epoch < 1)


FORMS = {
    "a tuple with labels": {"model": OnABackbone, "trainer_kwargs": {"compute_metrics": nearness}},
    "BART": {"model": bart, "trainer_kwargs": {"compute_metrics": of_first, "data_collator": closed}},
    "hidden states": {
        "model": lambda: tiny_bert(output_hidden_states=True), "trainer_kwargs": {"compute_metrics": of_first},
    },
    "GPT-2": {"model": lambda: gpt2(num_labels=3)},
    "weighted tokens": {
        "form": Weighted, "model": token_model, "trainer_kwargs": {"compute_metrics": of_tokens, **TOKENS},
        "label_names": ["labels"],
    },
    "CRF": {"model": WithCRF, "trainer_kwargs": {"compute_metrics": right_tags, **TOKENS}},
    "loss in train mode only": {
        "form": PredictsWithoutLoss, "model": LossInTrainModeOnly,
        "trainer_kwargs": {"compute_metrics": of_tokens, **TOKENS},
    },
    "logs in the loss": {"form": LogsInside, "logging_steps": 2},
    "weights": {
        "form": WithWeights, "label_names": ["labels", "weight"], "remove_unused_columns": False,
        "trainer_kwargs": {
            "compute_metrics": weighted_mean, "train_dataset": weighted(96, 1), "eval_dataset": weighted(48, 2),
        },
    },
    "pairs": {
        "model": Takes, "remove_unused_columns": False, "label_names": ["labels"],
        "trainer_kwargs": {"compute_metrics": agreement, "train_dataset": pairs(96, 1), "eval_dataset": pairs(48, 2)},
    },
    "next tokens": {
        "model": lambda: gpt2(GPT2LMHeadModel), "trainer_kwargs": {
            "compute_metrics": next_tokens, "data_collator": texts,
            "preprocess_logits_for_metrics": lambda logits, labels: (
                logits[0] if isinstance(logits, tuple) else logits).argmax(-1),
        },
    },
    "label smoothing": {"label_smoothing_factor": 0.1},  # transformers 13464, 10338
    "noise in embeddings": {"neftune_noise_alpha": 5.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "a plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", **SAVES, "load_best_model_at_end": True},
    "augmented": {"trainer_kwargs": {"train_dataset": Augmented(96, 1), "eval_dataset": Augmented(48, 2)}},
    "no predictions in evaluation": {"prediction_loss_only": True},
    "freezing": {"trainer_kwargs": {"callbacks": [ShuffledNoise]}},
}  # fmt: skip


def test_logs_of_a_loss_are_of_training_and_evaluation_alone(tmp_path):
    plain, trainer = plain_and_guided(tmp_path, **FORMS["logs in the loss"])
    trainer.train()
    sizes = [[entry["step"] for entry in made.state.log_history if "size" in entry] for made in (plain, trainer)]
    assert sizes == [list(range(STEPS))] * 2


def test_a_loss_that_is_blended_in_has_a_gradient_in_eval_mode_or_is_refused(tmp_path):
    form = {**FORMS["loss in train mode only"], "value_weight": 1.0}
    trainer = guided(tmp_path, **{**form, "model": LossInTrainModeOnly()})
    with pytest.raises(ConfigurationError, match=r"value_weight=1.0 blends in .* none in eval mode"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = guided(tmp_path, **{**form, "model": LossWhereTheRootTrains()})
    trainer.train()
    assert_delivered(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_it_runs_as_with_trainer_and_delivers_what_was_selected(tmp_path, name):
    plain, trainer = plain_and_guided(tmp_path, **FORMS[name])
    trainer.train()
    assert trainer.state.global_step == STEPS and trainer.result.failed_calls == 0
    if name not in ("augmented", "no predictions in evaluation"):  # `predict` says otherwise, or nothing
        assert_delivered(trainer)
    assert set(trainer.evaluate()) - {"eval_probability"} == set(plain.evaluate()) - {"eval_probability"}
    logged = [{key for entry in made.state.log_history for key in entry} for made in (plain, trainer)]
    assert {key for key in logged[1] if not key.startswith("metricopt/")} == logged[0]
