"""The trajectory: observations in, arrays out, and back."""

import time

import numpy as np
import pytest

from metricopt_hf.evaluation.trajectory import Observation, Trajectory


def observation(step, score=0.5, variance=0.1):
    return Observation(np.full(3, step, np.float32), score, variance, step, cost=0.25)


def test_it_reads_as_a_list_and_as_arrays():
    trajectory = Trajectory([observation(0, 0.25)])
    trajectory.extend([observation(2, 0.75), observation(2, 1.0)])
    assert len(trajectory) == 3 and trajectory[-1].score == 1.0 and [o.step for o in trajectory[:2]] == [0, 2]
    assert trajectory.z.shape == (3, 3) and trajectory.z.dtype == np.float32
    assert trajectory.scores.tolist() == [0.25, 0.75, 1.0]
    assert trajectory.steps.tolist() == [0, 2, 2] and trajectory.steps.dtype == np.int64
    assert trajectory.costs.tolist() == [0.25] * 3 and trajectory.variances.tolist() == [0.1] * 3


def test_the_last_round_is_what_was_taken_at_the_latest_step():
    trajectory = Trajectory([observation(0), observation(4, 0.1), observation(4, 0.2)])
    assert trajectory.last_round.scores.tolist() == [0.1, 0.2]


def test_it_can_be_empty():
    trajectory = Trajectory()
    assert len(trajectory) == len(trajectory.last_round) == 0
    assert trajectory.z.size == trajectory.scores.size == trajectory.steps.size == 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_its_state_gives_the_same_observations(count):
    first = Trajectory([observation(s, variance=float("nan") if s else 0.1) for s in range(count)])
    second = Trajectory.from_state_dict(first.state_dict())
    assert len(second) == count
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.z, b.z) and b.z.dtype == np.float32
        assert (a.score, a.step, a.cost) == (b.score, b.step, b.cost)
        assert type(b.step) is int
        assert a.variance == b.variance or np.isnan([a.variance, b.variance]).all()


def test_a_state_with_columns_of_unequal_length_is_refused():
    state = Trajectory([observation(0), observation(1)]).state_dict()
    with pytest.raises(ValueError):
        Trajectory.from_state_dict({**state, "scores": state["scores"][:1]})


def test_extending_a_choice_of_all_rows_leaves_the_first_as_it_is():
    trajectory = Trajectory([observation(i) for i in range(3)])
    chosen = trajectory.latest(3)
    chosen.extend([observation(9, 9.0)])
    trajectory.extend([observation(3, 3.0)])
    assert trajectory.steps.tolist() == [0, 1, 2, 3] and chosen.steps.tolist() == [0, 1, 2, 9]
    assert chosen[-1].z.tolist() == [9.0] * 3 and trajectory[-1].z.tolist() == [3.0] * 3


def test_a_choice_of_rows_is_a_trajectory():
    trajectory = Trajectory([observation(i, i / 4) for i in range(5)])
    chosen = trajectory.where(trajectory.scores > 0.5)
    assert chosen.steps.tolist() == [3, 4] and isinstance(chosen[0], Observation)
    assert [o.step for o in trajectory[::-2]] == [4, 2, 0]


def test_reading_sixteen_thousand_observations_takes_no_longer_than_a_few():
    """What is done at every round: extend, read the columns."""

    def seconds(count):
        trajectory = Trajectory([observation(i // 8, i % 7) for i in range(count)])
        best = float("inf")
        for step in range(20):
            start = time.perf_counter()
            trajectory.extend([observation(count + step) for i in range(8)])
            assert len(trajectory.last_round.scores) == 8 and trajectory.z.shape == (len(trajectory), 3)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(16_000) < seconds(160) + 0.01  # building all of them anew takes 0.06 s
