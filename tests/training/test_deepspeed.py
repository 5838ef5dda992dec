"""DeepSpeed's ZeRO-1 and 2 through accelerate: two ranks on the CPU."""

import pytest
from test_distributed import launch

pytest.importorskip("deepspeed", reason="needs deepspeed, which no extra installs")
pytestmark = pytest.mark.slow


def test_two_ranks_that_share_out_the_optimizer(tmp_path, monkeypatch):
    """Scores and phi are DDP's; the tuned weights are saved; an interrupted run ends with the same bits."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch(tmp_path, 2, "deepspeed_script.py")
