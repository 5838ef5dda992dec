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
    own = [str(folder) for folder in (HERE.parent, HERE.parent / "linear", HERE.parents[1])]
    paths = os.pathsep.join([*own, os.environ.get("PYTHONPATH", "")])
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
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("name", ["predictions", "scores", "batchwise", "blended"])
def test_two_ranks_are_one_process(results, name):
    """Up to the order of floating-point sums, on which a step may turn where values are nearly level."""
    one, two = results[f"{name}-1"], results[f"{name}-2"]
    assert one["ledger"] == two["ledger"] and one["kind"] == two["kind"] and len(one["values"]) == 4
    assert np.allclose(one["values"], two["values"], atol=1e-3)
    assert np.allclose(one["phi"], two["phi"], atol=1e-2)


@pytest.mark.parametrize("step", [2, 4])
def test_an_interrupted_run_of_two_ranks_ends_with_the_same_bits(results, step):
    assert results["whole-2"] == results[f"resumed{step}-2"]
