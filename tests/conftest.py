"""Every test on one thread, without the Hub, from the same random state, and none silences the next one."""

import logging
import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_state():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_log_level():
    """Scripts and benchmarks set it for the whole process."""
    logger = logging.getLogger("metricopt_hf")
    before = logger.level
    yield
    logger.setLevel(before)
