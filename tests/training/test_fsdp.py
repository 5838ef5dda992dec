"""FSDP2 through accelerate: two ranks on a CPU that is taken for a GPU, and one process on a GPU where there is one."""

import json

import numpy as np
import pytest
import torch
from test_distributed import launch

pytestmark = pytest.mark.slow

SCRIPT = "fsdp_script.py"


def read(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    launch(folder, 1, SCRIPT, ["plain"])
    launch(folder, 2, SCRIPT, ["cpu"])
    return read(folder)


def check_same(one, other, atol):
    """Up to the order of floating-point sums."""
    assert one["calls"] == other["calls"] and one["passes"] == other["passes"]
    assert len(one["scores"]) == len(other["scores"]) >= 7 and np.allclose(one["scores"], other["scores"], atol=atol)
    selections = [[score for score in run["selections"] if score is not None] for run in (one, other)]
    assert len(selections[0]) >= 3 and np.allclose(*selections, atol=atol)
    assert np.ptp(one["phi"]) > 1e-3 and np.allclose(one["phi"], other["phi"], atol=atol)
    assert one["model"] == other["model"]


@pytest.mark.parametrize(
    ("plain", "sharded"), [("film", "film"), ("lora", "lora"), ("film", "accumulated"), ("film", "launched")]
)
def test_two_ranks_are_one_process_on_the_joined_batch(results, plain, sharded):
    check_same(results[f"{plain}-1"], results[f"{sharded}-2"], atol=1e-5)


@pytest.mark.parametrize(("name", "step"), [("full", 2), ("full", 6), ("parts", 2), ("adapter", 6)])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(results, name, step):
    assert results[f"{name}_whole-2"] == results[f"{name}_from_{step}-2"]


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp_gpu")
    launch(folder, 1, SCRIPT, ["cuda"], devices=None)
    return read(folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_one_process_on_a_gpu(gpu_results):
    for name in ("film", "launched"):
        check_same(gpu_results["plain-1"], gpu_results[f"{name}-1"], atol=1e-3)
    for name in ("full", "parts"):
        check_same(gpu_results[f"{name}_whole-1"], gpu_results[f"{name}_from_6-1"], atol=1e-3)
