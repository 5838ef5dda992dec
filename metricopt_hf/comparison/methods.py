"""Methods against each other, from the same start: what an example script runs so that its table is a fair one.

Every method gets the same model, data, seed, phi, steps and selection; they differ by `Method.changes` alone. A script
takes `METHODS`, and adds what else its field would do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from transformers import EvalPrediction
from transformers.trainer_callback import ProgressCallback

from .. import Ledger, MetricOptTrainer
from ..posthoc import add_bias, tune_bias
from .report import MethodRun, compare, comparison_table, details_of, plot_run, save_results, table_note
from .splits import MEASURED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """A way to tune a model: by the loss, by a control guide, or by MetricOpt.

    Attributes:
        title: row of the table.
        changes: to the arguments that all methods share: of `MetricOptConfig`, or of the trainer.
        class_bias: whether, in a classification, a second row shows it with a bias per class tuned on top.
    """

    title: str
    changes: Mapping[str, Any]
    class_bias: bool = False


# It never uses its coordinates, so they may be the cheapest; what a tuned bias adds is a row of its own.
LOSS_ONLY = Method(
    "loss only",
    {"value_weight": 0.0, "metric_call_budget": 0, "coordinates": "random", "tune_output_bias": False},
)
METHODS = {
    "loss_only": replace(LOSS_ONLY, class_bias=True),
    "shuffled": Method("control: shuffled", {"guide": "shuffled"}),
    "random": Method("control: random", {"guide": "random"}),
    "metricopt": Method("MetricOpt", {}, class_bias=True),
}
PRETRAINED, WITH_BIAS, REFERENCE = "pretrained", " + class bias", LOSS_ONLY.title

VALUE_FUNCTION, RESULTS, PLOT = "value_function", "results.json", "metric.png"


def predictions(trainer: MetricOptTrainer, splits: Mapping[str, Any]) -> dict[str, EvalPrediction]:
    """The predictions of the trainer's model on each data set, without a progress bar for each."""
    trainer.remove_callback(ProgressCallback)
    outputs = {name: trainer.predict(dataset) for name, dataset in splits.items()}
    return {name: EvalPrediction(output.predictions, output.label_ids) for name, output in outputs.items()}


def run_start(trainer: MetricOptTrainer, splits: Mapping[str, Any], seconds: float = 0.0) -> MethodRun:
    """The row of the model as it is before tuning; `seconds` it took to train."""
    scores = {name: trainer.metric(prediction) for name, prediction in predictions(trainer, splits).items()}
    return MethodRun(PRETRAINED, trainer.args.seed, scores, seconds=seconds)


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
    seed, metric = trainer.args.seed, trainer.metric
    logger.info(f"Seed {seed}: {method.title}.")
    start = perf_counter()
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    seconds = perf_counter() - start
    outputs = predictions(trainer, splits)
    scores = {name: metric(output) for name, output in outputs.items()}
    logger.info(
        f"Seed {seed}: {method.title} took {seconds:.1f} s; {', '.join(f'{n} {s:.3f}' for n, s in scores.items())}."
    )
    rows = [MethodRun(method.title, seed, scores, dict(trainer.ledger.calls), seconds, details_of(trainer))]
    if class_bias and method.class_bias:
        ledger, start = Ledger(), perf_counter()
        bias = tune_bias(metric, outputs["observation"], ledger)
        seconds += perf_counter() - start
        scores = {name: metric(add_bias(output, bias)) for name, output in outputs.items()}
        calls = {**trainer.ledger.calls, "post-hoc": ledger.calls["post-hoc"]}
        rows.append(MethodRun(method.title + WITH_BIAS, seed, scores, calls, seconds, {"bias": bias}))
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
    folder: str, runs: Sequence[MethodRun], trainer: MetricOptTrainer, title: str, arguments: Mapping[str, Any]
) -> None:
    """Write results and plot into `folder`.

    Args:
        trainer: whose run is plotted.
        title: of its method, as in the table.
        arguments: of the script, for the record.
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
    reference = (REFERENCE, details[REFERENCE]) if REFERENCE in details and title != REFERENCE else None
    plot_run(os.path.join(folder, PLOT), details[title], metric.name, reference, f"{title}, seed {seed}")
