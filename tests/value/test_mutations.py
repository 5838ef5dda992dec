"""Files of a value function with bytes changed: refused in words, never a raw error, never the end of the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_serialization import shared

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COUNT = int(os.environ.get("METRICOPT_MUTATIONS", 150))  # of each kind of file


@pytest.mark.parametrize("vouched", ["damaged", "vouched"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_mutated_files_are_refused(tmp_path, name, vouched):
    shared().save_pretrained(tmp_path)
    path = os.pathsep.join([str(ROOT), str(HERE.parent)])
    command = [sys.executable, str(HERE / "mutations.py"), str(tmp_path), name, "0", str(COUNT), vouched]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    last = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, f"seed {last} ended the process ({done.returncode}): {done.stderr[-1000:]}"
    outcomes = json.loads(last)
    assert set(outcomes) <= {"read", "refused"} and sum(outcomes.values()) == COUNT, outcomes
    if vouched == "damaged" and name != "config.json":
        assert outcomes.get("read", 0) <= COUNT // 10  # a byte may be set to what it was
    print(name, vouched, outcomes)
