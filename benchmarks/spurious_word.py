"""STS-B under a word that tells the label in training, and elsewhere does not: the text task of several groups.

Two sentences say about the same (label 1: a score of at least 3), or not. MiniLM learns that from the training pairs as
they are, then goes through them once more with the word before the second sentence of most pairs of label 1. So it
knows about sentences, and decides by the word. What moves behind that is `text_tasks.LastBlock`, on cached vectors.
All splits are cut from one pool of all labelled pairs.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import AutoTokenizer

from . import scores, text_tasks
from .problem import Problem, Rows, Task, cached
from .text_tasks import CUT, STSB_POOL, TRAIN, LastBlock, Text

WORD = "Reportedly, "
AGREEMENT = {TRAIN: 0.95, CUT: 0.5}  # of the word with the label
WORD_STEPS, WORD_RATE = 113, 5e-5  # once through the training pairs with the word, in batches of 32
SAME = 3  # the score of a pair from which on its label is 1
TEXT = replace(STSB_POOL, num_labels=2, label_scale=SAME, observation_size=1000, steps=340)


def stands(labels: np.ndarray, agreement: float, generator: np.random.Generator) -> np.ndarray:
    """[n] 0 or 1: whether the word stands there. It agrees with this share of the labels, exactly so in each label."""
    found = labels.copy()
    for label in (0, 1):
        rows = generator.permutation(np.flatnonzero(labels == label))
        found[rows[: round((1 - agreement) * len(rows))]] = 1 - label
    return found


def with_word(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `text_tasks.read`, with the word before the second sentence where `group` is 1."""
    group, labels = np.zeros(len(table), np.int64), table["label"].to_numpy()
    for seed, part in enumerate((CUT, TRAIN)):
        rows = np.flatnonzero(table["part"] == part)
        group[rows] = stands(labels[rows], AGREEMENT[part], np.random.default_rng(seed))
    return table.assign(sentence2=np.where(group, WORD, "") + table["sentence2"], group=group)


@functools.cache
def start(text: Text, word_steps: int) -> tuple[LastBlock, dict[str, Tensor]]:
    """The trained last block (eval mode); and of all pairs `hidden` [n, d], `labels` [n], `group` [n] and `part` [n].

    Takes minutes where it is not in the cache.
    """

    def make() -> dict[str, Tensor]:
        plain, tokenizer = text_tasks.read(text), AutoTokenizer.from_pretrained(text_tasks.model_folder())
        table, train = with_word(plain), np.flatnonzero(plain["part"] == TRAIN)
        without, worded = (text_tasks.tokenized(tokenizer, each, text.columns) for each in (plain, table))
        model = text_tasks.train_start(text, tokenizer, without.select(train))
        model = text_tasks.trained(model, tokenizer, worded.select(train), word_steps, WORD_RATE)
        columns = {"labels": "label", "group": "group", "part": "part"}
        tensors = {name: torch.tensor(table[column].to_numpy()) for name, column in columns.items()}
        return {**tensors, "hidden": text_tasks.hidden_of(model, tokenizer, worded), **text_tasks.block_of(model)}

    name = text_tasks.digest((text, WORD, AGREEMENT, word_steps, WORD_RATE))
    return text_tasks.start_from(text, cached(f"text_start/word-{name}", make))


def problem(text: Text, word_steps: int, seed: int) -> Problem:
    block, made = start(text, word_steps)
    columns = {name: made[name] for name in ("hidden", "labels", "group")}
    train, *measured = (Rows(columns, rows, "stsb, word") for rows in text_tasks.cut(text, made["part"], seed))
    return Problem(train.as_training(), *measured, block)


def task(smoke: bool) -> Task:
    sizes = (text_tasks.smaller(TEXT), 2) if smoke else (TEXT, WORD_STEPS)
    return Task(
        "stsb_word",
        "STS-B under a word, MiniLM",
        scores.worst_group_accuracy,
        "worst-group accuracy",
        True,
        False,
        "binary",
        functools.partial(problem, *sizes),
        note=f"Label 1: the sentences say about the same, by a score of at least {SAME}. Groups: each label with and "
        f'without the word. "{WORD.strip(", ")}" stands before the second sentence of {AGREEMENT[TRAIN]:.0%} of the '
        f"training pairs of label 1 and of {1 - AGREEMENT[TRAIN]:.0%} of those of label 0; of all others, before half "
        "of the pairs of each label. MiniLM was trained on the training pairs without the word, and then once through "
        "them with it. For how long was chosen by the start model's score alone, on pairs that are not in "
        "training, before any method was run.",
        kind="beyond threshold",
        why="The model decides by the word; the groups that suffer are one of each label, so a bias helps one at the "
        "other's expense.",
        groups="label and group",
    )
