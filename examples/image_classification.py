#!/usr/bin/env python
"""Fine-tune an image classifier for the metric that it is judged by, and compare with what else one could do.

Without options, on scikit-learn's digits (no Hub, no GPU, a few minutes on two cores; this is `make demo`):

    python examples/image_classification.py

On your data, model and metric, for instance

    python examples/image_classification.py \\
        --dataset_name uoft-cs/cifar10 --model_name_or_path nateraw/vit-base-patch16-224-cifar10 \\
        --metric worst_class_recall --max_train_samples 6000 --num_train_epochs 1 --output_dir out/cifar10

From the same start and with the same seed, data, steps and parameters, a model is tuned by its loss alone, by a control
(a value function fitted to shuffled scores), and by MetricOpt; the cheap rival, a bias per class searched on the
observation split, is measured too. Four disjoint splits: the loss sees train, the metric is observed on `observation`,
each method's best step is chosen on `selection`, and methods are compared on `report`, which nothing else touches.

Left in `output_dir`: the model tuned by MetricOpt with the first seed (an ordinary one, to be loaded without
metricopt_hf), its value function in `value_function/`, `results.json` and `metric.png`. `--help` lists all options; a
JSON file of options may be given instead of them.
"""

import copy
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field, replace
from time import perf_counter

import datasets
import numpy as np
import timm
import torch
from scipy.ndimage import uniform_filter
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    HfArgumentParser,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
    Trainer,
    set_seed,
)

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptError, MetricOptTrainer
from metricopt_hf import metrics as shipped_metrics
from metricopt_hf.comparison import (
    METHODS,
    PLOT,
    RESULTS,
    SPLITS,
    VALUE_FUNCTION,
    run_method,
    run_start,
    summary,
    write,
)
from metricopt_hf.report import MethodRun, require

logger = logging.getLogger(__name__)

DEMO_NOTE = (
    "This is a small model on 400 images per split, some 40 of the worst class: it shows how the library is used and "
    "what that costs, and nothing about other models and data. No setting was tuned on this table."
)

DEFAULTS = {
    "output_dir": "out/image_classification",
    "metric_name_or_path": "worst_class_recall",
    "metric_start_ratio": 0.0,
    "remove_unused_columns": False,  # the transform needs the image column
    "save_strategy": "no",
    "report_to": "none",
    "per_device_eval_batch_size": 128,
}
DEMO_DEFAULTS = {
    **DEFAULTS,
    "max_steps": 200,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,  # of the pretraining; phi has its own
    "dataloader_pin_memory": False,
}


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set: a name on the Hub or a local folder. Default: scikit-learn's digits."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: image, img, or the only image column."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels. Default: label, labels, or the only class column."}
    )
    train_split: str = field(
        default="train", metadata={"help": 'Split to train on; slices such as "train[:5000]" too.'}
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split from which observation and selection are cut. Default: validation, else test."},
    )
    report_split: str | None = field(
        default=None,
        metadata={"help": "Split to report on. Default: test where eval_split is another, else cut from eval_split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many random examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many random ones of eval_split."})
    max_report_samples: int | None = field(default=None, metadata={"help": "Use so many random ones of report_split."})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model: a Hub name, a local folder, or a timm name. Default: with the digits a small timm ViT, "
            "pretrained in this script."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    token: str | None = field(default=None, metadata={"help": "Token for private repositories on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class StudyArguments:
    methods: list[str] = field(
        default_factory=lambda: ["loss_only", "shuffled", "metricopt"],
        metadata={"help": "What to run and compare; shuffled and random are controls.", "choices": list(METHODS)},
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "Default: seed, seed + 1 and seed + 2."})
    pretraining_steps: int = field(
        default=400, metadata={"help": "Steps for which the digits' model is pretrained in this script."}
    )


@dataclass
class Splits:
    """Four disjoint data sets with the columns `image` and `label`; `pretraining` where it is not train."""

    train: datasets.Dataset
    observation: datasets.Dataset
    selection: datasets.Dataset
    report: datasets.Dataset
    pretraining: datasets.Dataset | None = None

    def check(self, num_labels: int) -> None:
        for name, dataset in self.__dict__.items():
            if dataset is None:
                continue
            if len(dataset) == 0:
                raise ConfigurationError(f"The {name} split is empty: look at --max_*_samples and --*_split.")
            labels = np.asarray(dataset.with_format("numpy")["label"][:])
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

    def with_pixels(self, processor) -> "Splits":
        def transform(batch):
            images = [image.convert("RGB") for image in batch["image"]]
            return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

        return Splits(**{k: None if d is None else d.with_transform(transform) for k, d in self.__dict__.items()})


# The digits


def digits(seed: int) -> Splits:
    """Loss and metric disagree: what is tuned on is long-tailed, while the metric asks for the worst of all classes.

    The start model is trained on clean images of the train split, all ten classes alike. Then the camera changes
    (blur, a quarter less contrast, noise), for all splits; and of the train images only a long tail is left: the
    classes in random order, the first with all of its images, the last with a tenth.
    """
    generator = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    clean = pixels.reshape(-1, 8, 8) / 16
    seen = 0.75 * clean + 0.25 * uniform_filter(clean, (0, 3, 3))
    seen = 0.125 + 0.75 * seen + generator.normal(0, 0.1, clean.shape)
    rows = np.split(generator.permutation(len(labels)), [597, 997, 1397])

    tail = []
    for rank, label in enumerate(generator.permutation(10)):
        mine = rows[0][labels[rows[0]] == label]
        tail.append(mine[: round(len(mine) * 0.1 ** (rank / 9))])

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})

    def dataset(images, rows):
        images = (images[rows].clip(0, 1) * 255).astype(np.uint8)
        return datasets.Dataset.from_dict({"image": list(images), "label": labels[rows]}, features=features)

    parts = [np.concatenate(tail), *rows[1:]]
    return Splits(*(dataset(seen, part) for part in parts), pretraining=dataset(clean, rows[0]))


def small_vit(names: list[str]):
    """A new ViT for 8x8 images, made by timm."""
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4},
        pretrained_cfg={"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return AutoModelForImageClassification.from_config(config), TimmWrapperImageProcessor(config.pretrained_cfg)


# Any data set, any model


def load_splits(data: DataArguments, observation_size: int | None, token: str | None, seed: int) -> Splits:
    where = (data.dataset_name, data.dataset_config_name)
    existing = datasets.get_dataset_split_names(*where, token=token)
    eval_split = data.eval_split or next((s for s in ("validation", "valid", "test") if s in existing), None)
    if eval_split is None or eval_split == data.train_split:
        raise ConfigurationError(
            f"There is no split to observe and select on beside {data.train_split!r} ({', '.join(existing)}): name one "
            'with --eval_split, for instance --train_split "train[:80%]" --eval_split "train[80%:]".'
        )
    report_split = data.report_split
    if report_split is None and "test" in existing and "test" not in (data.train_split, eval_split):
        report_split = "test"
    if report_split in (data.train_split, eval_split):
        raise ConfigurationError(f"--report_split {report_split} is trained, observed or selected on: take another.")

    def load(split: str, size: int | None, salt: int):
        if (name := split.partition("[")[0]) not in existing:
            raise ConfigurationError(f"{data.dataset_name} has no split {name!r}; it has {', '.join(existing)}.")
        dataset = columns(datasets.load_dataset(*where, split=split, token=token), data)
        if size is not None and size < len(dataset):
            dataset = dataset.select(np.random.default_rng([seed, salt]).permutation(len(dataset))[:size])
        return dataset

    train, evaluation = load(data.train_split, data.max_train_samples, 0), load(eval_split, data.max_eval_samples, 1)
    parts = 3 if report_split is None else 2
    size = len(evaluation) // parts if observation_size is None else observation_size
    if size < 1 or 2 * size + (parts == 3) > len(evaluation):
        raise ConfigurationError(
            f"{eval_split!r} has {len(evaluation)} examples, too few for observation and selection "
            f"({max(size, 1)} each){' and report' * (parts == 3)}: use more of it, or a smaller --observation_size."
        )
    order = np.random.default_rng([seed, 2]).permutation(len(evaluation))
    observation, selection, rest = (evaluation.select(r) for r in np.split(order, [size, 2 * size]))
    if report_split is None:
        report = rest.select(range(min(len(rest), data.max_report_samples or len(rest))))
    else:
        report = load(report_split, data.max_report_samples, 3)
    return Splits(train, observation, selection, report)


def columns(dataset: datasets.Dataset, data: DataArguments) -> datasets.Dataset:
    """The two columns that are needed, as `image` and `label`."""

    def find(given: str | None, usual: tuple[str, ...], kind: type, option: str) -> str:
        of_kind = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
        candidates = [given] if given is not None else [*usual, *of_kind[: len(of_kind) == 1]]
        if not (found := [name for name in candidates if name in dataset.column_names]):
            raise ConfigurationError(
                f"There is no column {candidates[0]!r}; the columns are {', '.join(dataset.column_names)}. "
                f"Name the right one with --{option}."
            )
        return found[0]

    image = find(data.image_column_name, ("image", "img"), datasets.Image, "image_column_name")
    label = find(data.label_column_name, ("label", "labels"), datasets.ClassLabel, "label_column_name")
    dataset = dataset.select_columns([image, label])
    if not isinstance(dataset.features[image], datasets.Image):
        raise ConfigurationError(
            f"The column {image!r} holds {dataset.features[image]}, not images: name another with --image_column_name."
        )
    return dataset.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})


def label_names(dataset: datasets.Dataset) -> list[str]:
    feature = dataset.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    labels = np.asarray(dataset.with_format("numpy")["label"][:])
    return [str(i) for i in range(int(labels.max()) + 1)] if labels.size and labels.dtype.kind in "iu" else ["0"]


def load_model(named: ModelArguments, names: list[str], trained_here: bool):
    """A model for these classes and its image processor, by a Hub name, a folder, or a name of timm."""
    name, new_head = named.model_name_or_path, {}
    if not os.path.isdir(name) and timm.is_model(name):
        cfg = timm.get_pretrained_cfg(name)
        name = f"timm/{cfg.architecture}" + (f".{cfg.tag}" if cfg.tag else "")
    common = {"revision": named.model_revision, "token": named.token, "trust_remote_code": named.trust_remote_code}
    if trained_here:
        new_head = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        new_head["ignore_mismatched_sizes"] = True
    model = AutoModelForImageClassification.from_pretrained(name, **common, **new_head)
    if model.config.num_labels != len(names):
        raise ConfigurationError(
            f"{name} tells {model.config.num_labels} classes apart, the data set has {len(names)}. To train a new head "
            "first, give the share of the steps for that: --metric_start_ratio 0.75."
        )
    return model, AutoImageProcessor.from_pretrained(name, **common)


# The study


@dataclass
class Start:
    """What all methods of a seed begin with."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    splits: Splits
    args: MetricOptConfig
    seconds: float  # of its training in this script

    def trainer(self, **own) -> MetricOptTrainer:
        """A trainer on a copy of the model, with `own` changes to the arguments that all methods share."""
        return MetricOptTrainer(
            copy.deepcopy(self.model),
            replace(self.args, **own),
            train_dataset=self.splits.train,
            eval_dataset=self.splits.selection,
            observation_dataset=self.splits.observation,
            selection_dataset=self.splits.selection,
            # timm's processor stands in the model's config
            processing_class=None if isinstance(self.processor, TimmWrapperImageProcessor) else self.processor,
        )

    @property
    def measured(self) -> dict[str, datasets.Dataset]:
        return {name: getattr(self.splits, name) for name in SPLITS}


def prepare(seed: int, data: DataArguments, named: ModelArguments, study: StudyArguments, args: MetricOptConfig):
    """Load, check, and train the start model where that is asked for."""
    set_seed(seed)
    if data.dataset_name is None:
        splits = digits(seed)
    else:
        splits = load_splits(data, args.observation_size, named.token, seed)
    names = label_names(splits.train)
    splits.check(len(names))
    if data.dataset_name is None:
        model, processor = small_vit(names)
    else:
        model, processor = load_model(named, names, trained_here=args.metric_start_ratio > 0)
    splits = splits.with_pixels(processor)
    sizes = ", ".join(f"{name} {len(getattr(splits, name))}" for name in ("train", *SPLITS))
    logger.info(f"Seed {seed}: {type(model).__name__}, {len(names)} classes; images: {sizes}.")

    steps, first_steps = args.max_steps, study.pretraining_steps
    if steps <= 0:
        batches = math.ceil(len(splits.train) / (args.train_batch_size * args.world_size))
        steps = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
    if data.dataset_name is not None:
        first_steps = round(args.metric_start_ratio * steps)
        steps -= first_steps
    args = replace(args, seed=seed, max_steps=steps, metric_start_ratio=0.0, observe_steps=args.rounds_every(steps))
    start = Start(model, processor, splits, args, 0.0)
    if first_steps:
        run_start(start.trainer(), {"observation": splits.observation})  # what is refused, shall be refused now
        logger.info(f"Seed {seed}: training the start model by its loss, {first_steps} steps.")
        plain = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False}
        since = perf_counter()
        clean = splits.train if splits.pretraining is None else splits.pretraining
        Trainer(model, replace(args, max_steps=first_steps, **plain), train_dataset=clean).train()
        start.seconds = perf_counter() - since
        model.to("cpu")
    return start


def parse(argv: list[str]) -> tuple[DataArguments, ModelArguments, StudyArguments, MetricOptConfig]:
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, StudyArguments, MetricOptConfig), description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--metric", dest="metric_name_or_path", help="Short for --metric_name_or_path.")
    if len(argv) == 1 and argv[0].endswith(".json"):
        with open(argv[0], encoding="utf-8") as file:
            options = json.load(file)
        arguments = parser.parse_dict({**(DEFAULTS if "dataset_name" in options else DEMO_DEFAULTS), **options})
    else:
        on_digits = not any(option.startswith(("--dataset_name", "--dataset-name")) for option in argv)
        parser.set_defaults(**(DEMO_DEFAULTS if on_digits else DEFAULTS))
        arguments = parser.parse_args_into_dataclasses(argv)
    data, named, study, args = arguments
    study.seeds = study.seeds or [args.seed, args.seed + 1, args.seed + 2]
    if args.metric_name_or_path in shipped_metrics.names() and args.greater_is_better is None:
        args = replace(args, greater_is_better=True)
    args = replace(args, greater_is_better=args.resolved_greater_is_better)  # a guess is said aloud once
    if (data.dataset_name is None) != (named.model_name_or_path is None):
        raise ConfigurationError(
            "--dataset_name and --model_name_or_path go together; without both, a small ViT is made for the digits."
        )
    if data.dataset_name is None and args.metric_start_ratio > 0:
        raise ConfigurationError("On the digits, --pretraining_steps says how long the start model is trained.")
    if args.resume_from_checkpoint is not None and len(study.methods) * len(study.seeds) > 1:
        raise ConfigurationError(
            "--resume_from_checkpoint continues one run: name it with --methods and --seeds, one of each."
        )
    return data, named, study, args


def main(argv: list[str] | None = None) -> list[MethodRun]:
    data, named, study, args = parse(sys.argv[1:] if argv is None else argv)
    require("tabulate", "report")
    require("matplotlib", "plot")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in (__name__, "metricopt_hf.comparison"):
        logging.getLogger(name).setLevel(logging.INFO if args.should_log else logging.WARNING)

    if data.dataset_name is None:
        torch.set_num_threads(1)  # so small a model is slower on several, and far slower beside other work
    since, runs = perf_counter(), []
    kept_method = "metricopt" if "metricopt" in study.methods else study.methods[-1]
    for seed in study.seeds:
        start = prepare(seed, data, named, study, replace(args, push_to_hub=False))
        first = start.trainer(push_to_hub=args.push_to_hub and not runs)  # makes the repository, or fails early
        runs.append(run_start(first, start.measured, start.seconds))
        for method in study.methods:
            keep = method == kept_method and seed == study.seeds[0]
            apart = not keep and args.save_strategy != "no"
            folder = os.path.join(args.output_dir, "runs", f"{method}-seed{seed}") if apart else args.output_dir
            own = {"output_dir": folder, "push_to_hub": args.push_to_hub and keep}
            trainer, rows = run_method(method, start.trainer, start.measured, args.resume_from_checkpoint, **own)
            runs += rows
            if keep:
                kept, title = trainer, rows[0].method
                kept.save_model()

    if kept.is_world_process_zero():
        write(args.output_dir, runs, kept, title, {**data.__dict__, **named.__dict__, **args.to_dict()})
        print(summary(runs, kept))
        if data.dataset_name is None:
            print(DEMO_NOTE)
        written = f"the model, {VALUE_FUNCTION}/, {RESULTS} and {PLOT}"
        print(f"{perf_counter() - since:.0f} s in all. {args.output_dir} holds {written}.")
    card = {"tasks": "image-classification", "tags": ["image-classification", "vision", "metricopt"]}
    card["finetuned_from"] = named.model_name_or_path
    if data.dataset_name is not None and not os.path.exists(data.dataset_name):
        card["dataset"] = data.dataset_name
    if args.push_to_hub:
        kept.push_to_hub(**card)
    elif named.model_name_or_path is not None:
        kept.create_model_card(**card)
    return runs


if __name__ == "__main__":
    try:
        main()
    except MetricOptError as error:
        sys.exit(f"{type(error).__name__}: {error}")
