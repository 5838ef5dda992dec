"""Differences: outputs of any kind are linearised along the coordinates, and what is no smooth function is refused."""

import numpy as np
import pytest
import torch
from linear_models import MLP, case, evaluator, linearizer, off, scattered
from torch import nn

from metricopt_hf.evaluation.evaluator import BatchOutput
from metricopt_hf.linear import differences as module
from metricopt_hf.linear.cost import DIFFERENCES
from metricopt_hf.linear.linearizer import NotLinearizable
from metricopt_hf.phi import FiLM, Subset


def test_what_is_made_of_the_models_outputs_is_linearised_by_differences():
    """As with preprocess_logits_for_metrics."""
    phi = scattered(FiLM(MLP().eval()))
    taken = evaluator(phi, predict=lambda batch: BatchOutput(phi.model(batch["x"]).softmax(-1), batch["labels"]))
    made = linearizer(taken)
    coordinates = made.coordinates(taken.predictions())
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
        coordinates = made.coordinates(taken.predictions())
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
    coordinates = made.coordinates(taken.predictions())
    with pytest.raises(NotLinearizable, match=why):
        made.linearize(coordinates.basis, taken.predictions())
    assert torch.equal(phi.read(), before)


def test_what_does_not_depend_on_phi_or_is_too_large_is_refused(monkeypatch):
    model = MLP().eval()
    model.idle = nn.LayerNorm(4)
    taken = evaluator(Subset(model, "idle"))
    with pytest.raises(NotLinearizable, match="do not depend on phi"):
        linearizer(taken).linearize(linearizer(taken).coordinates(taken.predictions()).basis, taken.predictions())
    taken, _ = case("tokens attend to tokens")
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with pytest.raises(NotLinearizable, match="GiB"):
        linearizer(taken).linearize(linearizer(taken).coordinates(taken.predictions()).basis, taken.predictions())
