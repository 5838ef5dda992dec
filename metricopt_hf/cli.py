"""The command `metricopt`: a diagnosis of predictions in a file, a run on a CSV or a folder of images, value functions.

    metricopt diagnose --predictions preds.npz --metric my_metric.py:score
    metricopt run --data reviews.csv --model_name_or_path distilbert/distilbert-base-uncased \\
        --metric worst_group_accuracy --metric_columns region --output_dir out
    metricopt value-function show user/name
    metricopt value-function push out/value_function user/name

`--help` behind a command lists its options; a function in a file takes an `EvalPrediction` and returns a number.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import datasets
import numpy as np
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from .diagnosis import BIAS, START, Diagnosis, Scored, judged, scored
from .errors import ConfigurationError, MetricOptError
from .evaluation.direction import by_name
from .evaluation.ledger import Ledger
from .evaluation.metric import Metric
from .evaluation.modules import resolve
from .extras import require
from .hub import ValueFunction
from .linear.rows import take_rows
from .posthoc import add_bias, tune_bias
from .training.config import MetricOptConfig
from .training.preflight import metric_name
from .training.trainer import MetricOptTrainer

METRIC_HELP = (
    'A function in a file, "my_metric.py:score", of an EvalPrediction; or an `evaluate` module, by its name or folder.'
)


def function_of(spec: str) -> Callable[[EvalPrediction], Any] | str:
    """The function of "file.py:name"; any other text as it is, the name of an `evaluate` module.

    Raises:
        ConfigurationError: there is no such file, or no such function in it.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        return spec
    if not os.path.exists(path):
        raise ConfigurationError(f"--metric {spec}: there is no file {path} here ({os.getcwd()}).")
    module_spec = importlib.util.spec_from_file_location("metricopt_metric", path)
    assert module_spec is not None and module_spec.loader is not None  # of a .py file
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(found := getattr(module, name, None)):
        raise ConfigurationError(f"--metric {spec}: there is no function {name!r} in {path}.")
    return found


# metricopt diagnose


@dataclass
class DiagnoseArguments:
    """What a bias per logit gives on rows that it was not fitted to, by logits and label columns in a file."""

    predictions: str = field(
        metadata={
            "help": 'File of numpy.savez: "logits" [rows, classes], and in the order in which the metric gets them the '
            "label columns, [rows] each."
        }
    )
    metric: str = field(metadata={"help": METRIC_HELP})
    metric_key: str | None = field(default=None, metadata={"help": "Which of several numbers that the metric returns."})
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Which way is better. Default: as the name of the metric says."}
    )
    worthwhile: float | None = field(
        default=None,
        metadata={"help": "Smallest gain worth having, in the metric's unit. Default: the metric's standard error."},
    )
    seed: int = field(default=0, metadata={"help": "Of the folds, and of the halves of their rows."})
    picture: str = field(default="diagnosis.png", metadata={"help": "Where the picture goes."})


def read_predictions(path: str) -> EvalPrediction:
    """The logits and the label columns of a file of `numpy.savez`.

    Raises:
        ConfigurationError: it cannot be read, or these are not in it, with a row for each example.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = dict(file)
        logits = columns.pop("logits")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"--predictions {path} is no file with an array called logits ({type(error).__name__}: {error}): write "
            f"one, as in numpy.savez({path!r}, logits=logits, labels=labels)."
        ) from error
    lengths = {name: len(column) if column.ndim else 0 for name, column in (("logits", logits), *columns.items())}
    if not columns or set(lengths.values()) != {len(logits)}:
        raise ConfigurationError(
            f"--predictions {path} must hold logits and at least one column of labels, with as many rows; it has "
            f"{lengths}."
        )
    return EvalPrediction(logits, tuple(columns.values()) if len(columns) > 1 else next(iter(columns.values())))


def diagnose_predictions(
    metric: Metric, prediction: EvalPrediction, worthwhile: float | None = None, seed: int = 0
) -> tuple[Diagnosis, list[Scored]]:
    """What a bias per logit gives, in two folds, with each fold's scores.

    Raises:
        MetricError: the metric fails on all rows.
    """
    since, ledger, count = perf_counter(), Ledger(), len(prediction.predictions)
    metric(prediction)

    def value(of: EvalPrediction) -> float:
        with ledger.charge("select"):
            return metric.value(of)

    order = np.random.default_rng(seed).permutation(count)
    parts = [take_rows(prediction, np.sort(rows)) for rows in (order[: count // 2], order[count // 2 :])]
    folds = []
    for fitted, held in (parts, parts[::-1]):
        biased = add_bias(held, tune_bias(metric, fitted, ledger))
        folds.append(scored(value, {START: held, BIAS: biased}, len(held.predictions), take_rows, seed))
    return judged(folds, metric, count, worthwhile, ledger, perf_counter() - since), folds


def draw(path: str, diagnosis: Diagnosis, folds: list[Scored], sign: int) -> None:
    """The metric on random halves of the rows, as the model predicts and with a bias, into an image file."""
    require("matplotlib", "plot")
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, label, color in ((START, "as predicted", "tab:gray"), (BIAS, "with a bias per logit", "tab:blue")):
        axes.hist(sign * np.concatenate([halves[name] for _, halves in folds]), 20, alpha=0.5, color=color, label=label)
        axes.axvline(diagnosis.scores[name], color=color)
    axes.set(xlabel=f"{diagnosis.metric} on random halves of rows that the bias was not fitted to", ylabel="halves")
    axes.set_title(f"a bias: {diagnosis.gains[BIAS, START]}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def diagnose(given: DiagnoseArguments) -> None:
    """`metricopt diagnose`."""
    metric = resolve(function_of(given.metric), True)
    metric.name = given.metric_key or metric.name
    greater = by_name(metric.name) if given.greater_is_better is None else given.greater_is_better
    if greater is None:
        raise ConfigurationError(
            f"Nothing says which way the metric {metric.name!r} is better: say --greater_is_better True or False."
        )
    metric.greater_is_better = greater
    found, folds = diagnose_predictions(metric, read_predictions(given.predictions), given.worthwhile, given.seed)
    draw(given.picture, found, folds, metric.sign)
    print(f"{found}\nThe picture is in {given.picture}.")


# metricopt run


@dataclass
class RunArguments:
    """Train a classifier on a CSV of texts or a folder of images; its last steps go up the metric."""

    data: str = field(
        metadata={
            "help": "A CSV with a column of texts and one of labels; or a folder with a folder of images for each "
            "class, or with images and a metadata.csv (file_name, label, further columns)."
        }
    )
    model_name_or_path: str = field(metadata={"help": "What to begin from: a folder, or a name on the Hub."})
    metric: str = field(metadata={"help": METRIC_HELP})
    text_column: str = field(default="text", metadata={"help": "Column of the texts of a CSV."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    metric_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns that the metric alone gets, behind the labels: groups, amounts. Texts are encoded."},
    )
    held_out_share: float = field(default=0.5, metadata={"help": "Share of the rows that the loss never sees."})
    report_share: float = field(default=0.4, metadata={"help": "Share of these that nothing sees before the end."})


def read_rows(given: RunArguments) -> datasets.Dataset:
    """All rows, with the columns text or image, labels, and those for the metric; texts among these as whole numbers.

    Raises:
        ConfigurationError: a column is not there.
    """
    is_folder = os.path.isdir(given.data)
    source: dict[str, Any] = {"data_dir": given.data} if is_folder else {"data_files": given.data}
    rows = datasets.load_dataset("imagefolder" if is_folder else "csv", **source, split="train")
    content = "image" if is_folder else given.text_column
    wanted = [content, given.label_column, *given.metric_columns]
    if missing := [name for name in wanted if name not in rows.column_names]:
        raise ConfigurationError(
            f"{given.data} has no column {', '.join(missing)}; the columns are {', '.join(rows.column_names)}."
        )
    rows = rows.select_columns(wanted)
    for name in wanted[1:]:
        feature = rows.features[name]
        is_text = "string" in str(feature.dtype)
        if is_text or (name == given.label_column and not isinstance(feature, datasets.ClassLabel)):
            rows = rows.class_encode_column(name)
    return rows.rename_columns({content: "image" if is_folder else "text", given.label_column: "labels"})


def run(given: RunArguments, args: MetricOptConfig) -> None:
    """`metricopt run`."""
    set_seed(args.seed)
    metric: Any = function_of(given.metric)
    if callable(metric):  # an error comes before all that takes time
        name = metric_name(args, None) or metric.__name__
        metric = Metric(metric, name, args.direction_of(name), args.metric_timeout)
    rows = read_rows(given)
    classes = rows.features["labels"].names
    args.label_names = ["labels", *given.metric_columns]
    begin: dict[str, Any] = {
        "pretrained_model_name_or_path": given.model_name_or_path,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        "ignore_mismatched_sizes": True,
    }
    processor: Any
    if "image" in rows.column_names:
        model = AutoModelForImageClassification.from_pretrained(**begin)
        processor = AutoImageProcessor.from_pretrained(given.model_name_or_path)

        def pixels(batch: dict[str, list]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in batch.pop("image")]
            return {**batch, "pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

        rows = rows.with_transform(pixels)
        args.remove_unused_columns = False  # an image is made a tensor when it is asked for
    else:
        model = AutoModelForSequenceClassification.from_pretrained(**begin)
        processor = AutoTokenizer.from_pretrained(given.model_name_or_path)
        rows = rows.map(lambda row: processor(row["text"], truncation=True), remove_columns="text")
    split = rows.train_test_split(given.held_out_share, seed=args.seed)
    held = split["test"].train_test_split(given.report_share, seed=args.seed)
    trainer = MetricOptTrainer(
        model,
        args,
        train_dataset=split["train"],
        eval_dataset=held["train"],
        processing_class=processor,
        metric=metric,
    )
    trainer.train()
    trainer.save_model()
    print(trainer.result)
    name = trainer.settled().metric.name
    score = trainer.evaluate(held["test"], metric_key_prefix="report")[f"report_{name}"]
    print(f"{name} on {len(held['test'])} rows that nothing has touched: {score:.4f}")
    print(f"The model is in {args.output_dir}.")


# metricopt value-function


@dataclass
class ShowArguments:
    """Print what a value function is of."""


@dataclass
class PushArguments:
    """Push a value function to a repository of its own."""

    private: bool | None = field(default=None, metadata={"help": "Whether a repository that is made is private."})
    commit_message: str = field(default="Value function", metadata={"help": "Of the commit."})


def show(given: ShowArguments, places: Any) -> None:
    """`metricopt value-function show`."""
    value_function = ValueFunction.from_pretrained(places.name_or_path)
    about, seen = value_function.signature, value_function.observations
    print(f"V(z) over {value_function.num_coordinates} coordinates, fitted to {len(seen)} observations")
    if about is not None:
        direction = "greater" if about.greater_is_better else "smaller"
        print(f"metric: {about.metric} ({direction} is better)\nmodel: {about.model}")
        print(f"phi: {about.phi['kind']}, {about.origin.numel()} numbers in {len(about.phi['parameters'])} parameters")
    if len(seen):
        print(f"scores seen: {seen.scores.min():.4g} to {seen.scores.max():.4g}")


def push(given: PushArguments, places: Any) -> None:
    """`metricopt value-function push`."""
    value_function = ValueFunction.from_pretrained(places.name_or_path)
    print(value_function.push_to_hub(places.repo_id, given.commit_message, given.private))


# The command

COMMANDS: dict[str, tuple[Callable[..., None], tuple[type, ...], tuple[str, ...]]] = {
    "diagnose": (diagnose, (DiagnoseArguments,), ()),
    "run": (run, (RunArguments, MetricOptConfig), ()),
    "value-function show": (show, (ShowArguments,), ("name_or_path",)),
    "value-function push": (push, (PushArguments,), ("name_or_path", "repo_id")),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 1 behind an error that is shown without its traceback, 2 for a command that there is not."""
    words = sys.argv[1:] if argv is None else argv
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if name is None:
        print(__doc__)
        return 0 if words[:1] in ([], ["--help"], ["-h"]) else 2
    command, arguments, places = COMMANDS[name]
    parser = HfArgumentParser(arguments, prog=f"metricopt {name}", description=arguments[0].__doc__)
    for place in places:
        parser.add_argument(place)
    try:
        command(*parser.parse_args_into_dataclasses(words[len(name.split()) :]))
    except MetricOptError as error:
        print(f"metricopt {name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
