"""a9a for its groups: the men and the women of each label. The metric alone is told who is who.

The sex is a feature of a9a, and stays one, as it was published. It is no label of the training examples.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from . import scores, tabular
from .problem import Problem, Rows, Sizes, Task

MALE = 72  # of the features, counted from 0


def problem(sizes: Sizes, seed: int) -> Problem:
    """The clean one of a9a, with the sex (0 female, 1 male) as `group` of what is measured on."""
    plain = tabular.problem("a9a", sizes, 0.0, seed)

    def grouped(rows: Rows) -> Rows:
        return rows.with_column("group", rows.columns["features"][:, MALE].long())

    return replace(plain, **{name: grouped(rows) for name, rows in plain.measured.items()})


def tasks(sizes: Sizes) -> tuple[Task, ...]:
    prepare = functools.partial(problem, sizes)
    return (
        Task(
            "a9a_groups",
            "a9a, sex x label, MLP",
            scores.worst_group_accuracy,
            "worst-group accuracy",
            True,
            False,
            "binary",
            prepare,
            note="Groups: each label of each sex. The sex is a feature too, but no label of a training example.",
            kind="beyond threshold",
            why="One threshold trades the labels off; men and women of one label then still differ, and need two.",
            groups="label and group",
        ),
        Task(
            "a9a_fair",
            "a9a, fair to the sexes, MLP",
            scores.fair_accuracy,
            f"accuracy - excess of the equalised-odds gap over {scores.TOLERATED_GAP}",
            True,
            False,
            "binary",
            prepare,
            note="The sex is a feature too, but no label of a training example.",
            kind="beyond threshold",
            why="One threshold for both sexes moves both their rates, and closes the gap only where it decides all.",
            groups="label and group",
        ),
    )
