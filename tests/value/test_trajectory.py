"""The trajectory: observations in, columns out."""

import torch

from metricopt_hf.value.trajectory import Trajectory


def test_what_is_appended_is_read_as_columns():
    trajectory = Trajectory()
    trajectory.extend(torch.zeros(1, 3), torch.tensor([0.25]), 0, 0.5)
    trajectory.extend(torch.ones(2, 3, dtype=torch.float64), torch.tensor([0.75, 1.0]), 2, 0.25)
    assert len(trajectory) == 3 and trajectory.z.shape == (3, 3) and trajectory.z.dtype == torch.float32
    assert trajectory.z[-1].tolist() == [1.0] * 3 and trajectory.scores.tolist() == [0.25, 0.75, 1.0]
    assert trajectory.steps.tolist() == [0, 2, 2] and trajectory.seconds.tolist() == [0.5, 0.25, 0.25]
    trajectory.extend(torch.ones(1, 3), torch.tensor([2.0]), 3, 0.25)  # behind a look at it
    assert trajectory.scores.tolist() == [0.25, 0.75, 1.0, 2.0]


def test_it_can_be_empty():
    trajectory = Trajectory()
    assert len(trajectory) == trajectory.z.numel() == trajectory.scores.numel() == trajectory.steps.numel() == 0


def test_its_rows_give_the_same_observations_and_extending_those_leaves_it_alone():
    first = Trajectory()
    first.extend(torch.randn(3, 4), torch.randn(3), 1, 0.1)
    second = Trajectory(first.rows)
    assert torch.equal(second.rows, first.rows)
    second.extend(torch.randn(1, 4), torch.randn(1), 2, 0.1)
    assert len(second) == 4 and len(first) == 3
