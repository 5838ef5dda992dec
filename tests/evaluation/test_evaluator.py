"""Evaluator: the whole set, in order, once; and nothing around it is disturbed."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from metricopt_hf.errors import ConfigurationError, MetricError
from metricopt_hf.evaluation import data
from metricopt_hf.evaluation import evaluator as evaluator_module
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator, undisturbed
from metricopt_hf.evaluation.ledger import Ledger
from metricopt_hf.evaluation.metric import Metric
from metricopt_hf.phi import FiLM, Subset

SIZE, BATCH = 11, 4


class Model(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.LayerNorm(6), nn.Linear(6, 3))


class Examples(torch.utils.data.Dataset):
    def __init__(self, size=SIZE):
        generator = torch.Generator().manual_seed(0)
        self.x, self.labels = torch.randn(size, 5, generator=generator), torch.arange(size)
        self.read = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.read += 1
        return {"x": self.x[i], "labels": self.labels[i]}


class Seen:
    """A metric that remembers what it was given, and behaves badly on demand."""

    def __init__(self, misbehave=lambda: None):
        self.misbehave = misbehave

    def __call__(self, prediction):
        self.prediction = prediction
        self.misbehave()
        scores = np.concatenate([np.asarray(p).reshape(-1) for p in prediction.predictions])
        return float(scores @ np.arange(len(scores)))


def evaluator(
    metric=None, examples=None, max_bytes=1e9, concat=True, predict=None, model=None, phi=None, collate=None, **kwargs
):
    model = (phi.model if phi else Model()) if model is None else model
    examples = Examples() if examples is None else examples
    return Evaluator(
        phi or Subset(model, "4.bias"),
        predict or (lambda batch: BatchOutput(model(batch["x"]), batch["labels"])),
        data.InOrder(examples, BATCH, collate or torch.utils.data.default_collate),
        Metric(metric or Seen(), "seen"),
        Ledger(),
        max_bytes,
        concat,
        **kwargs,
    )


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def fail():
    raise ValueError("a metric's own mistake")


def reseed():
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    fail()


@pytest.mark.parametrize("misbehave", [lambda: None, fail, reseed], ids=["well-behaved", "raises", "reseeds"])
@pytest.mark.parametrize("max_bytes", [1e9, 0], ids=["kept", "streamed"])
def test_random_state_modes_and_weights_are_as_before(misbehave, max_bytes):
    taken = evaluator(Seen(misbehave), max_bytes=max_bytes)
    model = taken.phi.model.train()
    model[2].eval()  # a module of its own mind
    modes = [m.training for m in model.modules()]
    weights, states = {n: t.clone() for n, t in model.state_dict().items()}, random_states()
    if misbehave in (fail, reseed):
        with pytest.raises(MetricError, match="mistake"):
            taken.evaluate("observe")
    else:
        taken.evaluate("observe")
    assert random_states() == states
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())


def test_freezing_draws_no_random_numbers_either():
    taken = evaluator()
    states = random_states()
    taken.freeze(lambda: undisturbed(taken.phi.model))
    assert random_states() == states


def test_inside_there_is_eval_mode_and_no_gradient():
    model = Model().train()

    def predict(batch):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        return BatchOutput(model(batch["x"]), batch["labels"])

    evaluator(predict=predict, model=model).evaluate("observe")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("max_bytes", [1e9, 200, 0], ids=["kept", "too large to keep", "streamed"])
def test_the_metric_sees_every_example_once_and_in_order(max_bytes):
    metric, examples = Seen(), Examples()
    taken = evaluator(metric, examples, max_bytes)
    for _ in range(2):
        taken.evaluate("observe")
        seen = metric.prediction
        assert seen.label_ids.tolist() == list(range(SIZE))
        with torch.no_grad():
            expected = taken.phi.model.eval()(examples.x).numpy()
        assert isinstance(seen.predictions, np.ndarray)
        assert np.allclose(seen.predictions, expected, atol=1e-6)


def test_batches_are_collated_once_if_they_fit_into_memory():
    examples = Examples()
    taken = evaluator(examples=examples)
    for _ in range(3):
        taken.evaluate("observe")
    assert examples.read == SIZE

    examples = Examples()
    taken = evaluator(examples=examples, max_bytes=0)
    taken.evaluate("observe")
    before = examples.read
    taken.evaluate("observe")
    assert examples.read - before == SIZE


def test_a_collator_s_own_mapping_counts_against_the_memory_too():
    examples = Examples()
    collate = torch.utils.data.default_collate
    taken = evaluator(examples=examples, max_bytes=1, collate=lambda rows: BatchEncoding(collate(rows)))
    taken.evaluate("observe")
    before = examples.read
    taken.evaluate("observe")
    assert examples.read > before


def test_without_concatenation_the_metric_sees_a_list_of_batches():
    metric = Seen()
    evaluator(metric, concat=False).evaluate("observe")
    assert [len(batch) for batch in metric.prediction.predictions] == [4, 4, 3]
    assert np.concatenate(metric.prediction.label_ids).tolist() == list(range(SIZE))


def test_several_outputs_inputs_and_losses_reach_the_metric():
    metric, model = Seen(), Model()

    def predict(batch):
        logits = model(batch["x"]).bfloat16()  # numpy has none
        return BatchOutput((logits, logits[:, :2]), batch["labels"], batch["labels"].float(), batch["x"])

    evaluator(metric, predict=predict, model=model).evaluate("observe")
    seen = metric.prediction
    assert [p.shape for p in seen.predictions] == [(SIZE, 3), (SIZE, 2)]
    assert np.array_equal(seen.inputs, Examples().x.numpy())
    assert seen.losses.tolist() == list(range(SIZE))


def test_rows_of_different_length_are_padded_as_trainer_does():
    metric = Seen()

    def predict(batch):
        width = 2 + int(batch["labels"][0] > 0)
        return BatchOutput(torch.ones(len(batch["labels"]), width), batch["labels"])

    evaluator(metric, predict=predict).evaluate("observe")
    assert metric.prediction.predictions[0].tolist() == [1, 1, -100]


@pytest.mark.parametrize(
    "nothing",
    [{"examples": Examples(0)}, {"predict": lambda batch: BatchOutput(None, batch["labels"])}],
    ids=["no examples", "no logits"],
)
def test_nothing_to_predict_is_said(nothing):
    with pytest.raises(ConfigurationError, match="empty, or the model returns no logits"):
        evaluator(**nothing).evaluate("observe")


def test_calls_are_charged_with_their_forward_passes():
    taken = evaluator()
    taken.evaluate("observe")
    taken.evaluate("select")
    failing = evaluator(Seen(fail))
    with pytest.raises(MetricError):
        failing.evaluate("observe")
    assert taken.ledger.calls["observe"] == taken.ledger.calls["select"] == failing.ledger.calls["observe"] == 1
    assert 0 < taken.ledger.seconds["observe"] < 5


BATCH_BYTES = SIZE * (5 * 4 + 8)  # numbers and labels


@pytest.mark.parametrize(
    ("max_bytes", "replayed"),
    [(1e9, 3), (BATCH_BYTES + 100, 2), (BATCH_BYTES, 0), (0, 0)],
    ids=["all kept", "two batches' activations kept, in place of the inputs of one", "batches kept", "streamed"],
)
def test_with_the_rest_frozen_the_score_is_the_same_at_any_phi(monkeypatch, max_bytes, replayed):
    phi, reference = FiLM(Model()), FiLM(Model())
    reference.model.load_state_dict(phi.model.state_dict())
    reference.reset()
    frozen, plain = evaluator(max_bytes=max_bytes, phi=phi), evaluator(phi=reference)

    @contextmanager
    def moved():
        with phi.restored():
            phi.write(phi.read() + 0.1)
            yield

    computed, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda module, x: computed.append(module) or forward(module, x))
    frozen.freeze(moved)
    for _ in range(3):
        position = torch.randn(phi.dim)
        phi.write(position)
        reference.write(position)
        computed.clear()
        assert frozen.evaluate("observe") == pytest.approx(plain.evaluate("observe"), rel=1e-5)
    assert computed.count(phi.model[0]) == 3 - replayed
    for model in (phi.model, reference.model):
        nn.init.constant_(model[0].weight, 0.1)
    frozen.freeze(moved)  # once more
    assert frozen.evaluate("observe") == pytest.approx(plain.evaluate("observe"), rel=1e-5)


# ---- several ranks


def fake_ranks(monkeypatch, world_size):
    """`gather(rank)` makes the ranks exchange, one after the other: the last one to come has what all gave."""
    given = {}

    def gather(mine):
        given[len(given)] = list(mine)
        return [item for items in given.values() for item in items]

    monkeypatch.setattr(evaluator_module, "gather_object", gather)
    return given


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_batches_are_shared_among_the_ranks_and_all_run_equally_often(monkeypatch, world_size):
    given, runs = fake_ranks(monkeypatch, world_size), []
    model = Model().eval()
    for rank in range(world_size):
        called = []

        def predict(batch, called=called):
            called.append(batch)
            return BatchOutput(model(batch["x"]), batch["labels"])

        taken = evaluator(model=model, predict=predict, rank=rank, world_size=world_size)
        last = taken.predictions() if rank == world_size - 1 else list(taken.outputs())
        runs.append(len(called))
    assert set(runs) == {-(-3 // world_size)} and [len(own) for ((own, _),) in given.values()][:3] == {
        2: [2, 1], 3: [1, 1, 1], 5: [1, 1, 1]}[world_size]  # fmt: skip
    assert last.label_ids.tolist() == list(range(SIZE))
    assert np.allclose(last.predictions, evaluator(model=model).predictions().predictions, atol=1e-6)


def test_what_fails_on_one_rank_fails_on_all(monkeypatch):
    fake_ranks(monkeypatch, 2)

    def predict(batch):
        raise ValueError("no derivatives here")

    with pytest.raises(ValueError, match="no derivatives"):
        evaluator(predict=predict, rank=0, world_size=2).predictions()
    with pytest.raises(RuntimeError, match="On another rank: ValueError: no derivatives"):
        evaluator(rank=1, world_size=2).predictions()


def test_calls_are_shared_out_and_come_back_in_order(monkeypatch):
    fake_ranks(monkeypatch, 3)
    for rank in range(3):
        found = evaluator_module.shared_out(rank, 3, 7, lambda i: i * i)
    assert found == [i * i for i in range(7)]


def test_of_what_the_first_rank_answers_or_raises_all_have_the_same(monkeypatch):
    sent = {}

    def broadcast(outcome):
        outcome[:] = sent.setdefault("first", list(outcome))

    monkeypatch.setattr(evaluator_module, "broadcast_object_list", broadcast)
    answers = iter(range(9))
    assert [evaluator_module.agreed(rank, 2, lambda: next(answers)) for rank in range(2)] == [0, 0]
    sent.clear()
    for rank in range(2):
        with pytest.raises(MetricError, match="mistake"):
            evaluator_module.agreed(rank, 2, lambda: evaluator(Seen(fail)).evaluate("check"))
