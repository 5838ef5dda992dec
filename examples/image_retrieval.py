#!/usr/bin/env python
"""Train an image embedding for the metric of retrieval: MAP@R, Recall@k, or yours, over the whole embedding set.

Without options, a small timm ResNet on the characters of Omniglot (needs the extra `retrieval`):

    python examples/image_retrieval.py

The data are looked for in `../shared/data` beside the project, or in the folder that METRICOPT_DATA names. On your
data, model, loss and metric, for instance

    python examples/image_retrieval.py \\
        --dataset_name path/to/images --label_column_name product --model_name_or_path resnet50.a1_in1k \\
        --embedding_size 256 --loss ContrastiveLoss --metric recall_at_k --observation_size 2000

The embedding is what the model's last layer gives: a classifier's head with `--embedding_size` outputs instead of
classes. It is first trained by a loss of pytorch-metric-learning for `--first_steps`, once per seed, on batches with
several images of a class; from there each method goes on by itself. Beside the loss alone stands a specialist, a loss
made for this metric (`--specialist`).

Four disjoint splits, and no class is in two of them: the loss sees train, the metric is observed on `observation`, what
a metric phase ends with is chosen on `selection`, and methods are compared on `report`. Where classes belong to groups
(`--group_column_name`: the alphabets here), no group is in two of them either.

Left in `output_dir`: the model tuned by MetricOpt with the first seed (an ordinary one of transformers, whose logits
are the embedding), its value function in `value_function/`, `results.json` and `metric.png`. `--help` lists all
options; a JSON file of options may be given instead of them.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import set_seed

from comparison.images import image_column, load_model, new_model, processing_class, with_pixels
from comparison.methods import LOSS_ONLY, METHODS, Method
from comparison.report import MethodRun, require
from comparison.splits import Splits, class_names, default_dataset, find_column, load_dataset, sample
from comparison.study import ModelArguments, Start, parse, run_script, run_study, start
from metricopt_hf import ConfigurationError, MetricOptConfig

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

DEFAULTS = {
    "output_dir": "out/image_retrieval",
    "metric_name_or_path": "map_at_r",
    "first_steps": 210,
    "max_steps": 90,
    "observation_size": 600,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,  # times images_per_class
    "per_device_eval_batch_size": 100,
    "remove_unused_columns": False,  # the transform needs the image column
    "methods": ["loss_only", "specialist", "shuffled", "metricopt"],
}
OMNIGLOT_DEFAULTS = {**DEFAULTS, "label_column_name": "character", "group_column_name": "alphabet"}


@dataclass
class RetrievalArguments:
    """What is in the data, and how the embedding is trained."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set: a name on the Hub or a local folder. Default: Omniglot, small."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    split: str = field(default="all", metadata={"help": 'What is cut into four parts, such as "train+test".'})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many random images."})
    max_report_samples: int | None = field(default=None, metadata={"help": "Report on so many random images."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: image, img, or the only image column."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the classes. Default: label, labels, or the only class column."}
    )
    group_column_name: str | None = field(
        default=None, metadata={"help": "Column of groups of classes that shall stay together. Default: each class."}
    )
    loss: str = field(default="MultiSimilarityLoss", metadata={"help": "A loss of pytorch-metric-learning."})
    specialist: str = field(
        default="FastAPLoss", metadata={"help": "The loss of the method `specialist`, made for the metric."}
    )
    embedding_size: int = field(default=64, metadata={"help": "Numbers per image."})
    images_per_class: int = field(default=4, metadata={"help": "Images of a class that stand in a batch together."})


def read(arguments: RetrievalArguments, token: str | None) -> datasets.Dataset:
    """The columns `image`, `label` and `group` of all the data."""
    where = (arguments.dataset_name, arguments.dataset_config_name)
    existing = datasets.get_dataset_split_names(*where, token=token)
    split = "+".join(existing) if arguments.split == "all" else arguments.split
    dataset = load_dataset(*where, split, token)
    image, usual = image_column(dataset, arguments.image_column_name), ("label", "labels")
    label = find_column(dataset, arguments.label_column_name, usual, "label_column_name", datasets.ClassLabel)
    group = find_column(dataset, arguments.group_column_name or label, (), "group_column_name")
    groups = dataset.with_format("numpy")[group][:]
    dataset = dataset.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    return dataset.add_column("group", groups)


def cut(dataset: datasets.Dataset, arguments: RetrievalArguments, size: int | None, seed: int) -> Splits:
    """Four splits of which no two share a group, each with a quarter of the groups."""
    groups = np.asarray(dataset.with_format("numpy")["group"][:])
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    if len(names) < 4:
        raise ConfigurationError(
            f"There are {len(names)} groups of classes; four splits without a common one need four. Without "
            "--group_column_name each class is a group."
        )
    parts = [dataset.select(np.flatnonzero(np.isin(groups, mine))) for mine in np.array_split(names, 4)]
    sizes = (arguments.max_train_samples, size, size, arguments.max_report_samples)
    return Splits(*(sample(part, size, [seed, i]) for i, (part, size) in enumerate(zip(parts, sizes, strict=True))))


class SameClass(torch.utils.data.Dataset):
    """Items of a few images of one class each, so that a batch of any items holds pairs. Each image is in several."""

    ROUNDS = 10  # ways in which each class is dealt out

    def __init__(self, dataset: datasets.Dataset, labels: np.ndarray, size: int, seed: int):
        generator = np.random.default_rng(seed)
        self.dataset, self.items = dataset, []
        for _ in range(self.ROUNDS):
            for label in np.unique(labels):
                mine = generator.permutation(np.flatnonzero(labels == label))
                self.items += [mine[i : i + size] for i in range(0, len(mine), size)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict:
        return self.dataset[self.items[i]]


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """One batch of images, from items of one image or of several."""
    pixels = [item["pixel_values"] for item in items]
    return {
        "pixel_values": torch.cat([p if p.ndim == 4 else p[None] for p in pixels]),
        "labels": torch.cat([torch.as_tensor(item["labels"]).reshape(-1) for item in items]),
    }


def pair_loss(name: str):
    """A loss of pytorch-metric-learning by name, as Trainer's `compute_loss_func`."""
    require("pytorch_metric_learning", "retrieval")
    from pytorch_metric_learning import losses

    if not hasattr(losses, name):
        known = [loss for loss in vars(losses) if loss.endswith("Loss")]
        raise ConfigurationError(f"pytorch-metric-learning has no loss {name!r}; it has {', '.join(known)}.")
    try:
        loss = getattr(losses, name)()
        loss(torch.eye(5), torch.tensor([0, 0, 0, 1, 1]))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{name} does not work here: {error} Take a loss of pairs that needs no arguments, and for which a batch "
            "may hold more images of one class than of another."
        ) from error
    return lambda outputs, labels, num_items_in_batch=None: loss(outputs.logits, labels)


def prepare(retrieval: RetrievalArguments, named: ModelArguments, args: MetricOptConfig) -> Start:
    """Load, check, and train the start model."""
    set_seed(args.seed)
    dataset = read(retrieval, named.token)
    splits = cut(dataset, retrieval, args.observation_size, args.seed)
    splits.check_classes(len(class_names(dataset)))
    if named.model_name_or_path is None:
        small = {"channels": (32, 64, 128, 256), "stem_width": 16}
        model, processor = new_model("resnet10t", 48, small, num_labels=retrieval.embedding_size)
    else:
        model, processor = load_model(named, num_labels=retrieval.embedding_size)
    labels = np.asarray(splits.train.with_format("numpy")["label"][:])
    splits = splits.map(lambda dataset: with_pixels(dataset, processor))
    train = SameClass(splits.train, labels, retrieval.images_per_class, args.seed)
    return start(
        model,
        args,
        replace(splits, train=train),
        named.first_steps,
        data_collator=collate,
        compute_loss_func=pair_loss(retrieval.loss),
        processing_class=processing_class(processor),
    )


def main(argv: list[str] | None = None) -> list[MethodRun]:
    retrieval, named, study, args = parse(
        argv,
        (RetrievalArguments, ModelArguments),
        {**METHODS, "specialist": Method("the loss of --specialist", {})},
        lambda given: DEFAULTS if "dataset_name" in given else OMNIGLOT_DEFAULTS,
        __doc__,
    )
    if retrieval.dataset_name is None:
        retrieval.dataset_name = default_dataset("omniglot_small", DATA)
    if retrieval.images_per_class < 2:
        raise ConfigurationError("--images_per_class must be at least 2: a loss of pairs needs two of a class.")
    specialist = {**LOSS_ONLY.changes, "compute_loss_func": pair_loss(retrieval.specialist)}
    return run_study(
        partial(prepare, retrieval, named),
        {**METHODS, "specialist": Method(f"specialist: {retrieval.specialist}", specialist)},
        study,
        args,
        [retrieval, named],
        {"tasks": "image-feature-extraction", "tags": ["image-feature-extraction", "metric-learning", "vision"]},
    )


if __name__ == "__main__":
    run_script(main)
