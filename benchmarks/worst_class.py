"""Worst-class recall on CIFAR-10, for the scripts that measure what sharing gives: `cards` and `warm_start`.

CIFAR-10 as JPEG, a ResNet-20 pretrained on the lossless images, default phi, worst-class recall, which the
cross-entropy does not see. Every method has the same phi, start, data, steps and selection rounds.
"""

from __future__ import annotations

import numpy as np
import transformers
from scipy.stats import t as student_t

from metricopt_hf import MetricOptConfig, MetricOptTrainer
from metricopt_hf.comparison.methods import REFERENCE
from metricopt_hf.comparison.report import MethodRun

from . import cifar

METRIC = "worst_class_recall"


def make_trainer(seed: int, splits: cifar.Splits, max_steps: int, folder: str, **changes) -> MetricOptTrainer:
    """`changes` are to the config, but for `coordinates`."""
    options = {name: changes.pop(name) for name in ("coordinates",) if name in changes}
    args = MetricOptConfig(
        folder,
        max_steps=max_steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        per_device_eval_batch_size=100,
        metric_name_or_path=METRIC,
        greater_is_better=True,
        metric_start_ratio=0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        **changes,
    )
    trainer = MetricOptTrainer(
        cifar.pretrained(20),
        args,
        train_dataset=splits.train,
        observation_dataset=splits.observation,
        selection_dataset=splits.selection,
        **options,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def interval(runs: list[MethodRun], method: str) -> tuple[float, float, float]:
    """Mean of the paired differences to loss only on the report split, and its 95 % interval (Student's t)."""
    by_method = {name: {r.seed: r.scores["report"] for r in runs if r.method == name} for name in (method, REFERENCE)}
    differences = np.array([by_method[method][seed] - by_method[REFERENCE][seed] for seed in by_method[method]])
    half = student_t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return float(differences.mean()), float(differences.mean() - half), float(differences.mean() + half)
