"""Linearizer: predictions near phi without a pass, right in whichever way they were had, at the cost that is said."""

import logging
from collections import Counter
from contextlib import contextmanager

import numpy as np
import peft
import pytest
import timm
import torch
from helpers import tiny_bert
from torch import nn

from metricopt_hf.evaluation.data import InOrder
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator
from metricopt_hf.evaluation.ledger import Ledger
from metricopt_hf.evaluation.metric import Metric
from metricopt_hf.linear import linearizer as module
from metricopt_hf.linear.linearizer import DIFFERENCES, ROW_BY_ROW, Linearizer, NotLinearizable
from metricopt_hf.phi import FiLM, Subset, adapter

ROWS, BATCH = 22, 8


class MLP(nn.Module):
    def __init__(self, outputs=3, hidden=8):
        super().__init__()
        self.stem, self.norm1, self.mid = nn.Linear(6, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, hidden)
        self.norm2, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, outputs)

    def hidden(self, x):
        return self.norm2(self.mid(torch.relu(self.norm1(self.stem(x)))))

    def forward(self, x):
        return self.head(self.hidden(x))


class Regression(MLP):
    def forward(self, x):
        return super().forward(x)[:, 0]


class Tokens(MLP):
    def forward(self, x):
        return super().forward(x[:, None] + torch.arange(5.0)[:, None])


class InBatch(MLP):
    """Normalises over the batch: a row's outputs depend on the other rows."""

    def forward(self, x):
        h = self.norm1(self.stem(x)) ** 2
        return self.head((h - h.mean(0)) / h.std(0))


class Softly(MLP):
    """Each row attends to all rows of its batch."""

    def forward(self, x):
        h = self.hidden(x)
        return self.head(torch.softmax(h @ h.T, -1) @ h)


class WithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x[:, None].expand(-1, 4, -1))[0][:, -1])


class Reentrant(MLP):
    """Gradients do not find their way to the norms, and no error says so."""

    def forward(self, x):
        return self.head(torch.utils.checkpoint.checkpoint(self.hidden, x, use_reentrant=True))


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 3)
        )

    def forward(self, x):
        return super().forward(torch.cat([x, x[:, :3]], 1).reshape(-1, 1, 3, 3))


def lora():
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(tiny_bert(), config)


def vectors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 6, generator=generator)
    return [{"x": x[i], "labels": torch.tensor(i % 3)} for i in range(ROWS)]


def texts():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(ROWS):
        ids, mask = torch.randint(2, 8, (9,), generator=generator), torch.ones(9, dtype=torch.long)
        mask[4 + i % 6 :] = 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 3)})
    return rows


def pictures():
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, 32, 32, generator=generator), "labels": torch.tensor(i % 3)} for i in range(ROWS)]


def accuracy(prediction):
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def evaluator(phi, data=None, predict=None, concat=True, metric=accuracy, max_bytes=1e9, **kwargs):
    model = phi.model

    def plainly(batch):
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
        return BatchOutput(getattr(output, "logits", output), batch["labels"])

    data = vectors() if data is None else data
    return Evaluator(
        phi, predict or plainly, InOrder(data, BATCH, torch.utils.data.default_collate), Metric(metric, "metric"),
        Ledger(), max_bytes, concat, **kwargs,
    )  # fmt: skip


def linearizer(taken, dim=6, seed=0, loss_gradients=None):
    return Linearizer(taken, dim, loss_gradients, torch.Generator().manual_seed(seed))


def leaves(prediction):
    return [leaf for leaf in module.arrays(prediction) if leaf is not None]


def off(taken, linear, coordinates, size=0.02, columns=None):
    """By how much, relatively, predictions in a random direction differ from what was said of them."""
    z = size * torch.randn(coordinates.dim)
    here, there = linear.centre, linear.at(z)
    with taken.phi.restored():
        taken.phi.write(taken.phi.read() + coordinates.lift(z))
        true = taken.predictions()
    moved = [np.asarray(t, float) - h for t, h in zip(leaves(true), leaves(here), strict=True)]
    said = [np.asarray(t, float) - h for t, h in zip(leaves(there), leaves(here), strict=True)]
    if columns is not None:
        moved, said = ([np.take_along_axis(m[0], columns, 1)] for m in (moved, said))
    norm = np.sqrt(sum((m**2).sum() for m in moved))
    assert norm > 0
    return np.sqrt(sum(((m - s) ** 2).sum() for m, s in zip(moved, said, strict=True))) / norm


def scattered(phi, size=0.1):
    phi.write(phi.read() + size * torch.randn(phi.dim))
    return phi


CASES = {
    "mlp": (MLP, vectors, FiLM, ROW_BY_ROW),
    "one logit": (lambda: MLP(1), vectors, FiLM, ROW_BY_ROW),
    "regression": (Regression, vectors, FiLM, ROW_BY_ROW),
    "all logits": (lambda: MLP(5), vectors, FiLM, ROW_BY_ROW),
    "bert": (tiny_bert, texts, FiLM, ROW_BY_ROW),
    "timm": (lambda: timm.create_model("test_vit", num_classes=3, img_size=32), pictures, FiLM, ROW_BY_ROW),
    "lora": (lora, texts, adapter, ROW_BY_ROW),
    "linear layers": (MLP, vectors, lambda model: Subset(model, "mid|head"), ROW_BY_ROW),
    "convolutions": (Convolutions, vectors, lambda model: Subset(model, r"^0\."), DIFFERENCES),
    "rnn": (WithState, vectors, lambda model: Subset(model, "rnn"), DIFFERENCES),
    "behind an rnn": (WithState, vectors, lambda model: Subset(model, "head"), ROW_BY_ROW),
    "batch-wise": (InBatch, vectors, lambda model: FiLM(model, layers="norm1"), DIFFERENCES),
    "rows attend to rows": (Softly, vectors, FiLM, DIFFERENCES),
    "reentrant": (Reentrant, vectors, FiLM, DIFFERENCES),
    "tokens": (Tokens, vectors, FiLM, DIFFERENCES),
}


def case(name):
    make, data, space, way = CASES[name]
    torch.manual_seed(0)
    phi = scattered(space(make().eval()))
    return evaluator(phi, data()), way


@pytest.mark.parametrize("name", CASES)
def test_predictions_near_phi_are_as_they_are_said_to_be(name, caplog):
    caplog.set_level(logging.INFO, "metricopt_hf")
    taken, way = case(name)
    before = {n: t.clone() for n, t in taken.phi.model.state_dict().items()}
    made = linearizer(taken)
    coordinates = made.coordinates()
    assert made.way == way and coordinates.kind == ("jacobian" if way == ROW_BY_ROW else "random")
    assert torch.allclose(coordinates.basis.T @ coordinates.basis, torch.eye(coordinates.dim), atol=1e-5)
    linear = made.linearize(coordinates.basis, taken.predictions())
    assert off(taken, linear, coordinates) < (0.05 if way == ROW_BY_ROW else 0.2)
    assert linear.nbytes == made.nbytes(linear.centre, coordinates.dim)
    assert linear.num_rows == ROWS and linear.unsplittable is None
    assert all(torch.equal(before[n], t) for n, t in taken.phi.model.state_dict().items())
    has_taps = taken.phi.taps() is not None
    assert ("by differences" in caplog.text) == (way == DIFFERENCES and has_taps)


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
    prediction, coordinates = taken.predictions(), made.coordinates()
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
    coordinates, prediction = made.coordinates(), taken.predictions()
    seen, batches = counted(taken.phi.model, monkeypatch), len(taken.batch_sizes)
    made.linearize(coordinates.basis, prediction)
    if made.way == ROW_BY_ROW:  # the derivatives by which coordinates were found are used once more
        assert not seen
        made.linearize(coordinates.basis, prediction)
    assert seen["forward"] + seen["backward"] == batches * made.passes(prediction, coordinates.dim)


def test_of_many_logits_the_largest_of_each_row_move(monkeypatch):
    phi = scattered(FiLM(MLP(1000).eval()))
    taken = evaluator(phi)
    made = linearizer(taken)
    coordinates, prediction = made.coordinates(), taken.predictions()
    made.linearize(coordinates.basis, prediction)
    seen = counted(phi.model, monkeypatch)
    linear = made.linearize(coordinates.basis, prediction)
    assert seen == {"forward": 3, "backward": 15} and made.passes(prediction) == 6
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
    coordinates = linearizer(taken).coordinates()
    a_row = 3 * 4 * coordinates.dim
    monkeypatch.setattr(module, "MOST_BYTES", 7.5 * a_row)
    made = linearizer(taken)
    linear = made.linearize(coordinates.basis, taken.predictions())
    assert linear.num_rows == 7 and linear.nbytes == 7 * a_row == made.nbytes(taken.predictions(), coordinates.dim)
    everything = taken.predictions()
    drawn = [np.flatnonzero((everything.predictions == row).all(1))[0] for row in linear.centre.predictions]
    assert drawn == sorted(set(drawn)) and np.array_equal(linear.centre.label_ids, everything.label_ids[drawn])
    monkeypatch.setattr(module, "MOST_BYTES", 2**30)
    whole = linearizer(taken).linearize(coordinates.basis, everything)
    assert torch.allclose(whole.leaves[0].jacobian[drawn], linear.leaves[0].jacobian)
    again = linearizer(taken, seed=1)
    monkeypatch.setattr(module, "MOST_BYTES", 7.5 * a_row)
    assert not np.array_equal(
        again.linearize(coordinates.basis, everything).centre.predictions, linear.centre.predictions
    )


@pytest.mark.parametrize("room", [1, 3000, 2**28])
def test_coordinates_are_found_from_as_many_rows_as_find_room(monkeypatch, room):
    taken, _ = case("mlp")
    monkeypatch.setattr(module, "BASIS_BYTES", room)
    kept = []
    monkeypatch.setattr(
        module, "output_directions", lambda j, dim: kept.append(j) or module.leading_directions(j[0], dim)
    )
    linearizer(taken).coordinates()
    assert len(kept[0]) == max(1, min(ROWS, room // (4 * 3 * taken.phi.dim)))


def test_a_compiled_model_is_linearised():
    phi = scattered(FiLM(MLP().eval()))
    fast = torch.compile(phi.model, backend="aot_eager")
    taken = evaluator(phi, predict=lambda batch: BatchOutput(fast(batch["x"]), batch["labels"]))
    taken.predictions()  # compiled before
    made = linearizer(taken)
    coordinates = made.coordinates()
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
    coordinates = made.coordinates()
    assert made.way == ROW_BY_ROW
    found, exact = (
        linearizer(e).linearize(coordinates.basis, e.predictions()).leaves[0].jacobian for e in (taken, plain)
    )
    assert found.dtype == torch.float32 and (found - exact).norm() < 0.05 * exact.norm()


def test_what_is_made_of_the_models_outputs_is_linearised_by_differences():
    """As with preprocess_logits_for_metrics."""
    phi = scattered(FiLM(MLP().eval()))
    taken = evaluator(phi, predict=lambda batch: BatchOutput(phi.model(batch["x"]).softmax(-1), batch["labels"]))
    made = linearizer(taken)
    coordinates = made.coordinates()
    assert made.way == DIFFERENCES
    assert off(taken, made.linearize(coordinates.basis, taken.predictions()), coordinates) < 0.2


def test_several_outputs_and_lists_of_batches_are_linearised_by_differences():
    phi = scattered(FiLM(MLP().eval()))

    def predict(batch):
        hidden = phi.model.hidden(batch["x"])
        return BatchOutput((phi.model.head(hidden), hidden), batch["labels"], batch["labels"].float(), batch["x"])

    for concat in (True, False):
        taken = evaluator(phi, predict=predict, concat=concat)
        made = linearizer(taken)
        coordinates = made.coordinates()
        linear = made.linearize(coordinates.basis, taken.predictions())
        assert made.way == DIFFERENCES and off(taken, linear, coordinates) < 0.2
        assert len(linear.leaves) == (2 if concat else 6) and linear.unsplittable is None
        rows, z = np.array([0, 9, 10, 21]), 0.1 * torch.ones(coordinates.dim)
        part, whole = linear.rows(rows), linear.at(z)
        assert part.num_rows == 4 and part.unsplittable is None
        logits, labels = part.at(z).predictions, part.at(z).label_ids
        if not concat:
            assert [len(batch[0]) for batch in logits] == [1, 2, 1]
            logits = [np.concatenate([batch[i] for batch in logits]) for i in range(2)]
            whole.predictions = [np.concatenate([batch[i] for batch in whole.predictions]) for i in range(2)]
            labels = np.concatenate(labels)
        for got, expected in zip(logits, whole.predictions, strict=True):
            assert np.allclose(got, expected[rows], atol=1e-6)
        assert labels.tolist() == (rows % 3).tolist()


class Generates(MLP):
    """Whole numbers that depend on phi."""

    def forward(self, x):
        return super().forward(x).argmax(-1)


class Grows(MLP):
    def forward(self, x):
        return super().forward(x)[:, None].expand(-1, 1 + int(1e6 * self.norm2.bias.sum().abs()) % 7, -1)


@pytest.mark.parametrize(
    ("make", "why"),
    [(Generates, "no floating-point"), (Grows, "shape")],
)
def test_what_is_no_smooth_function_of_phi_is_refused(make, why):
    phi = FiLM(make().eval())
    before = phi.read()
    taken = evaluator(phi)
    made = linearizer(taken)
    coordinates = made.coordinates()
    with pytest.raises(NotLinearizable, match=why):
        made.linearize(coordinates.basis, taken.predictions())
    assert torch.equal(phi.read(), before)


def test_what_does_not_depend_on_phi_or_is_too_large_is_refused(monkeypatch):
    model = MLP().eval()
    model.idle = nn.LayerNorm(4)
    taken = evaluator(Subset(model, "idle"))
    with pytest.raises(NotLinearizable, match="do not depend on phi"):
        linearizer(taken).linearize(linearizer(taken).coordinates().basis, taken.predictions())
    taken, _ = case("tokens")
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with pytest.raises(NotLinearizable, match="GiB"):
        linearizer(taken).linearize(linearizer(taken).coordinates().basis, taken.predictions())


def test_where_outputs_are_not_differentiated_coordinates_are_those_of_the_loss():
    taken, _ = case("tokens")
    wanted = torch.randn(taken.phi.dim)
    made = linearizer(taken, loss_gradients=lambda count: wanted.expand(count, -1))
    coordinates = made.coordinates()
    assert coordinates.kind == "loss gradients" and coordinates.dim == 1
    assert torch.allclose(coordinates.basis[:, 0].abs(), (wanted / wanted.norm()).abs(), atol=1e-5)
    assert made.passes(taken.predictions(), coordinates.dim) == 1
    nothing = linearizer(taken, loss_gradients=lambda count: torch.zeros(count, taken.phi.dim)).coordinates()
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
    coordinates = made.coordinates()
    linear = made.linearize(coordinates.basis, taken.predictions())
    assert made.way == DIFFERENCES and off(taken, linear, coordinates) < 0.2
