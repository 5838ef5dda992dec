"""Methods against each other, from the same start: what an example script runs so that its table is a fair one.

Every method gets the same model, data, seed and steps; they differ by `Method.changes` alone. The loss alone is the
same trainer whose run follows no metric, so that all of its steps are Trainer's. A script takes `METHODS`, and adds
what else its field would do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
from transformers import EvalPrediction, Trainer
from transformers.trainer_callback import ProgressCallback

from metricopt_hf import Ledger, Metric, MetricError, MetricOptTrainer
from metricopt_hf.posthoc import add_bias, tune_bias

from .report import (
    MethodRun,
    compare,
    comparison_table,
    details_of,
    plot_groups,
    plot_run,
    save_results,
    table_note,
)
from .splits import MEASURED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """A way to tune a model: by the loss, by a control guide, or by MetricOpt.

    Attributes:
        title: row of the table.
        changes: to the arguments that all methods share: of `MetricOptConfig`, of the trainer, or `follows_metric`,
            which is False where all steps are by the loss.
        class_bias: whether, in a classification, a second row shows it with a bias per class tuned on top.
    """

    title: str
    changes: Mapping[str, Any]
    class_bias: bool = False


def by_loss_alone(cls: type[MetricOptTrainer]) -> type[MetricOptTrainer]:
    """A class of trainers whose runs are Trainer's, step by step; they know the metric, so that it can be measured."""

    class LossOnlyTrainer(cls):
        def train(self, *args, **kwargs):
            self.settled()
            return Trainer.train(self, *args, **kwargs)

        def _prepare_for_training(self, *args, **kwargs):
            return Trainer._prepare_for_training(self, *args, **kwargs)

    return LossOnlyTrainer


LOSS_ONLY = Method("loss only", {"follows_metric": False})
METHODS = {
    "loss_only": replace(LOSS_ONLY, class_bias=True),
    "shuffled": Method("control: shuffled", {"guide": "shuffled"}),
    "random": Method("control: random", {"guide": "random"}),
    "metricopt": Method("MetricOpt", {}, class_bias=True),
}
PRETRAINED, WITH_BIAS, REFERENCE = "pretrained", " + class bias", LOSS_ONLY.title

VALUE_FUNCTION, RESULTS, PLOT, GROUPS_PLOT = "value_function", "results.json", "metric.png", "groups.png"


def predictions(trainer: MetricOptTrainer, splits: Mapping[str, Any]) -> dict[str, EvalPrediction]:
    """The predictions of the trainer's model on each data set."""
    outputs = {name: trainer.predict(dataset) for name, dataset in splits.items()}
    return {name: EvalPrediction(output.predictions, output.label_ids) for name, output in outputs.items()}


def measured(
    trainer: MetricOptTrainer, outputs: Mapping[str, EvalPrediction], splits: Mapping[str, Any]
) -> dict[str, float]:
    """The metric on each data set: of what the model said of it, or of the model itself.

    It is nan where the metric fails twice, so that one failure does not cost a study all that it has.
    """
    metric, scores = trainer.metric, {}
    for name in splits:
        for last in (False, True):
            try:
                if metric.of_predictions:
                    scores[name] = metric(outputs[name])
                else:
                    numbers = trainer.evaluate(splits[name], metric_key_prefix=name)
                    scores[name] = numbers[f"{name}_{metric.name.removeprefix('eval_')}"]
                break
            except MetricError as error:
                scores[name] = float("nan")
                again = f"The figure on the {name} split is left out." if last else "It is asked once more."
                logger.warning(f"{error} {again}")
    return scores


def by_group(metric: Metric, prediction: EvalPrediction) -> dict[int, float]:
    """The metric on the examples of each group alone, where groups stand in a second label column.

    A group by which the metric cannot tell anything, such as a gap between groups, is left out.
    """
    if not isinstance(prediction.label_ids, tuple) or len(prediction.label_ids) != 2:
        return {}
    scores, outputs, groups = {}, prediction.predictions, prediction.label_ids[1]
    for group in np.unique(groups):
        rows = groups == group
        part = tuple(output[rows] for output in outputs) if isinstance(outputs, tuple) else outputs[rows]
        with suppress(MetricError):
            scores[int(group)] = metric(EvalPrediction(part, tuple(column[rows] for column in prediction.label_ids)))
    return scores


def rows_of(
    title: str,
    trainer: MetricOptTrainer,
    splits: Mapping[str, Any],
    seconds: float,
    class_bias: bool,
    details: Mapping[str, Any],
) -> list[MethodRun]:
    """The row of a trainer's model, measured on each split, and, with `class_bias`, one with a bias tuned on top."""
    trainer.remove_callback(ProgressCallback)  # no bar for each split
    metric, calls = trainer.metric, dict(details.get("calls", {}))
    outputs = predictions(trainer, splits) if metric.of_predictions else {}

    def row(title: str, outputs: Mapping[str, EvalPrediction], **values: Any) -> MethodRun:
        scores = measured(trainer, outputs, splits)
        groups = by_group(metric, outputs[MEASURED[-1]]) if MEASURED[-1] in outputs else {}
        return MethodRun(title, trainer.args.seed, scores, by_group=groups, **values)

    details = dict(details)
    rows = [row(title, outputs, calls=calls, seconds=seconds, details=details)]
    if class_bias and metric.of_predictions:
        ledger, start = Ledger(), perf_counter()
        bias = tune_bias(metric, outputs["observation"], ledger)
        seconds += perf_counter() - start
        tuned = {name: add_bias(output, bias) for name, output in outputs.items()}
        calls = {**calls, "post-hoc": calls.get("post-hoc", 0) + ledger.calls["post-hoc"]}
        rows.append(row(title + WITH_BIAS, tuned, calls=calls, seconds=seconds, details={"bias": bias}))
    return rows


def run_start(
    trainer: MetricOptTrainer, splits: Mapping[str, Any], seconds: float = 0.0, class_bias: bool = False
) -> list[MethodRun]:
    """The rows of the model as it is before tuning; `seconds` it took to train. For `class_bias` see `run_method`."""
    return rows_of(PRETRAINED, trainer, splits, seconds, class_bias, {})


def run_method(
    method: Method,
    make_trainer: Callable[..., MetricOptTrainer],
    splits: Mapping[str, Any],
    class_bias: bool = False,
    resume_from_checkpoint: str | None = None,
    **changes: Any,
) -> tuple[MetricOptTrainer, list[MethodRun]]:
    """Tune by one method, and measure on `splits` (observation, selection, report).

    Args:
        make_trainer: makes a trainer on a fresh copy of the start model, with the changes to its arguments that it is
            called with.
        class_bias: whether the task is a classification, so that there is a bias per class (of two: a threshold).
        changes: further ones, such as `output_dir`.

    Returns:
        The trainer after its run, and one or two rows of the table.
    """
    trainer = make_trainer(**method.changes, **changes)
    logger.info(f"Seed {trainer.args.seed}: {method.title}.")
    start = perf_counter()
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    seconds = perf_counter() - start
    with_bias = class_bias and method.class_bias
    rows = rows_of(method.title, trainer, splits, seconds, with_bias, details_of(trainer))
    scores = ", ".join(f"{name} {score:.3f}" for name, score in rows[0].scores.items())
    logger.info(f"Seed {trainer.args.seed}: {method.title} took {seconds:.1f} s; {scores}.")
    return trainer, rows


def in_order(runs: Sequence[MethodRun]) -> list[MethodRun]:
    """The runs method by method, these in the order in which they were first run."""
    rows = list(dict.fromkeys(run.method for run in runs))
    return sorted(runs, key=lambda run: rows.index(run.method))


def summary(runs: Sequence[MethodRun], trainer: MetricOptTrainer) -> str:
    """Table and notes, for the terminal."""
    metric = trainer.metric
    return (
        f"\n{metric.name} ({'greater' if metric.greater_is_better else 'smaller'} is better)\n\n"
        f"{comparison_table(in_order(runs), REFERENCE, MEASURED, metric.greater_is_better)}\n\n"
        f"{table_note(len({run.seed for run in runs}))}"
    )


def write(
    folder: str,
    runs: Sequence[MethodRun],
    trainer: MetricOptTrainer,
    title: str,
    arguments: Mapping[str, Any],
    group_names: Sequence[str] = (),
    group_axis: str = "",
) -> list[str]:
    """Write results and plots into `folder`; their names.

    Args:
        trainer: whose run is plotted; guided.
        title: of its method, as in the table.
        arguments: of the script, for the record.
        group_names, group_axis: of the groups that the metric is told, where it is told any; see `Start`.
    """
    metric, seed = trainer.metric, trainer.args.seed
    differences = compare(runs, REFERENCE, MEASURED[-1], metric.greater_is_better)
    save_results(
        os.path.join(folder, RESULTS),
        in_order(runs),
        metric=metric.name,
        greater_is_better=metric.greater_is_better,
        differences={method: asdict(difference) for method, difference in differences.items()},
        arguments={name: value for name, value in arguments.items() if "token" not in name},
    )
    details = {run.method: run.details for run in runs if run.seed == seed}
    reference = next((run for run in runs if run.seed == seed and run.method == REFERENCE != title), None)
    line = None if reference is None else (REFERENCE, reference.scores[MEASURED[1]])  # on the selection split
    plots = []
    if details[title]:
        plot_run(os.path.join(folder, PLOT), details[title], metric.name, line, f"{title}, seed {seed}")
        plots = [PLOT]
    if not any(run.by_group for run in runs):
        return [RESULTS, *plots]
    shown = [PRETRAINED, PRETRAINED + WITH_BIAS, REFERENCE, REFERENCE + WITH_BIAS, title]
    mine = [run for run in in_order(runs) if run.method in shown]
    plot_groups(os.path.join(folder, GROUPS_PLOT), mine, group_axis or metric.name, group_names)
    return [RESULTS, *plots, GROUPS_PLOT]
