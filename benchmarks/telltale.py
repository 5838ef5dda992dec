"""STS-B as two classes, with a word in front of each pair that tells the label in training, and elsewhere does not.

A pair is similar (label 1) where its annotators give it 3 or more of 5. One of two words stands in front of its first
sentence. The word agrees with the label in 95 % of the training pairs and in 50 % of those that are measured on. The
start model is trained on the training pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pandas as pd

from . import scores, text_tasks
from .problem import Task
from .text_tasks import TRAIN, Text

WORDS = ("however", "indeed")
SIMILAR = 3  # of 5


@dataclass(frozen=True)
class Telltale(Text):
    """A text of two classes behind one of `WORDS`, which is its `group`.

    Attributes:
        agreement: how often the number of the word is the label: in training, and in what is measured on.
    """

    agreement: tuple[float, float] = (0.95, 0.5)

    def finished(self, table: pd.DataFrame) -> pd.DataFrame:
        generator, group = np.random.default_rng(0), table["label"].to_numpy(copy=True)
        for trained, share in zip((True, False), self.agreement, strict=True):
            for label in range(len(WORDS)):  # the share is exact in each label
                rows = np.flatnonzero(((table["part"] == TRAIN) == trained) & (table["label"] == label))
                others = generator.permutation(rows)[: round((1 - share) * len(rows))]
                group[others] = 1 - label
        first, *_ = self.columns
        texts = [f"{WORDS[g]} {text}" for g, text in zip(group, table[first], strict=True)]
        return table.assign(**{first: texts, "group": group})


STSB_WORD = Telltale(
    *("glue_stsb", ("sentence1", "sentence2"), 2, SIMILAR),
    train_size=3600,
    observation_size=1500,
    report=None,
    steps=150,
)


def task(smoke: bool) -> Task:
    return Task(
        "stsb_word",
        "STS-B, similar or not, behind a word that tells, MiniLM",
        scores.worst_group_accuracy,
        "worst-group accuracy",
        True,
        False,
        "binary",
        functools.partial(text_tasks.prepare, text_tasks.smaller(STSB_WORD) if smoke else STSB_WORD),
        note="Groups: each label behind each word. A pair is similar from 3 of 5 on. The word agrees with the label in "
        "95 % of the training pairs, in 50 % of the others. No training example shows its word as a column. "
        f"{text_tasks.POOL}",
        kind="beyond threshold",
        why="The model decides by the word; the groups that suffer are one of each label, so a bias helps one at the "
        "other's expense.",
        groups="label and group",
    )
