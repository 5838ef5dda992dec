#!/usr/bin/env python
"""Fine-tune an image classifier for the metric that it is judged by, and compare with what else one could do.

Without options, a small ViT on scikit-learn's digits as four scanners see them (no Hub, no GPU, a few minutes on two
cores; this is `make demo`). The training digits were seen by one of them, and the model is judged by the worst
scanner's accuracy; or, the same digits under one camera, with a long tail of classes to train on, by the worst
class's recall:

    python examples/image_classification.py
    python examples/image_classification.py --metric worst_class_recall

On your data, model and metric, for instance

    python examples/image_classification.py \\
        --dataset_name uoft-cs/cifar10 --model_name_or_path nateraw/vit-base-patch16-224-cifar10 \\
        --metric worst_class_recall --max_train_samples 6000 --num_train_epochs 1 --output_dir out/cifar10

The model is one of transformers or of timm, by its name on the Hub or in timm, or a folder. The metric is an `evaluate`
module, by name or path; misclassification, worst_class_recall, macro_auprc and g_mean come along, and, with the column
that holds the groups, which the metric alone is told (`--group_column_name camera`), worst_group_accuracy.

From the same start and with the same seed, data, steps and parameters, a model is tuned by its loss alone, by a control
(a value function fitted to shuffled scores), and by MetricOpt; the cheap rival, a bias per class searched on the
observation split, is measured too. Four disjoint splits: the loss sees train, the metric is observed on `observation`,
each method's best step is chosen on `selection`, and methods are compared on `report`, which nothing else touches.

Left in `output_dir`: the model tuned by MetricOpt with the first seed (an ordinary one, to be loaded without
metricopt_hf), its value function in `value_function/`, `results.json`, `metric.png`, `diagnosis.png` (what can be told
before any training) and, of groups, `groups.png`. `--help` lists all options; a JSON file of options may be given
instead of them.
"""

from dataclasses import dataclass, field
from functools import partial

import datasets
import numpy as np
import torch
from scipy.ndimage import gaussian_filter, uniform_filter
from sklearn.datasets import load_digits
from transformers import set_seed

from metricopt_hf import ConfigurationError, MetricOptConfig
from metricopt_hf.comparison.images import image_column, load_model, new_model, processing_class, with_pixels
from metricopt_hf.comparison.methods import METHODS
from metricopt_hf.comparison.report import MethodRun
from metricopt_hf.comparison.splits import (
    GROUP_METRICS,
    DataArguments,
    Splits,
    class_names,
    find_column,
    load_splits,
    with_group,
)
from metricopt_hf.comparison.study import ModelArguments, Start, parse, run_script, run_study, start

SMALL = (
    "It shows how the library is used and what that costs, and nothing about other models and data. No setting was "
    "tuned on this table."
)
DEMO_NOTES = {
    True: f"This is a small model on 400 digits per split, each seen by four scanners; groups.png shows each. {SMALL}",
    False: f"This is a small model on 400 images per split, some 40 of the worst class. {SMALL}",
}

DEFAULTS = {
    "output_dir": "out/image_classification",
    "metric_name_or_path": "worst_class_recall",
    "remove_unused_columns": False,  # the transform needs the image column
    "per_device_eval_batch_size": 128,
}
DIGITS_DEFAULTS = {
    **DEFAULTS,
    "metric_name_or_path": "worst_group_accuracy",
    "max_steps": 200,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,  # of the pretraining; phi has its own
}


@dataclass
class ImageArguments:
    """What is in the images, and the default task."""

    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: image, img, or the only image column."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels. Default: label, labels, or the only class column."}
    )
    group_column_name: str | None = field(
        default=None,
        metadata={"help": "Column of whole numbers that the metric alone is told, for worst_group_accuracy and such."},
    )
    pretraining_steps: int = field(
        default=400, metadata={"help": "Steps for which the digits' model is pretrained in this script."}
    )


# The digits


# What each scanner makes of pixels [n, 8, 8] in [0, 1]; the generator is for its noise.
SCANNERS = {
    "as it is": lambda pixels, generator: pixels,
    "blurred": lambda pixels, generator: gaussian_filter(pixels, (0, 0.7, 0.7)),
    "low contrast": lambda pixels, generator: 0.25 + 0.5 * pixels,
    "noisy": lambda pixels, generator: pixels + generator.normal(0, 0.2, pixels.shape),
}


def drawn(seed: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray, list[np.ndarray]]:
    """A generator, pixels [1797, 8, 8] in [0, 1], labels, and disjoint random rows for the four splits."""
    generator = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    return generator, pixels.reshape(-1, 8, 8) / 16, labels, np.split(generator.permutation(1797), [597, 997, 1397])


def as_dataset(pixels: np.ndarray, labels: np.ndarray, group: np.ndarray | None = None) -> datasets.Dataset:
    """Images of pixels [n, 8, 8] in [0, 1]."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    columns = {"image": list((pixels.clip(0, 1) * 255).astype(np.uint8)), "label": labels}
    if group is not None:
        columns["group"], features["group"] = group, datasets.ClassLabel(names=list(SCANNERS))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def scanned(seed: int) -> tuple[Splits, datasets.Dataset]:
    """Four splits, and the images for pretraining, which are those of train.

    Loss and metric disagree: training images are what the first scanner saw, and the metric asks for the worst of all
    four. Each digit of the other splits was seen by all of them.
    """
    generator, clean, labels, (train, *measured) = drawn(seed)
    seen = [scanner(clean, generator) for scanner in SCANNERS.values()]
    splits = [
        as_dataset(
            np.concatenate([pixels[rows] for pixels in seen]),
            np.tile(labels[rows], len(seen)),
            np.repeat(np.arange(len(seen)), len(rows)),
        )
        for rows in measured
    ]
    first = as_dataset(clean[train], labels[train])
    return Splits(first, *splits), first


def long_tailed(seed: int) -> tuple[Splits, datasets.Dataset]:
    """Four splits, and the images for pretraining.

    Loss and metric disagree: what is tuned on is long-tailed, while the metric asks for the worst of all classes.

    The start model is trained on clean images of the train split, all ten classes alike. Then the camera changes
    (blur, a quarter less contrast, noise), for all splits; and of the train images only a long tail is left: the
    classes in random order, the first with all of its images, the last with a tenth.
    """
    generator, clean, labels, rows = drawn(seed)
    seen = 0.75 * clean + 0.25 * uniform_filter(clean, (0, 3, 3))
    seen = 0.125 + 0.75 * seen + generator.normal(0, 0.1, clean.shape)
    tail = []
    for rank, label in enumerate(generator.permutation(10)):
        mine = rows[0][labels[rows[0]] == label]
        tail.append(mine[: round(len(mine) * 0.1 ** (rank / 9))])
    splits = (as_dataset(seen[part], labels[part]) for part in [np.concatenate(tail), *rows[1:]])
    return Splits(*splits), as_dataset(clean[rows[0]], labels[rows[0]])


# Any data set, any model


def read(dataset: datasets.Dataset, columns: ImageArguments) -> datasets.Dataset:
    """The columns that are needed, as `image`, `label` and perhaps `group`."""
    image, usual = image_column(dataset, columns.image_column_name), ("label", "labels")
    label = find_column(dataset, columns.label_column_name, usual, "label_column_name", datasets.ClassLabel)
    names = {image: "image", label: "label"}
    if columns.group_column_name is not None:
        names[find_column(dataset, columns.group_column_name, (), "group_column_name")] = "group"
    return dataset.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})


def prepare(data: DataArguments, named: ModelArguments, images: ImageArguments, args: MetricOptConfig) -> Start:
    """Load, check, and train the start model where that is asked for."""
    set_seed(args.seed)
    first_steps = first_dataset = None
    if data.dataset_name is None:
        splits, first_dataset = (scanned if images.group_column_name else long_tailed)(args.seed)
        first_steps = images.pretraining_steps
    else:
        splits = load_splits(data, partial(read, columns=images), args.seed, args.observation_size, named.token)
    names = class_names(splits.train)
    splits.check_classes(len(names))
    splits = splits.with_groups(images.group_column_name)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if data.dataset_name is None:
        small = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
        model, processor = new_model("vit_tiny_patch16_224", 8, small, **labels)
        first_dataset = with_pixels(first_dataset, processor)
    else:
        model, processor = load_model(named, **(labels if args.metric_start_ratio > 0 else {}))
    if model.config.num_labels != len(names):
        raise ConfigurationError(
            f"{named.model_name_or_path} tells {model.config.num_labels} classes apart, the data set has {len(names)}. "
            "To train a new head first, give the share of the steps for that: --metric_start_ratio 0.75."
        )
    made = start(
        model,
        args,
        splits.map(partial(with_pixels, processor=processor)),
        first_steps,
        first_dataset,
        class_bias=True,
        processing_class=processing_class(processor),
    )
    if images.group_column_name is not None:
        made.group_names = class_names(splits.report, "group")
    return made


def main(argv: list[str] | None = None) -> list[MethodRun]:
    data, named, images, study, args = parse(
        argv,
        (DataArguments, ModelArguments, ImageArguments),
        METHODS,
        lambda given: DEFAULTS if "dataset_name" in given else DIGITS_DEFAULTS,
        __doc__,
    )
    on_digits = data.dataset_name is None
    if on_digits != (named.model_name_or_path is None):
        raise ConfigurationError(
            "--dataset_name and --model_name_or_path go together; without both, a small ViT is made for the digits."
        )
    if on_digits and args.metric_start_ratio > 0:
        raise ConfigurationError("On the digits, --pretraining_steps says how long the start model is trained.")
    if on_digits:
        if args.metric_name_or_path in GROUP_METRICS:
            images.group_column_name = "group"
        torch.set_num_threads(1)  # so small a model is slower on several, and far slower beside other work
    args = with_group(args, images.group_column_name)
    return run_study(
        partial(prepare, data, named, images),
        METHODS,
        study,
        args,
        [data, named, images],
        {"tasks": "image-classification", "tags": ["image-classification", "vision"]},
        DEMO_NOTES[images.group_column_name is not None] if on_digits else None,
    )


if __name__ == "__main__":
    run_script(main)
