"""Linearizer: predictions near phi without a pass, right in whichever way they were had, at the cost that is said."""

import logging
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import tiny_bert
from linear_models import BATCH, CASES, MLP, ROWS, accuracy, case, evaluator, linearizer, off, scattered, texts

from metricopt_hf.evaluation import evaluator as evaluators
from metricopt_hf.evaluation.evaluator import BatchOutput
from metricopt_hf.linear import cost as costs
from metricopt_hf.linear import linearizer as module
from metricopt_hf.linear.cost import DIFFERENCES, LARGEST, ROW_BY_ROW
from metricopt_hf.phi import FiLM

# In what they return they are like models that are linearised row by row
UNEXPECTED = (
    "batch-wise", "rows attend to rows", "reentrant", "tokens attend to tokens", "without gradients", "inference",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_predictions_near_phi_are_as_they_are_said_to_be(name, caplog):
    caplog.set_level(logging.INFO, "metricopt_hf")
    taken, way = case(name)
    before = {n: t.clone() for n, t in taken.phi.model.state_dict().items()}
    made = linearizer(taken)
    coordinates = made.coordinates(taken.predictions())
    assert made.way == way and coordinates.kind == ("jacobian" if way == ROW_BY_ROW else "random")
    assert torch.allclose(coordinates.basis.T @ coordinates.basis, torch.eye(coordinates.dim), atol=1e-5)
    linear = made.linearize(coordinates.basis, taken.predictions())
    assert off(taken, linear, coordinates) < (0.05 if way == ROW_BY_ROW else 0.2)
    assert linear.nbytes == made.cost(linear.centre, coordinates.dim).nbytes
    assert linear.num_rows == ROWS and linear.unsplittable is None
    assert all(torch.equal(before[n], t) for n, t in taken.phi.model.state_dict().items())
    after_all = name in UNEXPECTED
    told = "Outputs are linearised {}, not row by row" if after_all else "predictions: {}."
    assert told.format(made.cost(linear.centre)) in caplog.text and ("not row by row" in caplog.text) == after_all


@pytest.mark.parametrize("name", ["mlp", "bert", "lora", "timm", "tokens"])
def test_the_prefix_is_computed_once(name):
    taken, _ = case(name)
    frozen = next(m for n, m in taken.phi.model.named_modules() if n and not list(m.children()))
    calls, forward = Counter(), frozen.forward
    frozen.forward = lambda *args, **kwargs: calls.update("a") or forward(*args, **kwargs)

    @contextmanager
    def moved():
        with taken.phi.restored():
            taken.phi.write(taken.phi.read() + 0.1)
            yield

    taken.freeze(moved)
    made = linearizer(taken)
    prediction, coordinates = taken.predictions(), made.coordinates(taken.predictions())
    plain = linearizer(case(name)[0]).linearize(coordinates.basis, prediction)
    linear = made.linearize(coordinates.basis, prediction)
    assert off(taken, linear, coordinates) < 0.2
    assert torch.allclose(linear.leaves[0].jacobian, plain.leaves[0].jacobian, atol=1e-4)
    assert calls
    calls.clear()
    made.linearize(coordinates.basis, prediction)
    assert not calls


def counted(model, monkeypatch):
    """Forward and backward passes of batches from here on."""
    seen, grad = Counter(), torch.autograd.grad
    model.register_forward_hook(lambda *_: seen.update(["forward"]))

    def counting(*args, **kwargs):
        seen.update(["backward"])
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    return seen


@pytest.mark.parametrize("name", CASES)
def test_it_takes_as_many_passes_as_it_says(name, monkeypatch):
    taken, _ = case(name)
    made = linearizer(taken)
    coordinates, prediction = made.coordinates(taken.predictions()), taken.predictions()
    seen, batches = counted(taken.phi.model, monkeypatch), len(taken.batch_sizes)
    made.linearize(coordinates.basis, prediction)
    if made.way == ROW_BY_ROW:  # the derivatives by which coordinates were found are used once more
        assert not seen
        made.linearize(coordinates.basis, prediction)
    assert seen["forward"] + seen["backward"] == batches * made.cost(prediction, coordinates.dim).passes


def test_of_many_logits_the_largest_of_each_row_move(monkeypatch):
    phi = scattered(FiLM(MLP(1000).eval()))
    taken = evaluator(phi)
    made = linearizer(taken)
    coordinates, prediction = made.coordinates(taken.predictions()), taken.predictions()
    made.linearize(coordinates.basis, prediction)
    seen = counted(phi.model, monkeypatch)
    linear = made.linearize(coordinates.basis, prediction)
    assert seen == {"forward": 3, "backward": 15} and made.cost(prediction).passes == 6 and made.way == LARGEST
    (leaf,) = linear.leaves.values()
    assert leaf.jacobian.shape == (ROWS, 5, coordinates.dim) and linear.nbytes == ROWS * 5 * 4 * coordinates.dim
    largest = np.sort(np.argsort(-prediction.predictions, 1)[:, :5], 1)
    assert np.array_equal(leaf.columns.numpy(), largest)
    assert off(taken, linear, coordinates, columns=largest) < 0.05
    still = linear.at(torch.ones(coordinates.dim)).predictions == prediction.predictions
    assert (~still).sum(1).max() == 5
    half = linear.rows(np.arange(0, ROWS, 2)).at(torch.ones(coordinates.dim))
    assert np.array_equal(half.predictions, linear.at(torch.ones(coordinates.dim)).predictions[::2])


def test_of_more_rows_than_find_room_some_are_drawn(monkeypatch):
    taken, _ = case("mlp")
    coordinates = linearizer(taken).coordinates(taken.predictions())
    a_row = 3 * 4 * coordinates.dim
    monkeypatch.setattr(costs, "MOST_BYTES", 7.5 * a_row)
    made = linearizer(taken)
    linear = made.linearize(coordinates.basis, taken.predictions())
    assert linear.num_rows == 7 and linear.nbytes == 7 * a_row == made.cost(taken.predictions(), coordinates.dim).nbytes
    everything = taken.predictions()
    drawn = [np.flatnonzero((everything.predictions == row).all(1))[0] for row in linear.centre.predictions]
    assert drawn == sorted(set(drawn)) and np.array_equal(linear.centre.label_ids, everything.label_ids[drawn])
    monkeypatch.setattr(costs, "MOST_BYTES", 2**30)
    whole = linearizer(taken).linearize(coordinates.basis, everything)
    assert torch.allclose(whole.leaves[0].jacobian[drawn], linear.leaves[0].jacobian)
    again = linearizer(taken, seed=1)
    monkeypatch.setattr(costs, "MOST_BYTES", 7.5 * a_row)
    assert not np.array_equal(
        again.linearize(coordinates.basis, everything).centre.predictions, linear.centre.predictions
    )


@pytest.mark.parametrize("rows", [1, 3, ROWS])
def test_coordinates_are_found_from_as_many_rows_of_each_batch_as_find_room(monkeypatch, rows):
    taken, _ = case("mlp")
    a_row, sketches = 4 * 3 * taken.phi.dim, []
    monkeypatch.setattr(module, "BATCH_BYTES", rows * a_row)

    class Counting(module.Sketch):
        def add(self, jacobian):
            sketches.append(len(jacobian))
            super().add(jacobian)

    monkeypatch.setattr(module, "Sketch", Counting)
    made = linearizer(taken)
    coordinates = made.coordinates(taken.predictions())
    assert sketches == [min(rows, size) for size in taken.batch_sizes]
    linear = made.linearize(coordinates.basis, taken.predictions())  # of all rows, whether they were kept or not
    assert linear.num_rows == ROWS and off(taken, linear, coordinates) < 0.05


def test_derivatives_that_find_no_room_are_made_again(monkeypatch):
    taken, _ = case("mlp")
    kept, again = linearizer(taken), linearizer(taken)
    prediction = taken.predictions()
    basis = kept.coordinates(prediction).basis
    monkeypatch.setattr(module, "KEPT_BYTES", 4 * 3 * taken.phi.dim * ROWS - 1)
    again.coordinates(prediction)
    seen = counted(taken.phi.model, monkeypatch)
    first = kept.linearize(basis, prediction)
    assert not seen
    second = again.linearize(basis, prediction)
    assert seen == {"forward": 3, "backward": 9}
    assert torch.allclose(first.leaves[0].jacobian, second.leaves[0].jacobian, atol=1e-5)


def neighbours(prediction):
    """Share of rows whose nearest other row, in all outputs, has their label: it reads an embedding whole."""
    outputs = np.asarray(prediction.predictions)
    distances = np.square(outputs[:, None] - outputs).sum(-1) + 1e9 * np.eye(len(outputs))
    return float((prediction.label_ids[distances.argmin(1)] == prediction.label_ids).mean()) + float(outputs.std())


@pytest.mark.parametrize(
    ("outputs", "metric", "way"),
    [(7, accuracy, LARGEST), (7, neighbours, ROW_BY_ROW), (30, accuracy, LARGEST), (30, neighbours, DIFFERENCES)],
)
def test_of_many_outputs_those_are_linearised_that_the_metric_reads(outputs, metric, way):
    taken = evaluator(scattered(FiLM(MLP(outputs).eval())), metric=metric)
    made = linearizer(taken)
    prediction = taken.predictions()
    coordinates = made.coordinates(prediction)
    assert made.way == way and taken.ledger.calls["observe"] == 2
    linear = made.linearize(coordinates.basis, prediction)
    assert taken.ledger.calls["observe"] == 2  # it is asked once
    if way == LARGEST:
        assert linear.leaves[0].jacobian.shape[1] == 5
    else:
        assert linear.leaves[0].columns is None and off(taken, linear, coordinates) < 0.2


def test_what_a_thousand_logits_cost_that_are_all_read_is_said_before(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "metricopt_hf")
    taken = evaluator(scattered(FiLM(MLP(1000).eval())), metric=neighbours)
    made, prediction = linearizer(taken, dim=64), taken.predictions()
    said = made.cost(prediction)
    assert f"predictions: {said}." in caplog.text and (said.way, said.passes) == (DIFFERENCES, 16)
    coordinates = made.coordinates(prediction)
    seen = counted(taken.phi.model, monkeypatch)
    linear = made.linearize(coordinates.basis, prediction)
    assert seen == {"forward": said.passes * len(taken.batch_sizes)} and linear.nbytes == said.nbytes


@pytest.mark.parametrize("budget", [1, None])
def test_a_metric_that_cannot_be_asked_is_taken_for_one_of_the_largest(budget):
    def failing(prediction):
        raise ValueError("no")

    taken = evaluator(FiLM(MLP(7).eval()), metric=failing)
    taken.ledger.budget = budget if budget is not None else taken.ledger.budget
    made = linearizer(taken)
    assert made.cost(taken.predictions()).way == LARGEST


def test_a_rank_that_fails_alone_leaves_none_waiting(monkeypatch):
    """Of the two ranks the other has met outputs that cannot be differentiated."""
    taken, _ = case("mlp")
    prediction, own, taken.world_size = taken.predictions(), [], 2
    monkeypatch.setattr(evaluators, "gather_object", lambda o: own.extend(o) or [*o, (None, "rank 1: no gradient")])
    made = linearizer(taken)
    made.way = ROW_BY_ROW
    assert made._row_by_row(prediction, lambda: own.append("computed")) is None
    assert made.way == DIFFERENCES and own[0][1] is None and "computed" not in own
    monkeypatch.setattr(evaluators, "gather_object", lambda o: own.append(o[0]) or [*o, ([], None)])
    with pytest.raises(ValueError, match="here"):
        evaluators.everywhere(0, 2, lambda: int("here"))
    assert "here" in own[-1][1]  # the other rank is told


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_is_linearised(backend):
    phi = scattered(FiLM(MLP().eval()))
    fast = torch.compile(phi.model, backend=backend)
    taken = evaluator(phi, predict=lambda batch: BatchOutput(fast(batch["x"]), batch["labels"]))
    taken.predictions()  # compiled before
    made = linearizer(taken)
    coordinates = made.coordinates(taken.predictions())
    assert made.way == ROW_BY_ROW
    assert off(taken, made.linearize(coordinates.basis, taken.predictions()), coordinates) < 0.05


def test_under_autocast_derivatives_are_float32():
    phi = scattered(FiLM(tiny_bert().eval()))

    def predict(batch):
        with torch.autocast("cpu", torch.bfloat16):
            logits = phi.model(batch["input_ids"], batch["attention_mask"]).logits
        assert logits.dtype == torch.bfloat16
        return BatchOutput(logits, batch["labels"])

    taken, plain = evaluator(phi, texts(), predict), evaluator(phi, texts())
    made = linearizer(taken)
    coordinates = made.coordinates(taken.predictions())
    assert made.way == ROW_BY_ROW
    found, exact = (
        linearizer(e).linearize(coordinates.basis, e.predictions()).leaves[0].jacobian for e in (taken, plain)
    )
    assert found.dtype == torch.float32 and (found - exact).norm() < 0.05 * exact.norm()


def test_where_outputs_are_not_differentiated_coordinates_are_those_of_the_loss():
    taken, _ = case("tokens attend to tokens")
    wanted = torch.randn(taken.phi.dim)
    made = linearizer(taken, loss_gradients=lambda count: wanted.expand(count, -1))
    coordinates = made.coordinates(taken.predictions())
    assert coordinates.kind == "loss gradients" and coordinates.dim == 1
    assert torch.allclose(coordinates.basis[:, 0].abs(), (wanted / wanted.norm()).abs(), atol=1e-5)
    assert made.cost(taken.predictions(), coordinates.dim).passes == 1
    still = linearizer(taken, loss_gradients=lambda count: torch.zeros(count, taken.phi.dim))
    nothing = still.coordinates(taken.predictions())
    assert nothing.kind == "random" and nothing.dim == 6


def test_with_coordinates_given_derivatives_are_checked_all_the_same():
    taken, _ = case("batch-wise")
    made = linearizer(taken)
    basis = torch.eye(taken.phi.dim)[:, :3]
    linear = made.linearize(basis, taken.predictions())
    assert made.way == DIFFERENCES and linear.dim == 3


class Late(MLP):
    """A batch of another size is given back in another order."""

    def forward(self, x):
        return super().forward(x) if len(x) == BATCH else super().forward(x.repeat(2, 1))[: len(x)]


def test_a_later_batch_that_cannot_be_differentiated_turns_all_to_differences():
    taken = evaluator(scattered(FiLM(Late().eval())))
    made = linearizer(taken)
    coordinates = made.coordinates(taken.predictions())
    linear = made.linearize(coordinates.basis, taken.predictions())
    assert made.way == DIFFERENCES and off(taken, linear, coordinates) < 0.2
