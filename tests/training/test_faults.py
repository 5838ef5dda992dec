"""The black box misbehaves: nothing is lost, everything is counted and said."""

import random
import threading

import numpy as np
import pytest
import torch
from helpers import assert_equal_weights, true_class_probability, weights
from runs import faulty_trainer

from metricopt_hf import Metric, MetricError


class Box:
    """The mean probability of the right class, except on the calls in `faulty`, which do `fault`."""

    def __init__(self, fault, faulty):
        self.fault, self.faulty, self.calls = fault, faulty, 0

    def __call__(self, prediction):
        self.calls += 1
        if self.calls - 1 in self.faulty:
            return self.fault(prediction)
        return {"score": true_class_probability(prediction), "other": 0.0}


def boxed(folder, box, timeout=None, **kwargs):
    return faulty_trainer(folder, Metric(box, "score", timeout=timeout), **kwargs)


def raises(prediction):
    raise RuntimeError("the service is down")


FAULTS = {
    "raises": (raises, "service is down"),
    "nan": (lambda p: float("nan"), "nan"),
    "inf": (lambda p: np.float32("inf"), "inf"),
    "string": (lambda p: "0.5", "one number"),
    "no key": (lambda p: {"a": 1.0, "b": 2.0}, "none of which"),
    "none": (lambda p: None, "one number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_call_s_fault_stops_the_run_before_training(tmp_path, fault):
    function, message = FAULTS[fault]
    trainer = boxed(tmp_path, Box(function, {0}))
    with pytest.raises(MetricError, match=message) as caught:
        trainer.train()
    assert "before training" in str(caught.value)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_later_fault_drops_the_observation_and_is_counted(tmp_path, fault, caplog):
    function, message = FAULTS[fault]
    box = Box(function, {3, 8, 9})
    trainer = boxed(tmp_path, box, logging_steps=12)
    trainer.train()
    assert trainer.result.failed_calls == 3
    assert message in caplog.text
    calls = trainer.ledger.calls
    assert calls["observe"] == 24 and box.calls == sum(calls.values())  # a call that failed was made
    failed_observations = 24 - len(trainer.observations)
    assert 1 <= failed_observations <= 3
    assert trainer.phase.guide.off is None
    assert trainer.state.log_history[-2]["metricopt/failed_calls"] == 3


def test_after_many_in_a_row_guidance_is_switched_off_and_training_goes_on(tmp_path, caplog):
    trainer = boxed(tmp_path, Box(raises, set(range(1, 1000))), max_failures=5)
    trainer.train()
    assert trainer.state.global_step == 12
    assert "switched off" in caplog.text
    assert trainer.phase.guide.direction(trainer.result.last_phi).reason.startswith("switched off: the metric failed")
    assert trainer.ledger.calls["observe"] < 12  # not called on and on

    loss_only = faulty_trainer(tmp_path, true_class_probability, value_weight=0, metric_call_budget=0)
    loss_only.train()
    assert torch.equal(loss_only.result.last_phi, trainer.result.last_phi)


def test_numpy_and_torch_scalars_are_numbers(tmp_path):
    kinds = [np.float32, np.float64, torch.tensor, lambda x: {"score": torch.tensor([x])}, float]

    def metric(prediction):
        metric.calls += 1
        return kinds[metric.calls % len(kinds)](true_class_probability(prediction))

    metric.calls = 0
    trainer = faulty_trainer(tmp_path, metric)
    trainer.train()
    assert trainer.result.failed_calls == 0 and len(trainer.observations) == 24


def test_a_value_far_outside_all_earlier_ones_is_dropped(tmp_path, caplog):
    trainer = boxed(tmp_path, Box(lambda p: 1e6, {25, 26}), metric_call_budget=32, max_steps=16)
    trainer.train()
    assert trainer.result.failed_calls == 2
    assert "far outside" in caplog.text
    assert max(o.score for o in trainer.observations) < 1


def test_a_call_beyond_the_timeout_is_abandoned_and_none_is_made_before_it_is_back(tmp_path, caplog):
    may_end = threading.Event()
    box = Box(lambda prediction: may_end.wait() and 0.5, {5})
    trainer = boxed(tmp_path, box, timeout=3.0, max_failures=100)
    trainer.train()
    assert "longer than metric_timeout" in caplog.text
    assert trainer.result.failed_calls >= 2  # that one, and all after it, at once
    assert box.calls == 6
    may_end.set()
    trainer.metric._abandoned.join()
    trainer.phase.evaluator.evaluate("offline")  # it is back: calls work again
    assert box.calls == 7


def test_what_the_metric_does_to_the_world_does_not_reach_the_training(tmp_path):
    """It prints, changes its inputs, and reseeds every generator; the run is the same as without."""

    def rude(prediction):
        value = true_class_probability(prediction)
        print("hello from the metric")
        prediction.predictions[...] = 0
        prediction.label_ids[...] = 0
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return value

    polite, other = faulty_trainer(tmp_path, true_class_probability), faulty_trainer(tmp_path, rude)
    polite.train()
    other.train()
    assert_equal_weights(weights(polite.model), weights(other.model))
    assert [o.score for o in polite.observations] == [o.score for o in other.observations]


def test_a_selection_that_fails_costs_a_candidate_not_the_run(tmp_path):
    trainer = boxed(tmp_path, Box(raises, {1}))  # call 0 is the check, then it selects
    trainer.train()
    assert trainer.result.curve[0]["selection"] is None
    assert trainer.result.best_step > 0
