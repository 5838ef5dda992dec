"""The black box misbehaves: nothing is lost, everything is counted and said."""

import random
import threading

import numpy as np
import pytest
import torch
from helpers import Texts, assert_equal_weights, tiny_bert, true_class_probability, weights
from runs import bert_trainer, faulty_trainer, text_trainer

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


def exits(prediction):
    raise SystemExit(3)


FAULTS = {
    "raises": (raises, "service is down"),
    "exits": (exits, "SystemExit"),
    "nan": (lambda p: float("nan"), "nan"),
    "string": (lambda p: "0.5", "one number"),
    "no key": (lambda p: {"a": 1.0, "b": 2.0}, "none of which"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_first_call_stops_the_run_and_a_later_one_drops_an_observation(tmp_path, fault, caplog):
    function, message = FAULTS[fault]
    trainer = boxed(tmp_path, Box(function, {0}))
    with pytest.raises(MetricError, match=message) as caught:
        trainer.train()
    assert "before training" in str(caught.value) and trainer.state.global_step == 0
    box = Box(function, {9, 15, 16})
    trainer = boxed(tmp_path, box, max_steps=2, metric_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.result.failed_calls >= 2
    assert message in caplog.text
    assert box.calls == sum(trainer.ledger.calls.values())  # a call that failed was made


@pytest.mark.parametrize("observe", ["scores", "predictions"])
def test_after_many_in_a_row_no_further_metric_step_is_made_and_the_start_comes_out(tmp_path, caplog, observe):
    box = Box(raises, set(range(9, 10000)))
    trainer = boxed(tmp_path, box, observe=observe)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.result.ended and "No further metric step" in caplog.text
    assert trainer.result.chosen.kind == "start"
    assert_equal_weights(before, weights(trainer.model))


@pytest.mark.parametrize(("faulty", "ends"), [({4}, False), (set(range(4, 100)), True)], ids=["once", "always"])
def test_a_fault_at_the_very_start_of_the_phase(tmp_path, faulty, ends):
    """Of calls 0 to 3 three try other orders of the rows."""
    box = Box(raises, faulty)
    trainer = text_trainer(tmp_path, metric_for_best_model="score", trainer_kwargs={"compute_metrics": box})
    trainer.train()
    assert trainer.state.global_step == 8 and bool(trainer.result.ended) is ends
    if ends:
        assert trainer.result.ended == "the metric failed 3 times at its start"
        assert "nan at the start" in str(trainer.result)


def test_numpy_and_torch_scalars_are_numbers(tmp_path):
    kinds = [np.float32, np.float64, torch.tensor, lambda x: {"score": torch.tensor([x])}, float]

    def metric(prediction):
        metric.calls += 1
        return kinds[metric.calls % len(kinds)](true_class_probability(prediction))

    metric.calls = 0
    trainer = faulty_trainer(tmp_path, metric, max_steps=2, metric_steps=2)
    trainer.train()
    assert trainer.result.failed_calls == 0


def test_a_call_beyond_the_timeout_is_abandoned_and_none_is_made_before_it_is_back(tmp_path, caplog):
    may_end = threading.Event()
    box = Box(lambda prediction: may_end.wait() and 0.5, {9})
    trainer = boxed(tmp_path, box, timeout=3.0, max_steps=2, metric_steps=2)
    trainer.train()
    assert "longer than metric_timeout" in caplog.text and box.calls == 10
    assert trainer.result.failed_calls >= 2  # that one, and all after it, at once
    may_end.set()


def test_what_the_metric_does_to_the_world_does_not_reach_the_training(tmp_path):
    """It prints, changes its inputs, reseeds, and switches autocast, default device and dtype; the run is the same."""

    def rude(prediction):
        value = true_class_probability(prediction)
        prediction.predictions[...] = 0
        prediction.label_ids[...] = 0
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        return value

    polite, other = (
        bert_trainer(tmp_path, metric=metric, max_steps=2, metric_steps=2) for metric in (true_class_probability, rude)
    )
    for trainer in (polite, other):
        trainer.train()
    assert not torch.is_autocast_enabled("cpu") and torch.get_default_device().type == "cpu"
    assert_equal_weights(weights(polite.model), weights(other.model))
    assert polite.result.curve == other.result.curve


@pytest.mark.parametrize("value", [1e6, 1e29])
def test_one_odd_selection_is_not_what_is_kept_unless_it_comes_out_again(tmp_path, value):
    """Asked again, the metric answers as usual; a gain that comes out again is true, however great."""
    for again in (False, True):
        seen = []

        def metric(prediction, again=again, seen=seen):
            usual = true_class_probability(prediction)
            if len(prediction.label_ids) != 33:  # the selection set's alone
                return usual
            seen.append(prediction.predictions.tobytes())
            odd = len(seen) == 3 or again and len(seen) > 3 and seen[-1] == seen[2]
            return value if odd else usual

        trainer = bert_trainer(tmp_path, metric=metric, selection_dataset=Texts(33, seed=4), guide="pairs")
        trainer.train()
        assert (trainer.result.best_score == value) is again


def test_a_gain_of_a_metric_that_stood_still_is_kept(tmp_path):
    """The report e1: the model says other classes to every row, until a bias is tuned."""
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias[1] -= 1.0

    def said(prediction):
        return {"score": float((prediction.predictions.argmax(-1) == 1).mean())}

    given = {"compute_metrics": said}
    kwargs = {"metric_for_best_model": "score", "learning_rate": 0.0}
    trainer = text_trainer(tmp_path, model=model, trainer_kwargs=given, **kwargs)
    trainer.train()
    assert trainer.result.start.score == 0.0 and trainer.result.best_score == 1.0
