"""A whole comparison, as the example scripts run it: arguments, a start per seed, every method from it, the results.

A script says what is its own: how data and model are loaded (`prepare`), which methods there are, and its defaults.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter, process_time
from typing import Any

from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptError, MetricOptTrainer
from metricopt_hf import metrics as shipped_metrics

from .methods import VALUE_FUNCTION, Method, by_loss_alone, run_method, run_start, summary, write
from .report import MethodRun, require
from .splits import Splits

logger = logging.getLogger(__name__)

# Defaults of all scripts; each adds its own.
DEFAULTS = {
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
    "methods": ["loss_only", "shuffled", "metricopt"],
}
# In the steps before the methods part nothing is kept.
FIRST_STEPS = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False}


@dataclass
class StudyArguments:
    """What is run and compared."""

    methods: list[str] = field(
        default_factory=list, metadata={"help": "What to run and compare; shuffled and random are controls."}
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "Default: seed, seed + 1 and seed + 2."})
    diagnose: bool = field(
        default=True, metadata={"help": "With the first seed say first whether there is anything to gain."}
    )


@dataclass
class ModelArguments:
    """The model to start from, wherever it lies."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model: a name on the Hub or a local folder. Default: see above."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    token: str | None = field(default=None, metadata={"help": "Token for private repositories on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    first_steps: int = field(
        default=0,
        metadata={
            "help": "Steps by the loss before the methods part, made once per seed, such as for a new head. The "
            "methods' own steps, max_steps or num_train_epochs, come after them."
        },
    )

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` beside the name."""
        return {"revision": self.model_revision, "token": self.token, "trust_remote_code": self.trust_remote_code}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the script's own text as it is written."""


class Parser(HfArgumentParser):
    """`HfArgumentParser` with a heading in its help for each dataclass, and for what that inherits.

    A heading is the first sentence of the docstring, or what stands in `HEADINGS`.
    """

    HEADINGS = {
        MetricOptConfig: "Metric guidance (MetricOptConfig)",
        TrainingArguments: "Training (TrainingArguments of transformers)",
    }

    def __init__(self, types: Sequence[type], **kwargs: Any):
        classes = [cls for given in types for cls in given.__mro__ if dataclasses.is_dataclass(cls)]
        self._headings = [self.HEADINGS.get(cls) or cls.__doc__.partition(".")[0] for cls in classes]
        # a field belongs to the class that brings it in: bases come behind what is derived, and have the last word
        pairs = zip(classes, self._headings, strict=True)
        self._heading_of = {f.name: heading for cls, heading in pairs for f in dataclasses.fields(cls)}
        self._groups: dict[str, Any] = {}
        super().__init__(types, **kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        heading = self._heading_of.get(kwargs.get("dest") or names[0].lstrip("-"))
        if heading is None:
            return super().add_argument(*names, **kwargs)
        if not self._groups:
            self._groups = {heading: self.add_argument_group(heading) for heading in self._headings}
        return self._groups[heading].add_argument(*names, **kwargs)


def parse(
    argv: Sequence[str] | None,
    types: Sequence[type],
    methods: Mapping[str, Method],
    defaults: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]],
    description: str,
    directions: Mapping[str, bool] | None = None,
) -> tuple:
    """The options of the command line, or of the one JSON file named there.

    Args:
        argv: default: of this process.
        types: the script's own dataclasses.
        methods: what `--methods` may name.
        defaults: other than the dataclasses'; where they depend on the options given, a function of these.
        description: what `--help` says first; the script's docstring.
        directions: whether greater is better, for the script's own metrics; for shipped ones it is known.

    Returns:
        One instance of each of `types`, then `StudyArguments` and `MetricOptConfig`.

    Raises:
        ConfigurationError: an unknown method; several runs to be resumed at once.
        ImportError: what makes the table and the plot is not installed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(
        (*types, StudyArguments, MetricOptConfig),
        usage="%(prog)s [--option value ...]\n       %(prog)s options.json",
        description=description,
        epilog="methods:\n" + "\n".join(f"  {name:22}{method.title}" for name, method in methods.items()),
        formatter_class=Help,
    )
    parser.add_argument("--metric", dest="metric_name_or_path", help="Short for --metric_name_or_path.")
    from_file = None
    if len(argv) == 1 and argv[0].endswith(".json"):
        with open(argv[0], encoding="utf-8") as file:
            from_file = json.load(file)
        given = from_file
    else:
        words = " ".join(argv).replace("=", " ").split() + [""]
        pairs = zip(words, words[1:], strict=False)
        given = {word[2:].replace("-", "_"): following for word, following in pairs if word.startswith("--")}
    defaults = {**DEFAULTS, **(defaults(given) if callable(defaults) else defaults)}
    if from_file is None:
        parser.set_defaults(**defaults)
        parsed = parser.parse_args_into_dataclasses(argv)
    else:
        parsed = parser.parse_dict({**defaults, **from_file})
    *own, study, args = parsed

    require("tabulate", "examples")
    require("matplotlib", "plot")
    if unknown := [name for name in study.methods if name not in methods]:
        raise ConfigurationError(f"--methods {unknown[0]}: there is no such method; there are {', '.join(methods)}.")
    study.seeds = study.seeds or [args.seed, args.seed + 1, args.seed + 2]
    if args.resume_from_checkpoint is not None and len(study.methods) * len(study.seeds) > 1:
        raise ConfigurationError(
            "--resume_from_checkpoint continues one run: name it with --methods and --seeds, one of each."
        )
    if args.metric_command is not None and not {"metric", "metric_name_or_path"} & set(given):
        args = replace(args, metric_name_or_path=None)  # the script's default
    metric = args.metric_name_or_path or args.metric_for_best_model
    shipped = {name: shipped_metrics.greater_is_better(name) for name in shipped_metrics.names()}
    directions = {**shipped, **(directions or {})}
    if "greater_is_better" not in given and metric in directions:
        args = replace(args, greater_is_better=directions[metric])
    return (*own, study, args)


@dataclass
class Start:
    """What all methods of a seed begin with.

    Attributes:
        model: each trainer gets a copy.
        args: of each trainer.
        splits: with the columns that the model takes.
        options: further arguments of each trainer (`data_collator`, `metric`, `phi`, `processing_class`, ...).
        class_bias: whether the task is a classification, whose cheap rival is a bias per class.
        seconds: how long it took to train.
        group_names: of the groups that the metric is told, by their number.
        group_axis: what a picture of the groups shows, for its axis.
    """

    model: nn.Module
    args: MetricOptConfig
    splits: Splits
    options: Mapping[str, Any] = field(default_factory=dict)
    class_bias: bool = False
    seconds: float = 0.0
    group_names: Sequence[str] = ()
    group_axis: str = ""

    def trainer(self, follows_metric: bool = True, **changes: Any) -> MetricOptTrainer:
        """A trainer on a copy of the model, with `changes` to its `MetricOptConfig` and to its other arguments.

        Args:
            follows_metric: else all of its steps are by the loss, and it only measures the metric.
        """
        cls = MetricOptTrainer if follows_metric else by_loss_alone(MetricOptTrainer)
        numbers = {f.name for f in dataclasses.fields(self.args)}
        options = {name: value for name, value in changes.items() if name not in numbers}
        datasets = {
            "train_dataset": self.splits.train,
            "eval_dataset": self.splits.selection,
            "observation_dataset": self.splits.observation,
            "selection_dataset": self.splits.selection,
        }
        args = replace(self.args, **{name: value for name, value in changes.items() if name in numbers})
        return cls(copy.deepcopy(self.model), args, **{**datasets, **self.options, **options})


def start(
    model: nn.Module,
    args: MetricOptConfig,
    splits: Splits,
    first_steps: int = 0,
    first_dataset: Any = None,
    class_bias: bool = False,
    **options: Any,
) -> Start:
    """The start of one seed: the model as it is, or after some steps by its loss, made once for all methods.

    Args:
        first_steps: see `ModelArguments`.
        first_dataset: data of these steps; default: train.
        class_bias, options: see `Start`.

    Raises:
        ConfigurationError, MetricError, PhiError: whatever the methods would refuse, before these steps.
    """
    made = Start(model, args, splits, options, class_bias)
    sizes = ", ".join(f"{name} {len(dataset)}" for name, dataset in splits.items())
    logger.info(f"Seed {args.seed}: {type(model).__name__}; {sizes}.")
    if first_steps:
        asked = made.trainer()
        asked.settled()  # what would be refused later is refused now
        run_start(asked, {"observation": splits.observation})
        logger.info(f"Seed {args.seed}: training the start model by its loss, {first_steps} steps.")
        plain = {name: value for name, value in options.items() if name in inspect.signature(Trainer).parameters}
        since = perf_counter()
        first_dataset = splits.train if first_dataset is None else first_dataset
        Trainer(
            model, replace(args, max_steps=first_steps, **FIRST_STEPS), train_dataset=first_dataset, **plain
        ).train()
        made.seconds = perf_counter() - since
        model.to("cpu")
    return made


def run_study(
    prepare: Callable[[MetricOptConfig], Start],
    methods: Mapping[str, Method],
    study: StudyArguments,
    args: MetricOptConfig,
    own: Sequence[Any],
    card: Mapping[str, Any],
    note: str | None = None,
) -> list[MethodRun]:
    """Run every method with every seed, print the table, and leave model, value function, results and plot.

    MetricOpt's model (else the last method's) of the first seed is kept, and pushed with `--push_to_hub`.

    Args:
        prepare: loads, checks, and makes the start for the seed of the arguments given to it.
        own: the script's argument dataclasses, for the record; those of data and model also for the model card.
        card: `tasks` and `tags` of the model card.
        note: printed below the table.

    Returns:
        All rows, seed by seed.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger(__package__).setLevel(logging.INFO if args.should_log else logging.WARNING)

    arguments = {name: value for group in own for name, value in group.__dict__.items()}
    since, runs = perf_counter(), []
    kept_method = "metricopt" if "metricopt" in study.methods else study.methods[-1]
    for seed in study.seeds:
        begin = prepare(replace(args, seed=seed, push_to_hub=False))
        first = begin.trainer(push_to_hub=args.push_to_hub and not runs)  # makes the repository, or fails early
        first.settled()  # what would be refused later is refused now
        diagnoses = study.diagnose and first.metric.of_predictions
        if diagnoses and not runs:
            found = first.diagnose()
            if first.is_world_process_zero():
                print(found)
        runs += run_start(first, begin.splits.measured, begin.seconds, begin.class_bias)
        for name in study.methods:
            keep = name == kept_method and seed == study.seeds[0]
            apart = not keep and args.save_strategy != "no"
            folder = os.path.join(args.output_dir, "runs", f"{name}-seed{seed}") if apart else args.output_dir
            changes = {"output_dir": folder, "push_to_hub": args.push_to_hub and keep}
            trainer, rows = run_method(
                methods[name],
                begin.trainer,
                begin.splits.measured,
                begin.class_bias,
                args.resume_from_checkpoint,
                **changes,
            )
            runs += rows
            if keep:
                kept, title = trainer, rows[0].method
                kept.save_model()

    if kept.is_world_process_zero():
        recorded = {**arguments, **study.__dict__, **args.to_dict()}
        groups = (begin.group_names, begin.group_axis)
        written = write(args.output_dir, runs, kept, title, recorded, *groups)
        print(summary(runs, kept))
        if note is not None:
            print(note)
        learned = [f"{VALUE_FUNCTION}/"] * os.path.isdir(os.path.join(args.output_dir, VALUE_FUNCTION))
        written = ", ".join(["the model", *learned, *written])
        spent = f"{perf_counter() - since:.0f} s in all, {process_time():.0f} s of processor time"
        print(f"{spent}. {args.output_dir} holds {written}.")
    source, dataset = arguments.get("model_name_or_path"), arguments.get("dataset_name")
    card = {**card, "tags": [*card.get("tags", ()), "metricopt"], "finetuned_from": source}
    if dataset is not None and not os.path.exists(dataset):
        card["dataset"] = dataset
    if args.push_to_hub:
        kept.push_to_hub(**card)
    elif source is not None:
        kept.create_model_card(**card)
    return runs


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main`; an error of this library ends it with the message alone."""
    try:
        main()
    except MetricOptError as error:
        sys.exit(f"{type(error).__name__}: {error}")
