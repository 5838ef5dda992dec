"""The benchmarks of rounding and of constraints: what they compute, on numbers made up here."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import EvalPrediction

from benchmarks import constraints, rounding


def test_rounding_leaves_few_levels_per_output_channel_and_can_be_done_twice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(8, 2))
    model.requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    rounding.rounded(model, 3)
    for module in (model[0], model[3]):
        for channel in module.weight.flatten(1):
            assert len(channel.unique()) <= 7
    assert torch.equal(model[1].weight, before[2]) and torch.equal(model[3].bias, before[-1])
    assert (model[0].weight - before[0]).abs().max() <= before[0].abs().max() / 6
    assert float(model[0].weight.abs().max()) == pytest.approx(float(before[0].abs().max()))
    once = model[0].weight.clone()
    torch.testing.assert_close(rounding.rounded(model, 3)[0].weight, once)


def predicted(flags, labels):
    return EvalPrediction(np.eye(2)[np.asarray(flags, int)], np.asarray(labels))


def test_recall_and_precision():
    prediction = predicted([1, 1, 1, 0, 0], [1, 1, 0, 1, 1])
    assert constraints.numbers(prediction) == {"recall": 0.5, "precision": pytest.approx(2 / 3)}
    assert constraints.numbers(predicted([0, 0], [1, 0])) == {"recall": 0.0, "precision": 1.0}


def test_the_table_counts_where_the_bound_is_reached():
    rows = [
        constraints.Row("ours", seed, {"selection": 0.4, "report": 0.3}, {"selection": 0.7, "report": p}, 0.02, 1.0)
        for seed, p in enumerate((0.59, 0.61, 0.63))
    ]
    (line,) = [line for line in constraints.table(rows, 0.6).splitlines() if "ours" in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:3] == ["3 of 3", "2 of 3"] and cells[4].startswith("0.610 ± 0.012")
