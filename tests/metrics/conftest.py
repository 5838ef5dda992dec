"""The shipped `evaluate` modules, loaded."""

import sys

import evaluate
import numpy as np
import pytest
from metric_names import NAMES

from metricopt_hf.metrics import path


def forget_loaded_modules():
    """`evaluate` imports its copies of scripts from a package that stays bound to the first cache it was used with."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """Every module by name, loaded from its path. The caches are this run's own, so that parallel runs are apart."""
    cache = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache / "modules")
        patch.setattr(sys, "path", [*sys.path])
        forget_loaded_modules()
        # In memory: a file's lock outlives an error in `_compute`, and the next call would wait a second for it.
        yield {name: evaluate.load(path(name), cache_dir=str(cache), keep_in_memory=True) for name in NAMES}
        forget_loaded_modules()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
