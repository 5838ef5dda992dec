"""Images, for the scripts that have them: their column, their pixels, and a model by name, folder or timm."""

from __future__ import annotations

import os
from typing import Any

import datasets
import timm
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, TimmWrapperConfig
from transformers import TimmWrapperImageProcessor as TimmProcessor

from metricopt_hf import ConfigurationError

from .splits import find_column
from .study import ModelArguments


def image_column(dataset: datasets.Dataset, given: str | None = None) -> str:
    """The column of the images: the one `given`, else image, img, or the only image column.

    Raises:
        ConfigurationError: there is none, or it holds something else.
    """
    name = find_column(dataset, given, ("image", "img"), "image_column_name", datasets.Image)
    if not isinstance(dataset.features[name], datasets.Image):
        raise ConfigurationError(
            f"The column {name!r} holds {dataset.features[name]}, not images: name another with --image_column_name."
        )
    return name


def with_pixels(dataset: datasets.Dataset, processor: Any) -> datasets.Dataset:
    """The columns `image` and `label` as `pixel_values` and `labels`, made when they are asked for; `group` stays."""

    def transform(batch):
        images = [image.convert("RGB") for image in batch["image"]]
        group = {"group": batch["group"]} if "group" in batch else {}
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": batch["label"], **group}

    return dataset.with_transform(transform)


def load_model(named: ModelArguments, **changes: Any) -> tuple[nn.Module, Any]:
    """A model and its image processor, by a Hub name, a folder, or a name of timm.

    Args:
        changes: to its config, such as `num_labels`; where they change the head, it is a new one.
    """
    name = named.model_name_or_path
    if not os.path.isdir(name) and timm.is_model(name):
        cfg = timm.get_pretrained_cfg(name)
        name = f"timm/{cfg.architecture}" + (f".{cfg.tag}" if cfg.tag else "")
    if changes:
        changes["ignore_mismatched_sizes"] = True
    model = AutoModelForImageClassification.from_pretrained(name, **named.loading, **changes)
    return model, AutoImageProcessor.from_pretrained(name, **named.loading)


def new_model(architecture: str, size: int, changes: dict[str, Any], **config: Any) -> tuple[nn.Module, Any]:
    """A model of timm with random weights, for square images, and its image processor.

    Args:
        changes: to the architecture, as `timm.create_model` takes them.
        config: of `TimmWrapperConfig`, such as `num_labels`.
    """
    cfg = {"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    config = TimmWrapperConfig(architecture=architecture, model_args=changes, pretrained_cfg=cfg, **config)
    return AutoModelForImageClassification.from_config(config), TimmProcessor(config.pretrained_cfg)


def processing_class(processor: Any) -> Any:
    """The processor that the trainer saves with the model; timm's stands in the model's config already."""
    return None if isinstance(processor, TimmProcessor) else processor
