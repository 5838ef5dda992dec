"""Together: several phi in one pass are what they are one by one, or they are computed one by one."""

from contextlib import contextmanager
from itertools import cycle

import numpy as np
import pytest
import timm
import torch
from helpers import Texts, tiny_bert, true_class_probability
from torch import nn
from torch.utils.data import DataLoader

from metricopt_hf import Ledger, Metric
from metricopt_hf.evaluation import evaluator as evaluators
from metricopt_hf.evaluation import together
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator
from metricopt_hf.phi import FiLM


@pytest.fixture
def clock(monkeypatch):
    """As on an accelerator where it is quicker: seconds together, and one by one."""
    seconds, turns = [1.0, 2.0], cycle((0, 1))
    monkeypatch.setattr(evaluators, "worthwhile", lambda device: True)
    monkeypatch.setattr(together, "_timed", lambda work, points: (seconds[next(turns)], work()))
    return seconds


class Small(nn.Module):
    """A frozen stem, then phi."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, input_ids):
        return self.head(torch.relu(self.norm(torch.relu(self.stem(input_ids.float())))))


class Asks(Small):
    """Asks for the value of a number that depends on phi."""

    def forward(self, input_ids):
        logits = super().forward(input_ids)
        return logits if float(logits.sum()) > -1e9 else -logits


class Remembers(Small):
    """What it answers depends on what it was asked for before."""

    seen = None

    def forward(self, input_ids):
        logits = super().forward(input_ids)
        self.seen = logits.mean() if self.seen is None else 0.5 * self.seen + logits.mean()
        return logits + self.seen


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"input_ids": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), "labels": i % 3}


class Setting:
    def __init__(self, model, data=None):
        self.phi, self.passes, data = FiLM(model.eval()), 0, data or Texts(10)
        device = self.phi.read().device

        def predict(batch):
            self.passes += 1
            output = model(batch["input_ids"].to(device))
            return BatchOutput(getattr(output, "logits", output), batch["labels"].to(device))

        metric = Metric(true_class_probability, "probability", True)
        self.evaluator = Evaluator(
            self.phi, predict, lambda: iter(DataLoader(data, 4)), metric, Ledger(), max_bytes=1e9
        )
        generator = torch.Generator().manual_seed(5)
        self.points = self.phi.read() + (0.2 * torch.randn(7, self.phi.dim, generator=generator)).to(device)

    def observe(self):
        return self.evaluator.evaluate_many(self.points, "observe", predictions=True)

    def freeze(self):
        @contextmanager
        def moved():
            with self.phi.restored():
                self.phi.write(self.points[0])
                yield

        self.evaluator.freeze(moved)
        self.evaluator.predictions()  # what can be kept is kept

    @property
    def works(self):
        return self.evaluator._data._many._works


MODELS = {
    "small": lambda device="cpu": Setting(Small().to(device)),
    "bert": lambda device="cpu": Setting(tiny_bert().to(device)),
    "cnn": lambda device="cpu": Setting(timm.create_model("test_resnet", num_classes=3).to(device), Images()),
}


def assert_same(predictions, expected):
    for one, other in zip(predictions, expected, strict=True):
        assert np.allclose(one.predictions, other.predictions, atol=1e-4)
        assert np.array_equal(one.label_ids, other.label_ids)


@pytest.mark.parametrize("name", MODELS)
def test_several_points_at_once_are_what_they_are_one_by_one(name, clock, monkeypatch):
    monkeypatch.setattr(together, "AT_ONCE", 3)
    setting = MODELS[name]()
    one_by_one = setting.observe()
    setting.freeze()
    before = setting.phi.read()
    setting.observe()  # tries it
    setting.passes = 0
    made = setting.observe()
    batches = len(setting.evaluator._data._kept)
    assert setting.works and setting.passes == 3 * batches  # 3 points, 3, and the last one
    assert torch.equal(setting.phi.read(), before)
    assert np.allclose(made.values, one_by_one.values, atol=1e-5) and np.ptp(made.values) > 1e-4
    assert_same(made.predictions, one_by_one.predictions)
    assert_same(setting.evaluator.predict_many(setting.points), one_by_one.predictions)
    assert setting.evaluator.ledger.passes["observe"] == setting.evaluator.ledger.calls["observe"] == 21


class HalfInside(Small):
    """Computes in half precision, and hands its logits over in full, as under autocast."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = self.norm.bfloat16(), self.head.bfloat16()

    def forward(self, input_ids):
        hidden = torch.relu(self.norm(torch.relu(self.stem(input_ids.float())).bfloat16()))
        return self.head(hidden).float()


class Astray(Small):
    """What it answers is off by one part in a thousand where several points are computed at once."""

    def forward(self, input_ids):
        logits = super().forward(input_ids)
        return logits * (1.001 if torch._C._functorch.is_batchedtensor(logits) else 1)


def test_models_are_held_to_the_precision_that_they_compute_in(clock):
    for model, works in ((HalfInside, True), (Astray, False)):
        setting = Setting(model())
        setting.freeze()
        setting.observe()
        assert setting.works is works, model


@pytest.mark.parametrize("model", [Asks, Remembers])
def test_a_model_that_cannot_be_computed_so_is_computed_one_by_one(model, clock):
    setting = Setting(model())
    setting.freeze()
    made = setting.observe()
    assert setting.works is not True
    assert np.isfinite(made.values).all() and np.ptp(made.values) > 1e-4


def test_where_it_is_slower_it_is_left(clock):
    clock[:] = [2.0, 1.0]
    setting = MODELS["small"]()
    setting.freeze()
    setting.observe()
    assert setting.works is False
    setting.passes = 0
    setting.observe()
    assert setting.passes == 7 * 3


def test_without_room_for_several_it_goes_on_one_by_one(clock, monkeypatch):
    setting = MODELS["small"]()
    one_by_one = setting.observe()
    setting.freeze()
    setting.observe()

    def full(points):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(setting.evaluator._data._many, "at", full)
    assert_same(setting.observe().predictions, one_by_one.predictions)
    assert setting.works is False


def test_on_a_cpu_it_is_not_tried():
    setting = MODELS["small"]()
    setting.freeze()
    setting.observe()
    assert setting.works is None
    assert not together.worthwhile(torch.device("cpu")) and together.worthwhile(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_kept_and_together_are_what_is_computed(name):
    setting = MODELS[name](device="cuda")
    one_by_one = setting.observe()
    setting.freeze()
    for _ in range(2):  # tried, and then done
        assert_same(setting.observe().predictions, one_by_one.predictions)
    assert setting.works is not None and len(setting.evaluator._data._prefix._batches) > 0
