"""Worst-class recall on CIFAR-10, for the script that measures what stands on a card: `cards`.

CIFAR-10 as JPEG, a ResNet-20 pretrained on the lossless images, default phi, worst-class recall, which the
cross-entropy does not see. Every method has the same start, data and steps.
"""

from __future__ import annotations

import transformers
from scipy.stats import t as student_t

from examples.comparison.methods import REFERENCE
from examples.comparison.report import MethodRun, compare
from examples.comparison.study import Start
from metricopt_hf import MetricOptConfig, MetricOptTrainer

from .problem import Problem

METRIC = "worst_class_recall"


def make_trainer(seed: int, problem: Problem, max_steps: int, folder: str, **changes) -> MetricOptTrainer:
    """A trainer on a copy of the model, with `changes` as a `Method` makes them."""
    args = MetricOptConfig(
        folder,
        max_steps=max_steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        per_device_eval_batch_size=100,
        metric_name_or_path=METRIC,
        greater_is_better=True,
        metric_steps=max_steps,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Start(problem.model, args, problem).trainer(**changes)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def interval(runs: list[MethodRun], method: str) -> tuple[float, float, float]:
    """Mean of the paired differences to loss only on the report split, and its 95 % interval (Student's t)."""
    difference = compare(runs, REFERENCE, "report")[method]
    half = float(student_t.ppf(0.975, len({run.seed for run in runs}) - 1)) * difference.error
    return difference.mean, difference.mean - half, difference.mean + half
