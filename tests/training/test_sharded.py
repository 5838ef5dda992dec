"""FSDP2: two ranks that hold half of the model each do what one process does."""

import json

import numpy as np
import pytest
from test_distributed import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for ranks in (1, 2):
        launch(folder, ranks, "sharded_script.py")
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("name", ["film", "lora"])
def test_a_sharded_run_is_one_process_on_the_joined_batch(results, name):
    one, two = results[f"{name}-1"], results[f"{name}-2"]
    assert one["calls"] == two["calls"] and one["passes"] == two["passes"]
    assert one["passes"]["observe"] >= 7 and len(one["scores"]) == len(two["scores"]) >= 7
    assert np.allclose(one["scores"], two["scores"], atol=1e-4)
    selections = [[score for score in run["selections"] if score is not None] for run in (one, two)]
    assert len(selections[0]) >= 3 and np.allclose(*selections, atol=1e-4)
    assert np.ptp(one["phi"]) > 1e-3 and np.allclose(one["phi"], two["phi"], atol=1e-3)
    assert one["model"] == two["model"]


def test_a_sharded_run_that_was_interrupted_ends_with_the_same_bits(results):
    whole, resumed = results["saved-2"], results["resumed-2"]
    assert whole == resumed
