#!/usr/bin/env python
"""Fine-tune an image classifier for the metric that it is judged by, and compare with what else one could do.

Without options, a small ResNet that tells 0 to 4 from 5 to 9 among scikit-learn's digits as four scanners give them
(no Hub, no GPU, about a minute; this is `make demo`). Each scanner leaves a stripe at an edge of its own.
Nearly all low digits of the training split went to two scanners, nearly all high ones to the other two, so the stripe
tells the label. In the other splits each digit goes through all four, and the worst scanner's accuracy is what counts.
Or a small ViT on the ten digits under one camera, with a long tail of classes to train on, by the worst class's recall:

    python examples/image_classification.py
    python examples/image_classification.py --methods loss_only shuffled metricopt
    python examples/image_classification.py --metric worst_class_recall

On your data, model and metric, for instance

    python examples/image_classification.py \\
        --dataset_name uoft-cs/cifar10 --model_name_or_path nateraw/vit-base-patch16-224-cifar10 \\
        --metric worst_class_recall --max_train_samples 6000 --num_train_epochs 1 --output_dir out/cifar10

A model whose head does not fit gets a new one, which `--first_steps 500` trains by the loss before the methods part.

The model is one of transformers or of timm, by its name on the Hub or in timm, or a folder. The metric is an `evaluate`
module, by name or path; misclassification, worst_class_recall, macro_auprc and g_mean come along, and, with the column
that holds the groups, which the metric alone is told (`--group_column_name camera`), worst_group_accuracy.

From the same start and with the same seed, data and steps, a model is tuned by its loss alone, by a control (a guide
that learns from shuffled scores; of the digits where it is named, as above), and by MetricOpt, whose last
`--metric_steps` follow the metric; the cheap rival, a bias per class searched on the observation split, is measured
too. Four disjoint splits: the loss sees train, the metric is observed on `observation`, what a metric phase ends with
is chosen on `selection`, and methods are compared on `report`, which nothing else touches.

Left in `output_dir`: the model tuned by MetricOpt with the first seed (an ordinary one, to be loaded without
metricopt_hf), its value function in `value_function/`, `results.json`, `metric.png` and, of groups, `groups.png`.
`--help` lists all options; a JSON file of options may be given instead of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from scipy.ndimage import uniform_filter, zoom
from sklearn.datasets import load_digits
from transformers import Trainer, set_seed

from comparison.images import image_column, load_model, new_model, processing_class, with_pixels
from comparison.methods import METHODS
from comparison.report import MethodRun
from comparison.splits import (
    GROUP_METRICS,
    DataArguments,
    Splits,
    class_names,
    find_column,
    group_axis,
    load_splits,
    with_group,
)
from comparison.study import FIRST_STEPS, ModelArguments, Start, parse, run_script, run_study, start
from metricopt_hf import ConfigurationError, MetricOptConfig

SMALL = (
    "It shows how the library is used and what that costs, and nothing about other models and data. No setting was "
    "tuned on this table."
)
DEMO_NOTES = {
    True: "This is a small model on 333 digits per split, each through four scanners; groups.png shows each. The task "
    f"was made as one that a threshold cannot solve. {SMALL}",
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
    "metric_call_budget": 2000,
    "methods": ["loss_only", "metricopt"],  # without a control, which would take as long again
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
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


# The digits


# Where each scanner leaves its bright stripe, four pixels wide.
SCANNERS = {
    "stripe at the top": (slice(0, 4), slice(None)),
    "at the left": (slice(None), slice(0, 4)),
    "at the bottom": (slice(-4, None), slice(None)),
    "at the right": (slice(None), slice(-4, None)),
}
AGREEMENT = 0.95  # share of the training digits that went to a scanner of their label's: of 0 to 4, the first two
READING_RATE = 3e-3  # learning rate of the pretraining on the ten clean digits
READING_STEPS = 150
FIRST = {True: 40, False: 400}  # steps before the methods part: with scanners, behind the reading; of the long tail
STEPS = {True: 20, False: 200}  # the methods' own
# Of a timm model, what makes it a small one.
VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}


def drawn(seed: int, cuts: list[int]) -> tuple[np.random.Generator, np.ndarray, np.ndarray, list[np.ndarray]]:
    """A generator, pixels [1797, 8, 8] in [0, 1], digits, and disjoint random rows."""
    generator = np.random.default_rng(seed)
    pixels, digits = load_digits(return_X_y=True)
    return generator, pixels.reshape(-1, 8, 8) / 16, digits, np.split(generator.permutation(1797), cuts)


def as_dataset(
    pixels: np.ndarray, labels: np.ndarray, names: Sequence[str] = "0123456789", group: np.ndarray | None = None
) -> datasets.Dataset:
    """Images of pixels [n, h, w] in [0, 1]."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    columns = {"image": list((pixels.clip(0, 1) * 255).astype(np.uint8)), "label": labels}
    if group is not None:
        columns["group"], features["group"] = group, datasets.ClassLabel(names=list(SCANNERS))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def through(pixels: np.ndarray, scanner: np.ndarray) -> np.ndarray:
    """Of digits [n, h, w], each through one scanner: with its stripe."""
    seen = pixels.copy()
    for i, (rows, columns) in enumerate(SCANNERS.values()):
        seen[scanner == i, rows, columns] = 1
    return seen


def scanned(seed: int) -> tuple[Splits, datasets.Dataset, datasets.Dataset]:
    """Four splits, images with stripes for pretraining, and clean ones of the ten digits for the reading before that.

    Loss and metric disagree: in training the stripe tells the label, and the metric asks for the worst of all scanners,
    through each of which goes every digit of the other splits.

    The images with stripes for pretraining are of other digits than the train split; the clean ones are of both.
    """
    generator, pixels, digits, (first, train, *measured) = drawn(seed, [398, 797, 1130, 1463])
    pixels = np.pad(zoom(pixels, (1, 2, 2), order=1), ((0, 0), (4, 4), (4, 4)))  # 24 x 24
    labels, names, count = (digits >= 5).astype(int), ("0 to 4", "5 to 9"), len(SCANNERS)

    def uneven(rows: np.ndarray) -> datasets.Dataset:
        side = labels[rows].copy()
        for label in (0, 1):  # the share is exact in each label
            mine = generator.permutation(np.flatnonzero(labels[rows] == label))
            side[mine[: round((1 - AGREEMENT) * len(mine))]] = 1 - label
        return as_dataset(through(pixels[rows], 2 * side + generator.integers(2, size=len(rows))), labels[rows], names)

    def even(rows: np.ndarray) -> datasets.Dataset:
        scanner, rows = np.repeat(np.arange(count), len(rows)), np.tile(rows, count)
        return as_dataset(through(pixels[rows], scanner), labels[rows], names, scanner)

    read = np.concatenate([first, train])
    return Splits(uneven(train), *map(even, measured)), uneven(first), as_dataset(pixels[read], digits[read])


def long_tailed(seed: int) -> tuple[Splits, datasets.Dataset]:
    """Four splits, and the images for pretraining.

    Loss and metric disagree: what is tuned on is long-tailed, while the metric asks for the worst of all classes.

    The start model is trained on clean images of the train split, all ten classes alike. Then the camera changes
    (blur, a quarter less contrast, noise), for all splits; and of the train images only a long tail is left: the
    classes in random order, the first with all of its images, the last with a tenth.
    """
    generator, clean, labels, rows = drawn(seed, [597, 997, 1397])
    seen = 0.75 * clean + 0.25 * uniform_filter(clean, (0, 3, 3))
    seen = 0.125 + 0.75 * seen + generator.normal(0, 0.1, clean.shape)
    tail = []
    for rank, label in enumerate(generator.permutation(10)):
        mine = rows[0][labels[rows[0]] == label]
        tail.append(mine[: round(len(mine) * 0.1 ** (rank / 9))])
    splits = (as_dataset(seen[part], labels[part]) for part in [np.concatenate(tail), *rows[1:]])
    return Splits(*splits), as_dataset(clean[rows[0]], labels[rows[0]])


def in_memory(dataset: datasets.Dataset, processor: Any) -> list[dict[str, Any]]:
    """The rows of `with_pixels`, made once: so few and so small images need not be decoded at each use."""
    columns = with_pixels(dataset, processor)[:]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def taught(dataset: datasets.Dataset, steps: int, args: MetricOptConfig) -> dict[str, torch.Tensor]:
    """All weights but the last layer's of a small ResNet that learned to read the ten digits."""
    model, processor = new_model("resnet18", 24, RESNET, num_labels=10)
    args = replace(args, max_steps=steps, learning_rate=READING_RATE, **FIRST_STEPS)
    Trainer(model, args, train_dataset=in_memory(dataset, processor)).train()
    return {name: weights for name, weights in model.to("cpu").state_dict().items() if ".fc." not in name}


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
    first_dataset = None
    on_digits, by_group = data.dataset_name is None, images.group_column_name is not None
    if on_digits and by_group:
        splits, first_dataset, clean = scanned(args.seed)
    elif on_digits:
        splits, first_dataset = long_tailed(args.seed)
    else:
        splits = load_splits(data, partial(read, columns=images), args.seed, args.observation_size, named.token)
    names = class_names(splits.train)
    splits.check_classes(len(names))
    splits = splits.with_groups(images.group_column_name)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if on_digits and by_group:
        learned = taught(clean, READING_STEPS, args)
        model, processor = new_model("resnet18", 24, RESNET, **labels)
        model.load_state_dict(learned, strict=False)
    elif on_digits:
        model, processor = new_model("vit_tiny_patch16_224", 8, VIT, **labels)
    else:
        model, processor = load_model(named, **(labels if named.first_steps > 0 else {}))
    ready = in_memory if on_digits else with_pixels
    if first_dataset is not None:
        first_dataset = ready(first_dataset, processor)
    if model.config.num_labels != len(names):
        raise ConfigurationError(
            f"{named.model_name_or_path} tells {model.config.num_labels} classes apart, the data set has {len(names)}. "
            "To train a new head first, say how many steps that may take: --first_steps 500."
        )
    made = start(
        model,
        args,
        splits.map(partial(ready, processor=processor)),
        named.first_steps,
        first_dataset,
        class_bias=True,
        processing_class=processing_class(processor),
    )
    if images.group_column_name is not None:
        made.group_names = class_names(splits.report, "group")
        by = "scanner" if on_digits else images.group_column_name
        made.group_axis = group_axis(args.metric_name_or_path, by)
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
            "--dataset_name and --model_name_or_path go together; without both, a small model is made for the digits."
        )
    if on_digits:
        by_group = args.metric_name_or_path in GROUP_METRICS
        if by_group:
            images.group_column_name = "group"
        named.first_steps = named.first_steps or FIRST[by_group]
        if args.max_steps < 0:
            args = replace(args, max_steps=STEPS[by_group])
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
