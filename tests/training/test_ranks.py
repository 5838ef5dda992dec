"""Two processes: one of them writes, and if one goes, the other says which and from where to resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metricopt_hf import RankError, ValueFunction
from metricopt_hf.training import checkpoint, ranks

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(folder, last_step):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(ROOT), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    script = [str(HERE / "ranks_script.py"), str(folder), str(last_step)]
    return subprocess.run(
        [*command, *script], cwd=HERE, env=environment, capture_output=True, text=True, timeout=500
    )


def test_with_a_checkpoint_at_every_step_one_rank_writes(tmp_path):
    done = launch(tmp_path, 0)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["should_save"] for rank in told] == [True, False]
    assert told[0]["written"] == 13 and told[1]["written"] == 0
    assert told[0]["calls"] == told[1]["calls"] and told[0]["calls"]["observe"] > 0
    for folder in (tmp_path, tmp_path / "checkpoint-12"):
        assert len(ValueFunction.from_pretrained(folder).observations) > 0
    checkpoint.check(tmp_path / "checkpoint-12")


def test_a_killed_rank_is_named_with_the_checkpoint_to_resume_from(tmp_path):
    done = launch(tmp_path, 5)
    assert done.returncode != 0
    # it is logged, and raised; torchrun may end the process in between
    told = [line for line in done.stderr.splitlines() if "has gone" in line]
    assert told and "Rank 1 of 2 has gone, so rank 0 cannot go on" in told[-1], done.stderr[-6000:]
    # the checkpoint of that step was not begun by all
    assert any(f"resume_from_checkpoint='{tmp_path / f'checkpoint-{step}'}'" in told[-1] for step in (4, 5)), told


def test_other_errors_are_as_they_are_and_one_process_needs_no_other(tmp_path):
    class Args:
        world_size, process_index, output_dir = 1, 0, str(tmp_path)

    with pytest.raises(RuntimeError, match="^gloo/transport$"), ranks.told_when_lost(Args):
        raise RuntimeError("gloo/transport")
    message = ranks._message([], Args, RuntimeError("closed"))
    assert "Another rank has gone" in message and "no checkpoint yet" in message
    assert issubclass(RankError, RuntimeError) and ranks._gone([("elsewhere", 1)]) == []
