"""Boxes, for object detection: checked, with their pixels, and in batches of images of any size.

A data set has the columns `image` and `objects`, with lists `bbox` (x, y, width, height in pixels) and `category`.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch

from metricopt_hf import ConfigurationError

from .splits import Splits


def flat_objects(dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All objects of a data set: example [n], category [n], and box [n, 4] in x, y, width, height."""
    objects = dataset.select_columns(["objects"]).with_format("arrow")[:]["objects"].combine_chunks()
    categories = objects.field("category")
    counts = pyarrow.compute.list_value_length(categories).fill_null(0).to_numpy()
    boxes = objects.field("bbox").flatten().flatten().to_numpy(zero_copy_only=False)
    labels = categories.flatten().to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(counts)), counts), labels, boxes.reshape(-1, 4)


def class_names(dataset: datasets.Dataset) -> list[str]:
    """The names of the classes; where the data set has none, the numbers up to the greatest category."""
    category = getattr(dataset.features["objects"]["category"], "feature", None)
    if isinstance(category, datasets.ClassLabel):
        return category.names
    return [str(i) for i in range(int(flat_objects(dataset)[1].max(initial=0)) + 1)]


def check_objects(splits: Splits, num_labels: int) -> None:
    """Refuse categories that are no class, and boxes without an area.

    Raises:
        ConfigurationError: names the first wrong example.
    """
    for name, dataset in splits.items():
        examples, labels, boxes = flat_objects(dataset)
        if (wrong := np.flatnonzero((labels < 0) | (labels >= num_labels))).size:
            raise ConfigurationError(
                f"Example {examples[wrong[0]]} of the {name} split has an object of category {labels[wrong[0]]}, but "
                f"there are {num_labels} classes, 0 to {num_labels - 1}."
            )
        if (wrong := np.flatnonzero(~(boxes[:, 2:] > 0).all(1))).size:
            raise ConfigurationError(
                f"Example {examples[wrong[0]]} of the {name} split has the box {boxes[wrong[0]].tolist()}, whose width "
                "or height is not positive: boxes are x, y, width, height. Leave such objects out with `dataset.map`."
            )


def with_pixels(dataset: datasets.Dataset, processor: Any, flips: bool = False) -> datasets.Dataset:
    """Images and boxes as the model takes them; with `flips`, each image at random mirrored along both axes."""

    def encode(image, objects) -> dict:
        annotations = [
            {"bbox": box, "category_id": category, "area": box[2] * box[3], "iscrowd": 0}
            for box, category in zip(objects["bbox"], objects["category"], strict=True)
        ]
        coco = {"image_id": 0, "annotations": annotations}
        encoded = processor(image.convert("RGB"), annotations=coco, do_pad=False, return_tensors="pt")
        pixels, labels = encoded["pixel_values"][0], encoded["labels"][0]
        labels = {name: labels[name] for name in ("class_labels", "boxes", "orig_size")}
        for axis in (0, 1) if flips else ():  # boxes: centre x, centre y, width, height, in shares of the image
            if torch.rand(()) < 0.5:
                pixels = pixels.flip(2 - axis)
                labels["boxes"][:, axis] = 1 - labels["boxes"][:, axis]
        return {"pixel_values": pixels, "labels": labels}

    def transform(batch) -> dict:
        rows = [encode(*row) for row in zip(batch["image"], batch["objects"], strict=True)]
        return {name: [row[name] for row in rows] for name in ("pixel_values", "labels")}

    return dataset.with_transform(transform)


def collate(rows: list[dict], masked: bool) -> dict:
    """A batch: labels stay a list; images of different size are padded, with a mask where the model takes one."""
    images = [row["pixel_values"] for row in rows]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.zeros(len(images), images[0].shape[0], height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = 1
    batch = {"pixel_values": pixels, "labels": [row["labels"] for row in rows]}
    return {**batch, "pixel_mask": mask} if masked else batch
