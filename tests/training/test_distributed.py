"""Two gloo ranks: one script with all asserts, and its results against one rank's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def launch(folder, ranks, script="distributed_script.py", arguments=(), devices=""):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    # the helpers of the tests, the library, and where else packages are
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    done = subprocess.run(
        [*command, str(HERE / script), str(folder), *arguments],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert f"all asserts held on {ranks} ranks" in done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        launch(folder, ranks)
    return folder


def load(folder, name, ranks):
    return json.loads((folder / f"{name}-{ranks}.json").read_text())


@pytest.mark.parametrize("name", ["two_phases", "metric_phase_alone", "gradient_pca", "bf16"])
def test_two_ranks_make_the_same_calls_as_one(results, name):
    one, two = load(results, name, 1), load(results, name, 2)
    assert one["calls"] == two["calls"]
    assert len(one["scores"]) == len(two["scores"]) == 36


def test_two_ranks_are_one_rank_on_the_joined_batch(results):
    """Up to the order of floating-point sums; frozen and in eval mode, no dropout makes a difference."""
    one, two = load(results, "metric_phase_alone", 1), load(results, "metric_phase_alone", 2)
    assert np.allclose(one["scores"], two["scores"], atol=1e-4)
    assert np.allclose(one["phi"], two["phi"], atol=1e-4)
