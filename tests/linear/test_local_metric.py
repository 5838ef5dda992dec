"""LocalMetric: the exact metric near phi, on halves of the rows, within its budget; and how far rows put it off."""

import numpy as np
import pytest
import torch
from linear_models import MLP, ROWS, evaluator, linearizer

from metricopt_hf.errors import MetricError
from metricopt_hf.evaluation import evaluator as evaluators
from metricopt_hf.evaluation.ledger import Faults
from metricopt_hf.linear.local_metric import BudgetSpent, LocalMetric
from metricopt_hf.linear.noise import HALVES, paired_error, standard_error
from metricopt_hf.phi import FiLM
from metricopt_hf.value import Trajectory


def first_logit(prediction):
    return float(prediction.predictions[:, 0].mean())


class Made:
    def __init__(self, metric=first_logit, linearised=True, **kwargs):
        torch.manual_seed(0)
        self.taken = evaluator(FiLM(MLP().eval()), metric=metric)
        made = linearizer(self.taken, dim=4)
        self.coordinates = made.coordinates(self.taken.predictions())
        self.linear = made.linearize(self.coordinates.basis, self.taken.predictions())
        self.faults, self.trajectory = Faults(), Trajectory()
        self.local = LocalMetric(
            self.taken, self.coordinates, self.linear if linearised else None, 0.1, torch.Generator().manual_seed(0),
            self.faults, self.trajectory, 7, 0.5, **kwargs,
        )  # fmt: skip


@pytest.mark.parametrize("linearised", [True, False])
def test_values_are_the_metrics_at_each_point_with_a_pass_or_without(linearised):
    made = Made(linearised=linearised)
    z, before = made.local.draw(3), made.taken.phi.read()
    found = made.local.values(z)
    expected = [first_logit(made.linear.at(point)) for point in z]
    assert np.allclose(found, expected, atol=1e-3 if not linearised else 1e-6) and len(set(found)) == 3
    assert torch.equal(made.taken.phi.read(), before)
    ledger = made.taken.ledger
    assert ledger.calls["observe"] == 3 and ledger.passes["observe"] == (0 if linearised else 3)
    assert torch.allclose(made.trajectory.z, made.local.origin + z) and made.trajectory.steps.unique().tolist() == [7]
    assert np.allclose(made.trajectory.scores, found)


def test_a_half_of_the_rows_is_seen_and_what_is_kept_is_shifted_to_the_value_of_all():
    made = Made()
    made.local.halve()
    rows, z = made.local.rows, made.local.draw(4)
    assert len(rows) == ROWS // 2 == made.local.part.num_rows
    found = made.local.values(z)
    assert np.allclose(found, [first_logit(made.linear.rows(rows).at(point)) for point in z], atol=1e-6)
    assert float(made.trajectory.scores.mean()) == pytest.approx(0.5)
    assert np.allclose(np.diff(made.trajectory.scores), np.diff(found))
    made.local.halve()
    assert not np.array_equal(made.local.rows, rows)


def test_where_rows_are_not_examples_or_belong_together_all_are_seen():
    for made in (Made(on_all_rows=True), Made()):
        if not made.local.on_all_rows:
            object.__setattr__(made.linear, "batch_sizes", (3, 2))
        made.local.halve()
        assert made.local.rows is None and made.local.part is made.linear


def test_a_budget_is_not_exceeded():
    made = Made(allowance=5)
    made.local.allow(2)
    assert made.local.share == 2.5
    made.local.values(made.local.draw(3))
    with pytest.raises(BudgetSpent):
        made.local.values(made.local.draw(3))
    assert made.local.remaining == 2 and made.taken.ledger.calls["observe"] == 3
    made.taken.ledger.budget = 4
    assert made.local.remaining == 1


def test_a_call_that_fails_is_nan_and_counted(caplog):
    calls = iter(range(100))

    def fails(prediction):
        if next(calls) == 1:
            raise ValueError("no number")
        return first_logit(prediction)

    made = Made(fails)
    found = made.local.values(made.local.draw(3))
    assert np.isnan(found).tolist() == [False, True, False] and len(made.trajectory) == 2
    assert made.faults.total == 1 and made.faults.reason is None and "no number" in caplog.text


def test_on_several_ranks_each_makes_a_share_of_the_calls(monkeypatch):
    given = []
    monkeypatch.setattr(evaluators, "gather_object", lambda mine: given.extend(mine) or list(given))
    expected = Made().local.values(Made().local.draw(5))
    made = Made()
    made.taken.rank, made.taken.world_size = 1, 2
    z = made.local.draw(5)
    evaluators.shared_out(0, 2, 5, lambda i: (first_logit(made.linear.at(z[i])), None))
    found = made.local.values(z)
    assert np.allclose(found, expected) and made.taken.ledger.calls["observe"] == 5


def test_the_standard_error_is_about_that_of_a_mean_over_the_rows():
    made = Made()
    column = made.linear.centre.predictions[:, 0]
    error = standard_error(made.taken, made.linear, torch.Generator().manual_seed(0))
    assert error == pytest.approx(column.std() / np.sqrt(ROWS), rel=0.6)
    assert made.taken.ledger.calls["noise"] == HALVES
    moved = made.linear.at(torch.full((4,), 0.01))
    assert 0 < paired_error(made.taken, made.linear.centre, moved) < error / 2
    assert paired_error(made.taken, moved, moved) == 0


def test_where_halves_make_no_sense_the_error_is_not_known():
    def on_all(prediction):
        if len(prediction.label_ids) < ROWS:
            raise MetricError("a class is missing")
        return 0.5

    made = Made(on_all)
    assert standard_error(made.taken, made.linear, torch.Generator()) == 0
    object.__setattr__(made.linear, "batch_sizes", (3, 2))
    assert standard_error(Made().taken, made.linear, torch.Generator()) == 0
