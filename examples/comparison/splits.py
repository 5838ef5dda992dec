"""The four data sets of a comparison: found among a data set's splits or cut from them, disjoint, and checked.

The loss sees `train`; the metric is observed on `observation`; what a metric phase ends with is chosen on `selection`;
and methods are compared on `report`, which nothing else touches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from metricopt_hf import ConfigurationError, MetricOptConfig

MEASURED = ("observation", "selection", "report")
GROUP_METRICS = ("worst_group_accuracy", "equalized_odds_gap")  # of those that come along


@dataclass
class DataArguments:
    """Where the data come from. Their columns are the script's own arguments."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set: a name on the Hub or a local folder. Default: see above."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(
        default="train",
        metadata={"help": 'Split to train on; slices such as "train[:5000]" and sums such as "train+validation" too.'},
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split from which observation and selection are cut. Default: validation, else test. The same as "
            "train_split: all four are cut from it."
        },
    )
    report_split: str | None = field(
        default=None,
        metadata={"help": "Split to report on. Default: test where eval_split is another, else cut from eval_split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many random examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many random examples of eval_split."})
    max_report_samples: int | None = field(default=None, metadata={"help": "Report on so many random examples."})


@dataclass
class Splits:
    """Four disjoint data sets of known length."""

    train: Any
    observation: Any
    selection: Any
    report: Any

    def __post_init__(self):
        for name, dataset in self.items():
            if len(dataset) == 0:
                raise ConfigurationError(f"The {name} split is empty: check --max_*_samples and --*_split.")

    def items(self) -> list[tuple[str, Any]]:
        """(name, data set), train first."""
        return [("train", self.train), *self.measured.items()]

    @property
    def measured(self) -> Mapping[str, Any]:
        """Those on which the metric is measured: all but train."""
        return {name: getattr(self, name) for name in MEASURED}

    def map(self, function: Callable[[Any], Any]) -> Splits:
        """The splits with `function` applied to each data set."""
        return replace(self, **{name: function(dataset) for name, dataset in self.items()})

    def check_numbers(self, column: str = "label") -> None:
        """Refuse labels that are not finite, and a split whose labels are all equal: nothing correlates with these.

        Raises:
            ConfigurationError: names the split.
        """
        for name, dataset in self.items():
            labels = np.asarray(dataset.with_format("numpy")[column][:])
            if (wrong := np.flatnonzero(~np.isfinite(labels))).size:
                raise ConfigurationError(
                    f"Example {wrong[0]} of the {name} split has the label {labels[wrong[0]]}, which is no number to "
                    "learn: leave such examples out, or name another column with --label_column_name."
                )
            if np.ptp(labels) == 0:
                raise ConfigurationError(
                    f"All labels of the {name} split are {labels[0]}, as where labels are held back: take another "
                    "--*_split, or more of it."
                )

    def with_groups(self, column: str | None) -> Splits:
        """The splits to measure on with their checked column `group`, and train without it: the metric alone is told.

        Args:
            column: its name in the data set; None: there are no groups, and nothing is done.

        Raises:
            ConfigurationError: groups are no whole numbers.
        """
        if column is None:
            return self
        for name, dataset in self.measured.items():
            groups = np.asarray(dataset.with_format("numpy")["group"][:])
            if groups.dtype.kind not in "iub":
                raise ConfigurationError(
                    f"The groups of the {name} split, its column {column!r}, are {groups.dtype}, not whole numbers: "
                    f"encode them first, with `dataset.class_encode_column({column!r})`."
                )
        without = [name for name in self.train.column_names if name != "group"]
        return Splits(self.train.select_columns(without), *self.measured.values())

    def check_classes(self, num_labels: int, column: str = "label") -> None:
        """Refuse labels that are no class indices below `num_labels`.

        Raises:
            ConfigurationError: names the first wrong example.
        """
        for name, dataset in self.items():
            labels = np.asarray(dataset.with_format("numpy")[column][:])
            if labels.dtype.kind not in "iu":
                raise ConfigurationError(
                    f"The labels of the {name} split are {labels.dtype}, not class indices: "
                    "encode them first, with `dataset.class_encode_column(...)`."
                )
            if (wrong := np.flatnonzero((labels < 0) | (labels >= num_labels))).size:
                raise ConfigurationError(
                    f"Example {wrong[0]} of the {name} split has the label {labels[wrong[0]]}, but there are "
                    f"{num_labels} classes, 0 to {num_labels - 1}. -1 often marks a split whose labels are held back."
                )


def default_dataset(name: str, root: Path) -> str:
    """The folder of a script's default data set, in $METRICOPT_DATA or else in `root`.

    Raises:
        ConfigurationError: it is not there.
    """
    folder = Path(os.environ.get("METRICOPT_DATA", root)) / name
    if not folder.is_dir():
        raise ConfigurationError(
            f"The default data set is not here: {folder}. Set METRICOPT_DATA to the folder that holds {name}, or name "
            "another data set with --dataset_name."
        )
    return str(folder)


def find_column(
    dataset: datasets.Dataset, given: str | None, usual: tuple[str, ...], option: str, kind: type | None = None
) -> str:
    """The column that is `given`, else the first of the `usual` names, else the only one whose feature is a `kind`.

    Raises:
        ConfigurationError: there is none; lists the columns and names the `option` of the script.
    """
    of_kind = [name for name, feature in dataset.features.items() if kind is not None and isinstance(feature, kind)]
    candidates = [given] if given is not None else [*usual, *of_kind[: len(of_kind) == 1]]
    if not (found := [name for name in candidates if name in dataset.column_names]):
        raise ConfigurationError(
            f"There is no column {candidates[0]!r}; the columns are {', '.join(dataset.column_names)}. "
            f"Name the right one with --{option}."
        )
    return found[0]


def with_group(args: MetricOptConfig, column: str | None) -> MetricOptConfig:
    """The arguments for a metric that is told the column `group` beside the labels.

    Args:
        column: its name in the data set; None: there is none, and the arguments stay.

    Raises:
        ConfigurationError: the metric needs groups, and there is no column of them.
    """
    if column is not None:
        return replace(args, label_names=["labels", "group"])
    if args.metric_name_or_path in GROUP_METRICS:
        raise ConfigurationError(
            f"{args.metric_name_or_path} compares groups of examples: name the column that holds them with "
            "--group_column_name."
        )
    return args


def group_axis(metric: str | None, groups: str) -> str:
    """What a picture of each group's score shows.

    Args:
        groups: what tells them apart.
    """
    if metric == "worst_group_accuracy":
        return f"accuracy by {groups}; the worst one counts"
    return f"{metric or 'the metric'}, by {groups}"


def class_names(dataset: datasets.Dataset, column: str = "label") -> list[str]:
    """The names of the classes, of a `ClassLabel` column; else the numbers up to the greatest label."""
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    labels = np.asarray(dataset.with_format("numpy")[column][:])
    return [str(i) for i in range(int(labels.max()) + 1)] if labels.size and labels.dtype.kind in "iu" else ["0"]


def load_splits(
    data: DataArguments,
    read: Callable[[datasets.Dataset], datasets.Dataset],
    seed: int,
    observation_size: int | None = None,
    token: str | None = None,
) -> Splits:
    """Load a data set and make four splits of it, at random by `seed` where they have to be cut.

    Args:
        read: picks and checks the columns; applied to each split as it is loaded.
        observation_size: examples for observation, and as many for selection. Default: equal parts of what is cut;
            where train is cut too, an eighth each, and a quarter for report.

    Raises:
        ConfigurationError: a split does not exist, is used twice, or is too small.
    """
    where = (data.dataset_name, data.dataset_config_name)
    existing = datasets.get_dataset_split_names(*where, token=token)
    eval_split = data.eval_split or next((s for s in ("validation", "valid", "test") if s in existing), None)
    if eval_split is None:
        raise ConfigurationError(
            f"There is no split to observe and select on beside {data.train_split!r} ({', '.join(existing)}): name one "
            f"with --eval_split. --eval_split {data.train_split} cuts all from that one."
        )
    report_split, one_source = data.report_split, data.train_split == eval_split
    if report_split is None and "test" in existing and not one_source:
        report_split = None if "test" in (*parts_of(data.train_split), *parts_of(eval_split)) else "test"
    if report_split in (data.train_split, eval_split):
        raise ConfigurationError(f"--report_split {report_split} is trained, observed or selected on: take another.")

    def load(split: str) -> datasets.Dataset:
        for name in parts_of(split):
            if name not in existing:
                raise ConfigurationError(f"{data.dataset_name} has no split {name!r}; it has {', '.join(existing)}.")
        return read(load_dataset(*where, split, token))

    evaluation = sample(load(eval_split), data.max_eval_samples, [seed, 1])
    train = None if one_source else load(data.train_split)
    report = None if report_split is None else load(report_split)
    also = [name for name, dataset in (("report", report), ("train", train)) if dataset is None]
    share = {(): 2, ("report",): 3, ("train",): 4, ("report", "train"): 8}[tuple(also)]
    size = len(evaluation) // share if observation_size is None else observation_size
    if size < 1 or 2 * size + len(also) > len(evaluation):
        raise ConfigurationError(
            f"{eval_split!r} has {len(evaluation)} examples, too few for observation and selection "
            f"({max(size, 1)} each){''.join(f' and {name}' for name in also)}: use more of it, or a smaller "
            "--observation_size."
        )
    order = np.random.default_rng([seed, 2]).permutation(len(evaluation))
    left = len(evaluation) - 2 * size
    if report is not None:
        reported = 0
    elif train is not None:
        reported = left
    else:
        reported = min(data.max_report_samples or 2 * size, left // 2)
    cuts = np.split(order, [size, 2 * size, 2 * size + reported])
    observation, selection, cut, rest = (evaluation.select(rows) for rows in cuts)
    report = cut if report is None else report
    train = rest if train is None else train
    train = sample(train, data.max_train_samples, [seed, 0])
    return Splits(train, observation, selection, sample(report, data.max_report_samples, [seed, 3]))


def load_dataset(name: str, config: str | None, split: str, token: str | None = None) -> datasets.Dataset:
    """A split, or an expression of several.

    Raises:
        ConfigurationError: it is empty; `datasets` has no data set for that.
    """
    try:
        return datasets.load_dataset(name, config, split=split, token=token)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ConfigurationError(f"The split {split!r} of {name} is empty: take another with --*_split.") from error


def sample(dataset: datasets.Dataset, size: int | None, seed: Any) -> datasets.Dataset:
    """`size` random examples, or all where there are no more."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(np.random.default_rng(seed).permutation(len(dataset))[:size])


def parts_of(split: str) -> list[str]:
    """The splits that an expression such as "train[:80%]+validation" names."""
    return [part.partition("[")[0].strip() for part in split.split("+")]
