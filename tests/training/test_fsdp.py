"""FSDP2 through accelerate: two ranks on a CPU that is taken for a GPU, and one process on a GPU where there is one."""

import pytest
import torch
from test_distributed import launch

pytestmark = pytest.mark.slow


def test_two_ranks_that_hold_half_of_the_model_each(tmp_path):
    """The sharded model is linearised; what is saved is whole; an interrupted run ends with the same bits."""
    launch(tmp_path, 2, "fsdp_script.py", ["cpu"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_one_process_on_a_gpu(tmp_path):
    launch(tmp_path, 1, "fsdp_script.py", ["cuda"], devices=None)
