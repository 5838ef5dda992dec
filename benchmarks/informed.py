"""Rivals that are told more than the metric: labels and groups of the observation split, or its images.

They are references, not competitors: where they may be used, there is less need of a black box.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from time import process_time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from transformers import EvalPrediction

from metricopt_hf import Ledger

from .by_loss import train_by_loss
from .problem import Problem, Rows, Task, inputs_of
from .scores import each_label_in_each_group
from .training import Budget, Outcome

Config = Mapping[str, Any]
SUBSETS = 10  # of DFR, as in the paper
IMAGES = 500  # of a batch whose statistics are taken


def compared(task: Task, rows: Rows) -> np.ndarray:
    """[m]: whose accuracies the metric compares, of each example a number."""
    labels, group = (rows.columns[name].numpy()[rows.rows] for name in ("labels", "group"))
    return group if task.groups == "group" else each_label_in_each_group(labels, group)


def _said(task: Task, problem: Problem, start: float, outputs: dict[str, EvalPrediction]) -> Outcome:
    """The outcome of a method that leaves phi alone, and says this instead. The selection split is looked at once."""
    ledger = Ledger()
    with ledger.charge("select"):
        score = task.metric(outputs["selection"])
    return Outcome(problem.start(), 0, score, [], ledger, process_time() - start, outputs=outputs)


@torch.no_grad()
def features_of(problem: Problem, rows: Rows) -> np.ndarray:
    """[m, d]: what the last linear layer is given."""
    seen: list[Tensor] = []
    layer = [module for module in problem.model.modules() if isinstance(module, nn.Linear)][-1]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        for batch in rows.batches(problem.eval_batch):
            problem.model(**inputs_of(batch))
    finally:
        handle.remove()
    return torch.cat(seen).numpy()


def retrain_last_layer(task: Task, problem: Problem, seed: int, budget: Budget, folder: str, config: Config) -> Outcome:
    """DFR (Kirichenko et al. 2023): logistic regression on the features of observation examples, balanced over groups.

    The mean of ten, each of another balanced part. With an L2 penalty, where the paper has L1 on a thousand features.
    """
    start, generator, observation = process_time(), np.random.default_rng(seed), problem.observation
    labels, group = (observation.columns[name].numpy()[observation.rows] for name in ("labels", "group"))
    cells = each_label_in_each_group(labels, group)
    of_cell = [np.flatnonzero(cells == cell) for cell in np.unique(cells)]
    size, features = min(map(len, of_cell)), features_of(problem, observation)
    fits = []
    for _ in range(SUBSETS):
        balanced = np.concatenate([generator.choice(rows, size, replace=False) for rows in of_cell])
        model = make_pipeline(StandardScaler(), LogisticRegression(C=config["C"], max_iter=1000))
        fits.append(model.fit(features[balanced], labels[balanced]))
    outputs = {}
    for name, rows in problem.measured.items():
        known = features if name == "observation" else features_of(problem, rows)
        logits = np.mean([model.decision_function(known) for model in fits], axis=0)
        outputs[name] = rows.prediction(logits if logits.ndim > 1 else np.stack([np.zeros_like(logits), logits], 1))
    return _said(task, problem, start, outputs)


class GroupDRO:
    """The loss of group DRO (Sagawa et al. 2020, algorithm 1): the worst groups weigh most.

    Args:
        groups: how many.
        step: by how much a group's weight grows with its loss, in the exponent.
    """

    def __init__(self, groups: int, step: float):
        self.weights, self.step = torch.full((groups,), 1 / groups), step

    def __call__(self, outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """labels: [b, 2], labels and groups."""
        each, group = F.cross_entropy(outputs["logits"], labels[:, 0], reduction="none"), labels[:, 1]
        present = group.unique()
        losses = torch.stack([each[group == g].mean() for g in present])
        self.weights[present] *= (self.step * losses.detach()).exp()
        self.weights /= self.weights.sum()
        return (self.weights[present] * losses).sum()


def group_dro(task: Task, problem: Problem, seed: int, budget: Budget, folder: str, config: Config) -> Outcome:
    """Phi trained on the observation examples, sampled so that all groups are as frequent."""
    observation = problem.observation
    groups = np.unique(compared(task, observation), return_inverse=True)[1]
    of_group = [observation.rows[groups == g] for g in range(groups.max() + 1)]
    balanced = np.concatenate([np.resize(rows, max(map(len, of_group))) for rows in of_group])
    labels = observation.columns["labels"].clone()[:, None].repeat(1, 2)
    labels[torch.as_tensor(observation.rows), 1] = torch.as_tensor(groups)
    trained = Rows({**observation.columns, "labels": labels}, balanced, observation.pool)
    loss = GroupDRO(len(of_group), config["group_step"])
    return train_by_loss(task, problem, seed, budget, config, trained, loss)


class _Ready(BaseEstimator):
    """An estimator, as fairlearn wants one, that is given its predictions."""

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, scores, labels):
        return self

    def predict(self, scores):
        return np.asarray(scores)[:, 0]


def thresholds_by_group(
    task: Task, problem: Problem, seed: int, budget: Budget, folder: str, config: Config
) -> Outcome:
    """fairlearn's `ThresholdOptimizer` on what the start model says: a threshold, or a lottery of two, for each group.

    It reads the group of every example that it decides about.
    """
    from fairlearn.postprocessing import ThresholdOptimizer

    start = process_time()
    optimizer = ThresholdOptimizer(estimator=_Ready(), prefit=True, predict_method="predict", **config)
    outputs, model = {}, problem.model
    for name, rows in problem.measured.items():
        said = problem.predict(model, rows)
        labels, group = said.label_ids
        # fairlearn writes probabilities into a column of the scores' dtype, which pandas refuses for float32
        margin = (said.predictions[:, 1:] - said.predictions[:, :1]).astype(np.float64)
        if name == "observation":
            optimizer.fit(margin, labels, sensitive_features=group)
        decided = np.asarray(optimizer.predict(margin, sensitive_features=group, random_state=seed))
        outputs[name] = rows.prediction(np.stack([1 - decided, decided], 1).astype(float))
    return _said(task, problem, start, outputs)


def batch_norm_of_observation(
    task: Task, problem: Problem, seed: int, budget: Budget, folder: str, config: Config
) -> Outcome:
    """AdaBN (Li et al. 2017): the batch norms take their statistics from the observation images, without labels.

    Mixed with those of training by `share`, as Schneider et al. (2020) do.
    """
    start, model, measured = process_time(), copy.deepcopy(problem.model), problem.measured
    if config["layers"] == "all":
        pixels = task.pixels()
        measured = {n: Rows({**r.columns, "pixel_values": pixels}, r.rows, r.pool) for n, r in measured.items()}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    update_bn((batch["pixel_values"] for batch in measured["observation"].batches(IMAGES)), model)
    for norm, (mean, var) in zip(norms, before, strict=True):
        norm.running_mean.copy_(mean.lerp(norm.running_mean, config["share"]))
        norm.running_var.copy_(var.lerp(norm.running_var, config["share"]))
    model.eval()
    return _said(task, problem, start, {name: problem.predict(model, rows) for name, rows in measured.items()})
