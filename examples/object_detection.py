#!/usr/bin/env python
"""Fine-tune an object detector for the metric that it is judged by: COCO's mean average precision, or one of its kin.

On blood cells (BCCD), with a small RT-DETR that is first trained from scratch, once, and saved as an ordinary model:

    python examples/object_detection.py --pretrain_only
    python examples/object_detection.py

The data are looked for in `../shared/data` beside the project, or in the folder that METRICOPT_DATA names. Without the
first line, the second pretrains too. Needs the extra `detection` (torchmetrics, faster-coco-eval).

On your data, with a model of the Hub whose new head is first trained by the loss, for instance

    python examples/object_detection.py \\
        --dataset_name rishitdagli/cppe-5 --model_name_or_path PekingU/rtdetr_r18vd \\
        --first_steps 1600 --max_steps 400 --metric_for_best_model map_50 --output_dir out/cppe-5

The data set holds an image column and a column `objects` with `bbox` (x, y, width, height in pixels) and `category`.
Any detector of transformers fits (RT-DETR, D-FINE, YOLOS, DETR, ...), with its own image processor. The black box is
all of its post-processing and then COCO's evaluation; `--metric_for_best_model` picks one of its numbers.

Four disjoint splits: the loss sees train, the metric is observed on `observation`, what a metric phase ends with is
chosen on `selection`, and methods are compared on `report`. A bias per class, the cheap rival elsewhere, is none here:
average precision ranks the boxes of each class by themselves, so such a bias hardly changes it.

Left in `output_dir`: the model tuned by MetricOpt with the first seed (an ordinary one, to be loaded without
metricopt_hf), its value function in `value_function/`, `results.json` and `metric.png`. `--help` lists all options; a
JSON file of options may be given instead of them.
"""

import inspect
import logging
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from torchvision.ops import box_convert
from transformers import (
    CONFIG_NAME,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    EvalPrediction,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from comparison.boxes import check_objects, class_names, collate, with_pixels
from comparison.images import image_column
from comparison.methods import METHODS
from comparison.report import MethodRun, require
from comparison.splits import DataArguments, default_dataset, find_column, load_splits
from comparison.study import ModelArguments, Start, parse, run_script, run_study, start
from metricopt_hf import ConfigurationError, MetricOptConfig

logger = logging.getLogger(__name__)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# COCO's numbers, as torchmetrics calls them
COCO_METRICS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")
COCO_METRICS += ("mar_small", "mar_medium", "mar_large")

DEFAULTS = {
    "output_dir": "out/object_detection",
    "metric_for_best_model": "map",
    "max_steps": 48,
    "phi_dim": 8,  # each takes a pass over the observation split in each metric step
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "remove_unused_columns": False,  # the transform needs the image column
    "eval_do_concat_batches": False,  # labels are a dict per image, and images differ in size
}
# Observation, selection and report are cut from both, for each seed anew, so that intervals tell of the images too.
BCCD_DEFAULTS = {**DEFAULTS, "eval_split": "validation+test"}
SMALL_SIZE = {"height": 256, "width": 320}

NOTE = (
    "Some fifty images each to observe, to select and to report on tell little: read the intervals. All seeds start "
    "from one pretrained model; they differ in which images these are, and in the order of training."
)


@dataclass
class DetectionArguments:
    """What is in the images, and the small model of the default."""

    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: image, img, or the only image column."}
    )
    objects_column_name: str = field(
        default="objects", metadata={"help": "Column of the objects, with lists `bbox` and `category`."}
    )
    pretrain_only: bool = field(
        default=False,
        metadata={"help": 'Train the small RT-DETR from scratch, save it in output_dir + "_pretrained", and end.'},
    )
    pretraining_steps: int = field(
        default=1000, metadata={"help": "Steps for which the small RT-DETR is trained, of 8 images each."}
    )


# Data


def read(dataset: datasets.Dataset, columns: DetectionArguments) -> datasets.Dataset:
    """The two columns that are needed, as `image` and `objects`."""
    image = image_column(dataset, columns.image_column_name)
    objects = find_column(dataset, columns.objects_column_name, (), "objects_column_name")
    dataset = dataset.select_columns([image, objects])
    fields = dataset.features[objects]
    if not isinstance(fields, dict) or not {"bbox", "category"} <= set(fields):
        raise ConfigurationError(
            f"The column {objects!r} holds {fields}, not lists `bbox` (x, y, width, height) and `category`: name "
            "another with --objects_column_name, or bring it into this form with `dataset.map`."
        )
    return dataset.rename_columns({old: new for old, new in ((image, "image"), (objects, "objects")) if old != new})


# The black box


def logits_and_boxes(outputs: tuple, labels: list) -> tuple:
    """Of all that a detector returns (parts of the loss, logits, boxes, hidden states, ...), what the metric needs."""
    return outputs[1:3]


def coco_metrics(prediction: EvalPrediction, processor) -> dict[str, float]:
    """`COCO_METRICS` of a whole set, in pixels of the images as they came; nan where there is no such object.

    Args:
        prediction: lists of batches, of (logits, boxes) and of one dict per image.
        processor: whose post-processing turns these into detections.
    """
    from torchmetrics.detection import MeanAveragePrecision  # here, so that --help works without the extra

    coco = MeanAveragePrecision(backend="faster_coco_eval")  # the same numbers as pycocotools', sooner
    coco.warn_on_many_detections = False  # COCO counts the first hundred
    for (logits, boxes), labels in zip(prediction.predictions, prediction.label_ids, strict=True):
        outputs = SimpleNamespace(logits=torch.as_tensor(logits), pred_boxes=torch.as_tensor(boxes))
        sizes = torch.stack([torch.as_tensor(label["orig_size"]) for label in labels])
        detections = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        scale = sizes.flip(1).repeat(1, 2)  # width, height, width, height
        targets = [
            {
                "boxes": box_convert(torch.as_tensor(label["boxes"]), "cxcywh", "xyxy") * scale[i],
                "labels": torch.as_tensor(label["class_labels"]),
            }
            for i, label in enumerate(labels)
        ]
        coco.update(detections, targets)
    numbers = coco.compute()
    return {name: float(numbers[name]) if numbers[name] >= 0 else float("nan") for name in COCO_METRICS}


# The model


def small_rtdetr(names: list[str]) -> RTDetrForObjectDetection:
    """A new RT-DETR of 1.2 million parameters."""
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,  # there is nothing in them yet
        encoder_in_channels=[32, 64, 128],
        encoder_hidden_dim=64,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=64,
        decoder_in_channels=[64, 64, 64],
        decoder_ffn_dim=128,
        decoder_attention_heads=4,
        decoder_layers=3,
        num_queries=60,
        num_denoising=60,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return RTDetrForObjectDetection(config)


def pretrain(
    folder: str, data: DataArguments, named: ModelArguments, detection: DetectionArguments, args: MetricOptConfig
) -> None:
    """Train the small RT-DETR from scratch on the train split, and save it with its score on the observation split.

    Raises:
        ConfigurationError: train is another one for each seed.
    """
    if data.train_split == data.eval_split:
        raise ConfigurationError(
            f"The small RT-DETR is trained once, for all seeds, but each seed would cut its own splits from "
            f"{data.train_split!r}: give an --eval_split of its own, or a --model_name_or_path."
        )
    set_seed(args.seed)
    splits, names = load(data, named, detection, args)
    processor = RTDetrImageProcessor(size=SMALL_SIZE)
    trainer = Trainer(
        small_rtdetr(names),
        TrainingArguments(
            folder,
            max_steps=detection.pretraining_steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=args.per_device_eval_batch_size,
            learning_rate=1e-3,
            warmup_steps=min(100, detection.pretraining_steps // 10),
            lr_scheduler_type="cosine",
            weight_decay=1e-4,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            eval_do_concat_batches=False,
            dataloader_pin_memory=False,
            seed=args.seed,
            use_cpu=args.use_cpu,
            disable_tqdm=args.disable_tqdm,
        ),
        train_dataset=with_pixels(splits.train, processor, flips=True),
        eval_dataset=with_pixels(splits.observation, processor),
        data_collator=partial(collate, masked=False),
        processing_class=processor,
        compute_metrics=partial(coco_metrics, processor=processor),
        preprocess_logits_for_metrics=logits_and_boxes,
    )
    logger.warning(f"Training a small RT-DETR from scratch, {detection.pretraining_steps} steps, into {folder}.")
    trained = trainer.train()
    trainer.save_model()
    for part, metrics in (("train", trained.metrics), ("eval", trainer.evaluate())):
        trainer.log_metrics(part, metrics)
        trainer.save_metrics(part, metrics)


def load_model(named: ModelArguments, names: list[str], trained_here: bool):
    """A detector for these classes and its image processor, by a Hub name or a folder."""
    name, new_head = named.model_name_or_path, {}
    if trained_here:
        new_head = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        new_head["ignore_mismatched_sizes"] = True
    model = AutoModelForObjectDetection.from_pretrained(name, **named.loading, **new_head)
    if model.config.num_labels != len(names):
        raise ConfigurationError(
            f"{name} detects {model.config.num_labels} classes, the data set has {len(names)}. To train a new head "
            "first, say how many steps that may take: --first_steps 500."
        )
    return model, AutoImageProcessor.from_pretrained(name, **named.loading)


def load(data: DataArguments, named: ModelArguments, detection: DetectionArguments, args: MetricOptConfig):
    """The four splits, checked, and the names of the classes."""
    splits = load_splits(data, partial(read, columns=detection), args.seed, args.observation_size, named.token)
    names = class_names(splits.train)
    check_objects(splits, len(names))
    return splits, names


def prepare(data: DataArguments, named: ModelArguments, detection: DetectionArguments, args: MetricOptConfig) -> Start:
    """Load, check, and train a new head where that is asked for."""
    set_seed(args.seed)
    splits, names = load(data, named, detection, args)
    model, processor = load_model(named, names, trained_here=named.first_steps > 0)
    return start(
        model,
        args,
        splits.map(partial(with_pixels, processor=processor)),
        named.first_steps,
        data_collator=partial(collate, masked="pixel_mask" in inspect.signature(model.forward).parameters),
        processing_class=processor,
        compute_metrics=partial(coco_metrics, processor=processor),
        preprocess_logits_for_metrics=logits_and_boxes,
    )


def main(argv: list[str] | None = None) -> list[MethodRun]:
    data, named, detection, study, args = parse(
        argv,
        (DataArguments, ModelArguments, DetectionArguments),
        METHODS,
        lambda given: DEFAULTS if "dataset_name" in given else BCCD_DEFAULTS,
        __doc__,
        dict.fromkeys(COCO_METRICS, True),
    )
    for module in ("torchmetrics", "faster_coco_eval"):
        require(module, "detection")
    metric = args.metric_name_or_path or args.metric_for_best_model
    if args.metric_name_or_path is not None or metric not in COCO_METRICS:
        raise ConfigurationError(
            f"The metric {metric!r} is none of COCO's: name one with --metric_for_best_model, "
            f"{', '.join(COCO_METRICS)}."
        )
    if args.eval_do_concat_batches:
        raise ConfigurationError("Boxes per image cannot be joined over batches: leave eval_do_concat_batches=False.")
    note = None
    if data.dataset_name is None:
        data.dataset_name, note = default_dataset("bccd", DATA), NOTE
    if named.model_name_or_path is None:
        folder = f"{args.output_dir}_pretrained"
        if detection.pretrain_only or not os.path.exists(os.path.join(folder, CONFIG_NAME)):
            pretrain(folder, data, named, detection, args)
        if detection.pretrain_only:
            return []
        named.model_name_or_path = folder
    elif detection.pretrain_only:
        raise ConfigurationError("--pretrain_only trains the small RT-DETR: leave --model_name_or_path out.")
    return run_study(
        partial(prepare, data, named, detection),
        METHODS,
        study,
        args,
        [data, named, detection],
        {"tasks": "object-detection", "tags": ["object-detection", "vision"]},
        note,
    )


if __name__ == "__main__":
    run_script(main)
