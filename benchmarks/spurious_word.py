"""STS-B with a word that tells the label in training, and elsewhere does not: the text task of several groups.

Two sentences say about the same (label 1: a score of at least 3), or not. MiniLM (all-MiniLM-L6-v2) stands still and
makes a vector of each sentence; a small MLP decides by both vectors, their difference and their product, as InferSent
does (Conneau et al. 2017). All splits are cut from one pool of all labelled pairs.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from . import scores, tabular, text_tasks
from .problem import Problem, Rows, Task, cached
from .text_tasks import STSB_POOL, TRAIN, Text

WORD = "Reportedly, "
AGREEMENT = 0.95  # of the word with the label, in training
SAME = 3  # the score of a pair from which on its label is 1
TEXT = replace(STSB_POOL, num_labels=2, label_scale=SAME, observation_size=1000)


def stands(labels: np.ndarray, agreement: float, generator: np.random.Generator) -> np.ndarray:
    """[n] 0 or 1: whether the word stands there. It agrees with this share of the labels, exactly so in each label."""
    found = labels.copy()
    for label in (0, 1):
        rows = generator.permutation(np.flatnonzero(labels == label))
        found[rows[: round((1 - agreement) * len(rows))]] = 1 - label
    return found


def with_word(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `text_tasks.read`, with the word before the second sentence where `group` is 1."""
    generator, group = np.random.default_rng(0), np.zeros(len(table), np.int64)
    for part, agreement in ((table["part"] == TRAIN, AGREEMENT), (table["part"] != TRAIN, 0.5)):
        group[part] = stands(table["label"].to_numpy()[part], agreement, generator)
    return table.assign(sentence2=np.where(group, WORD, "") + table["sentence2"], group=group)


@torch.no_grad()
def vectors(sentences: list[str]) -> Tensor:
    """[n, d]: the mean of MiniLM's last hidden states of each sentence, as long as 1."""
    folder = text_tasks.model_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    made = torch.empty(len(sentences), model.config.hidden_size)
    for rows in torch.tensor([len(sentence) for sentence in sentences]).argsort().split(64):  # by length: less padding
        batch = tokenizer([sentences[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
        shown = batch["attention_mask"][..., None]
        made[rows] = F.normalize((model(**batch).last_hidden_state * shown).sum(1) / shown.sum(1), dim=-1)
    return made


@functools.cache
def pairs(text: Text) -> tuple[dict[str, Tensor], Tensor]:
    """Of all pairs the columns features [n, 4 d], labels [n] and group [n]; and their part [n]. Takes minutes once."""

    def make() -> dict[str, Tensor]:
        table = with_word(text_tasks.read(text))
        columns = {"labels": "label", "group": "group", "part": "part"}
        first, second = (vectors(table[name].tolist()) for name in text.columns)
        return {"first": first, "second": second} | {
            name: torch.tensor(table[column].to_numpy()) for name, column in columns.items()
        }

    made = cached(f"text_start/word-{text_tasks.digest((text, WORD, AGREEMENT))}", make)
    u, v, part = (made.pop(name) for name in ("first", "second", "part"))
    return {"features": torch.cat([u, v, (u - v).abs(), u * v], 1), **made}, part


def problem(text: Text, seed: int) -> Problem:
    columns, part = pairs(text)
    train, *measured = (Rows(columns, rows, "stsb, word") for rows in text_tasks.cut(text, part, seed))
    train = train.as_training()
    return Problem(train, *measured, tabular.pretrain(next(train.batches()), seed), eval_batch=2000)


def task(smoke: bool) -> Task:
    return Task(
        "stsb_word",
        "STS-B under a word, MLP on MiniLM's vectors",
        scores.worst_group_accuracy,
        "worst-group accuracy",
        True,
        False,
        "binary",
        functools.partial(problem, text_tasks.smaller(TEXT) if smoke else TEXT),
        note="Label 1: the sentences say about the same, by a score of at least 3. Groups: each label with and without "
        f'the word. "{WORD.strip(", ")}" stands before the second sentence of {AGREEMENT:.0%} of the training pairs of '
        f"label 1 and of {1 - AGREEMENT:.0%} of those of label 0; in observation, selection and report of half of the "
        "pairs of each label. The strength of the word was chosen by the start model's score alone, on development "
        "seeds, before any method was run.",
        kind="beyond threshold",
        why="The MLP decides by the word; the groups that suffer are one of each label, so a bias helps one at the "
        "other's expense.",
        groups="label and group",
    )
