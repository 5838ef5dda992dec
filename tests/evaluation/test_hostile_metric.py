"""Whatever a metric answers, raises or changes: a call ends in one finite number or in a MetricError."""

import os
import random
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from metricopt_hf.errors import MetricError, brief
from metricopt_hf.evaluation.answer import LARGEST_SCORE
from metricopt_hf.evaluation.metric import Metric, world_kept

PREDICTION = EvalPrediction(np.eye(3, dtype=np.float32), np.arange(3))


class Raises:
    """Everything that can be asked of it raises, and not even an Exception."""

    def _raise(self, *args, **kwargs):
        raise SystemExit("hostile")

    __array__ = __repr__ = __str__ = __eq__ = __float__ = __len__ = __bool__ = __iter__ = __getattr__ = _raise
    __hash__ = None


class RaisesInStr(Exception):
    def __str__(self):
        raise RuntimeError("no message")


class Key(str):
    """As a key of a dict it has the hash of the name that is looked for, and cannot be compared."""

    def __hash__(self):
        return hash("f1")

    def __eq__(self, other):
        raise RuntimeError("not comparable")


def raising(error):
    def metric(prediction):
        raise error

    return metric


ANSWERS = {
    "beyond float32": 1e39,
    "far beyond": -1e300,
    "just beyond": 1.01 * LARGEST_SCORE,
    "an int of 5,000 digits": 10**5000,
    "an int beyond int64": 10**25,
    "a sparse tensor": torch.eye(2).to_sparse(),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    "a quantised tensor": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "a meta tensor": torch.ones((), device="meta"),
    "a complex tensor": torch.tensor(0.5 + 1j),
    "a masked number": np.ma.masked,
    "a ragged list": [[1.0, 2.0], [3.0]],
    "an object that raises": Raises(),
    "a list of such": [Raises()],
    "a dict of such": {"f1": Raises()},
    "a key that raises": {Key("x"): 0.5, "y": 0.5},
    "a date": np.datetime64("2020-01-01"),
    "a huge list": list(range(10**6)),
    "a huge text": "x" * 10**7,
    "many keys": {str(i): 1.0 for i in range(10**5)},
    "a function": len,
    "a longdouble": np.longdouble("1e4000"),
}
ERRORS = {
    "exits": SystemExit(0),
    "exits in words": SystemExit("done"),
    "is done": GeneratorExit(),
    "stops": StopIteration(),
    "a message that raises": RaisesInStr(),
    "a message that raises hard": ValueError(Raises()),
    "a long message": ValueError("x" * 10**7),
    "a message that cannot be written": ValueError("\udc80"),
    "an argument": ValueError(10**5000),
}


@pytest.mark.parametrize("timeout", [None, 60, float("inf")])
@pytest.mark.parametrize("case", [*ANSWERS, *ERRORS])
def test_it_is_a_failed_call_with_a_short_message(case, timeout):
    function = raising(ERRORS[case]) if case in ERRORS else lambda p: ANSWERS[case]
    with pytest.raises(MetricError) as caught:
        Metric(function, "f1", timeout=timeout)(PREDICTION)
    message = str(caught.value)
    assert "'f1'" in message and len(message) < 1000 and message.encode()


def test_an_interrupt_by_its_user_goes_through():
    with pytest.raises(KeyboardInterrupt):
        Metric(raising(KeyboardInterrupt()), "f1")(PREDICTION)


@pytest.mark.parametrize("value", [LARGEST_SCORE, -LARGEST_SCORE, 3e-300, torch.tensor(0.1, dtype=torch.float64)])
def test_a_number_in_the_range_is_taken_as_it_is(value):
    assert Metric(lambda p: value, "f1")(PREDICTION) == float(value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: (a, a), lambda a: [[a]]])
def test_predictions_none_of_which_is_finite_are_a_failed_call(value, wrap):
    """A metric that counts hits goes on answering: the argmax of nan is 0."""
    broken = EvalPrediction(wrap(np.full((4, 3), value, np.float32)), np.zeros(4, int))
    with pytest.raises(MetricError, match="not finite .* not asked"):
        Metric(lambda p: 0.5, "f1")(broken)
    partly = np.full((4, 3), value, np.float32)
    partly[2] = 0
    assert Metric(lambda p: 0.5, "f1")(EvalPrediction(wrap(partly), np.zeros(4, int))) == 0.5


def change_dtype():
    torch.set_default_dtype(torch.float64)


def change_grad():
    torch.set_grad_enabled(not torch.is_grad_enabled())


def change_seeds():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


def change_filters():
    warnings.filterwarnings("error")
    warnings.simplefilter("always")


def change_flags():
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("medium")


def change_threads():
    torch.set_num_threads(torch.get_num_threads() + 1)


def change_numpy():
    np.seterr(all="raise")


def change_device():
    torch.set_default_device("meta")


def change_folder():
    os.chdir("/")


def world():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        list(warnings.filters),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        np.geterr(),
        os.getcwd(),
    )


CHANGES = (change_dtype, change_grad, change_seeds, change_filters, change_flags, change_threads, change_numpy)
CHANGES += (change_device,)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", [*CHANGES, change_folder])
def test_what_it_changes_of_the_world_is_put_back(change, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = world()

    def metric(prediction):
        change()
        assert world() != before
        return 1 / 0 if fails else 0.5

    try:
        Metric(metric, "f1")(PREDICTION)
    except MetricError as error:
        assert fails and "ZeroDivisionError" in str(error)
    after = world()
    with world_kept():  # so that a failure of this test leaves the next one alone
        torch.set_default_dtype(torch.float32)
    assert after == before


def test_keeping_the_world_costs_next_to_nothing():
    """Thousands of calls a run come, each of which should cost well under a millisecond."""

    def seconds(function):
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(20):
                function(PREDICTION)
            best = min(best, (time.perf_counter() - start) / 20)
        return best

    plain = seconds(lambda p: 0.5)
    assert seconds(Metric(lambda p: 0.5, "f1")) - plain < 1e-3  # 0.2 ms; the rest is room for a busy machine


def test_no_thread_is_left_behind():
    before = threading.active_count()
    for _ in range(20):
        Metric(lambda p: 0.5, "f1", timeout=float("inf"))(PREDICTION)
    assert threading.active_count() == before


def test_brief_shows_anything():
    assert brief(0.5) == "0.5" and brief("a\nb") == "'a\\nb'" and brief(ValueError("x\ny")) == "x y"
    assert brief(ValueError("\udc80")) == "\\udc80" and brief(Raises()).startswith("an Raises that cannot")
    assert len(brief("x" * 10**6)) < 400 and sys.getsizeof(brief({i: i for i in range(10**5)})) < 1000
