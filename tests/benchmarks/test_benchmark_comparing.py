"""Records compared: statistics and verdicts by hand."""

from dataclasses import replace

import numpy as np
import pytest
from made_up import made_up
from scipy.stats import ttest_rel
from toy import TOY

from benchmarks import comparing, conduct, curves, measure, statistics, tables, tasks


def test_item_draws_are_shared():
    first, second = measure.item_counts("pool", 50), measure.item_counts.__wrapped__("pool", 50)
    assert np.array_equal(first, second)
    assert first.shape == (measure.REPLICATES, 50) and abs(first.mean() - 1) < 0.1


def test_without_items_the_interval_is_the_paired_t_test():
    ours, theirs = np.array([0.5, 0.7, 0.6, 0.9]), np.array([0.4, 0.65, 0.62, 0.7])
    difference = ours - theirs
    found = statistics.paired(difference, np.repeat(difference[:, None], 7, axis=1))
    expected = ttest_rel(ours, theirs)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    turned = statistics.paired(difference, np.repeat(difference[:, None], 7, axis=1), sign=-1)
    assert (turned.mean, turned.low) == pytest.approx((-found.mean, -found.high))


def test_the_closed_form_is_the_bootstrap():
    generator = np.random.default_rng(0)
    differences = generator.normal(size=(6, 40)) + generator.normal(size=(6, 1)) + generator.normal(size=40)
    draws = [differences[generator.integers(6, size=6), generator.integers(40)].mean() for _ in range(40000)]
    within = differences.var(axis=0).mean() / 6  # redrawing seeds is a sixth too small; the closed form corrects it
    items = differences.mean(0).var()
    corrected = np.sqrt(np.var(draws) + within / 5 + items / 39)
    assert statistics.bootstrap_error(differences) == pytest.approx(corrected, rel=0.02)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_verdicts():
    lines = []
    for seed in range(5):
        jitter = 0.001 * seed
        lines += [
            made_up("loss_only", seed, {"plain": 0.4, "post-hoc": 0.5}),
            made_up("metricopt", seed, {"plain": 0.55 + jitter, "post-hoc": 0.5 + (-1) ** seed * jitter}),
            made_up("random", seed, {"plain": 0.45 - jitter}),
        ]
    rows = comparing.rows_of(lines)
    compared = comparing.compare(tasks.tasks()["bank_f1"], rows)
    verdicts = {key: entry.verdict for key, entry in compared.items()}
    assert verdicts["metricopt", "plain"] == comparing.WIN
    assert verdicts["random", "plain"] == comparing.LOSS
    assert verdicts["metricopt", "post-hoc"] == comparing.TIE
    difference = statistics.Paired(0.1, 0.04, 0.01, 0.19, 0.03, 5)
    alone = [comparing.Compared(None, d, 0.2).verdict for d in (difference, replace(difference, low=-0.19, high=-0.01))]
    assert alone == [comparing.ABOVE, comparing.BELOW]
    assert verdicts["loss_only", "post-hoc"] == ""  # the rival
    assert compared["random", "plain"].difference.mean == pytest.approx(-0.052)
    assert conduct.harm(tasks.tasks()["bank_f1"], rows["random", "plain"], rows["loss_only", "post-hoc"]) == (5, 0, 5)


def test_harm_that_the_selection_split_shows_is_told_from_harm_that_nobody_sees():
    lines = []
    for seed in range(5):
        lines.append(made_up("loss_only", seed, {"plain": 0.5}))
        lines.append(made_up("random", seed, {"plain": 0.4 if seed else 0.6}))
        lines[-1]["variants"]["plain"]["scores"]["selection"] = 0.6 if seed == 1 else 0.4
    rows = comparing.rows_of(lines)
    harm = conduct.harm(tasks.tasks()["bank_f1"], rows["random", "plain"], rows["loss_only", "plain"])
    assert harm == (4, 1, 5)


def test_the_rival_is_the_best_of_what_is_cheap_by_the_selection_split():
    lines = [made_up("loss_only", seed, {"plain": 0.5, "post-hoc": 0.6}) for seed in range(2)]
    lines += [made_up("start", seed, {"plain": 0.4, "post-hoc": 0.7}) for seed in range(2)]
    lines += [made_up("train_obs", seed, {"plain": 0.9}) for seed in range(2)]  # reads labels
    lines += [made_up("metricopt", seed, {"plain": 0.8, "post-hoc": 0.8}) for seed in range(2)]
    known, rows = tasks.tasks(), comparing.rows_of(lines)
    rival = comparing.rival(known["bank_f1"], rows)
    assert (rival.method, rival.variant) == ("start", "post-hoc")
    compared = comparing.compare(known["bank_f1"], rows)
    assert compared["metricopt", "plain"].difference.mean == pytest.approx(0.1)
    assert compared["loss_only", "plain"].difference.mean == pytest.approx(-0.2)
    rival = comparing.rival(known["bank_cost"], rows)  # smaller is better
    assert (rival.method, rival.variant) == ("start", "plain")


def test_time_by_hand():
    """Two settings of 190 steps in 7.6 seconds: 200 steps at one take 4."""
    lines = [made_up("metricopt", seed, {"plain": 0.5}) for seed in range(2)]
    row = comparing.rows_of(lines)["metricopt", "plain"]
    assert conduct.loss_seconds(row) is None  # no steps by the loss
    for line in lines:
        line["config"] = {"by_loss": [{}, {}]}
        line["budget"] = {"steps": 200, "metric_steps": 10}
        line["curve"] = {"seconds": [7.6, 20.0]}
    assert conduct.loss_seconds(comparing.rows_of(lines)["metricopt", "plain"]) == pytest.approx(4.0)


def test_a_curve_with_fewer_looks_stays_where_it_ended():
    runs = [{"curve": {"selection": [0.4, 0.6, 0.5]}}, {"curve": {"selection": [0.3, 0.2]}}]
    assert curves.best_so_far(TOY, runs).tolist() == [[0.4, 0.6, 0.6], [0.3, 0.3, 0.3]]


def test_tasks_stand_by_kind_and_none_is_left_out():
    kinds = ("no conflict", "of no name", "threshold", "no conflict")
    lines = [made_up("loss_only", seed, {"plain": 0.5}) for seed in range(2)]
    rows = comparing.rows_of(lines)
    results = [comparing.Result(replace(TOY, name=f"{i}", kind=kind), rows, {}) for i, kind in enumerate(kinds)]
    names = {kind: [result.task.name for result in members] for kind, members in comparing.groups(results).items()}
    assert list(names.items()) == [("threshold", ["2"]), ("no conflict", ["0", "3"]), ("of no name", ["1"])]
    table = tables.overview(results)
    assert [table.index(f"[{i}]") for i in (2, 0, 3, 1)] == sorted(table.index(f"[{i}]") for i in range(4))
    assert max(len(cell) for line in table.splitlines() for cell in line.split("|")) <= 62
