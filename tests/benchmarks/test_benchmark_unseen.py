"""Tasks whose metric reads a column that no training example shows: metrics by hand, and who sees the column."""

import numpy as np
import pytest
import torch
from toy import TINY, assert_the_metric_gets_what_is_measured, needs_data
from transformers import EvalPrediction

from benchmarks import measure, methods, protocol, scores, tabular, tasks, unseen
from benchmarks.problem import METRIC_ONLY, Rows

COLUMNS = {"money": "amount", "uplift": "treatment"}


def prediction(decided, labels, column) -> EvalPrediction:
    return EvalPrediction(np.eye(2)[decided], (np.array(labels), np.array(column)))


def test_profit_by_hand():
    # called: the first earns 30, the second nothing; the third is not called
    assert scores.profit(prediction([1, 1, 0], [1, 0, 1], [40.0, 25.0, 90.0])) == pytest.approx((30 - 10) / 3)


def test_policy_value_by_hand():
    # the decision is the treatment in the first, second and fourth row
    said = prediction([1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0])
    assert scores.policy_value(said) == pytest.approx((2 - 0.02 + 0 - 0.02 + 0 + 2) / 4)


def test_the_policy_value_is_the_mean_outcome_under_the_policy():
    generator = np.random.default_rng(0)
    gains, treatment, decided = (generator.integers(2, size=200_000) for _ in range(3))
    chance = 0.3 + 0.4 * gains * treatment
    outcome = (generator.random(len(gains)) < chance).astype(int)
    expected = (0.3 + 0.4 * gains * decided - 0.02 * decided).mean()
    assert scores.policy_value(prediction(decided, outcome, treatment)) == pytest.approx(expected, abs=0.01)


def test_rows_to_train_on_lack_the_metrics_columns():
    columns = {name: torch.arange(4) for name in ("features", "labels", *METRIC_ONLY)}
    rows = Rows(columns, np.array([2, 0]), "toy")
    assert set(rows.as_training()[0]) == {"features", "labels"} and rows.as_training().digest == rows.digest
    assert rows.with_column("more", torch.ones(4))[0].keys() == {*columns, "more"}


@needs_data
@pytest.mark.parametrize("name", COLUMNS)
def test_the_metric_alone_reads_the_column(name, tmp_path):
    task, column = tasks.tasks(smoke=True)[name], COLUMNS[name]
    problem = task.prepare(0)
    assert column not in problem.train.columns
    assert problem.label_names == ["labels", column]
    assert_the_metric_gets_what_is_measured(task, problem, tmp_path)
    values, split = (rows.columns[column] for rows in (problem.observation, problem.report))
    assert len(values) == len(problem.observation.columns["labels"]) and len(split) == len(problem.report)


@needs_data
@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("method", ["start", "loss_only", "obs", "train_obs"])
def test_a_method_that_trains_on_labels_runs(name, method):
    config = protocol.first_of_grids().config(method)
    record = measure.run_one(tasks.tasks(smoke=True)[name], method, 0, config, TINY, {})
    assert np.isfinite(record["variants"]["plain"]["scores"]["report"])


def test_methods_that_need_groups_do_not_apply():
    for name in COLUMNS:
        task = tasks.tasks()[name]
        assert task.kind == "beyond threshold"
        assert not any(methods.RIVALS[rival].applies(task) for rival in ("dfr", "group_dro", "thresholds"))


@needs_data
def test_amounts_and_treatments_are_what_they_say():
    money, uplift = unseen.with_amounts(), unseen.with_treatments()
    for split, plain in zip(money, tabular.load("bank_marketing"), strict=True):
        assert torch.equal(split["features"], plain["features"]) and torch.equal(split["labels"], plain["labels"])
        z = (torch.log(split["amount"] / 25) + 0.4) / 0.9
        assert float(z.abs().max()) <= unseen.LIMIT + 1e-5 and 0.5 < float(z.std()) < 1.1
    a, b = (unseen.projections(tabular.load("a9a"), seed)[0] for seed in (7, 10))
    train = uplift[0]
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) == pytest.approx(-0.29, abs=0.005)
    assert float(train["treatment"].float().mean()) == pytest.approx(0.5, abs=0.01)
    # among the rows that a treatment helps most, the treated ones have the better outcomes
    helped = b > 1
    rates = [float(train["labels"][helped & (train["treatment"] == t)].float().mean()) for t in (0, 1)]
    assert rates[1] - rates[0] > 0.1
