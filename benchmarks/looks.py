"""Evaluators of a problem's splits, for methods that have no trainer of ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from metricopt_hf import Ledger, Metric, PhiSpace
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator

from .problem import Problem, Rows, Task, inputs_of, label_ids_of

CACHE_BYTES = 2e9  # as the trainer has it
MOVED = 0.1  # by which phi is moved to find out what depends on it


def frozen_phi(problem: Problem) -> PhiSpace:
    """phi on a copy of the model, in eval mode, whose parameters need no gradient."""
    model = copy.deepcopy(problem.model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    phi = problem.phi(model)
    phi.reset()
    return phi


@contextmanager
def moved(phi: PhiSpace) -> Iterator[None]:
    """Inside, phi is another one."""
    with phi.restored():
        phi.write(phi.read() + MOVED * torch.randn(phi.dim, generator=torch.Generator().manual_seed(0)))
        yield


def evaluator(task: Task, problem: Problem, phi: PhiSpace, rows: Rows, ledger: Ledger) -> Evaluator:
    """Of the metric on some rows, with the frozen prefix cached, as the trainer's own evaluators have it."""

    def predict(batch: dict) -> BatchOutput:
        return BatchOutput(phi.model(**inputs_of(batch))["logits"], label_ids_of(batch))

    metric = Metric(task.metric, task.metric_name, task.greater_is_better)
    made = Evaluator(phi, predict, partial(rows.batches, problem.eval_batch), metric, ledger, CACHE_BYTES)
    made.freeze(partial(moved, phi))
    return made
