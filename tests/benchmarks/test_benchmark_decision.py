"""The table of what to use, from records made up for the purpose."""

import numpy as np
import pytest
from helpers import ROOT

from benchmarks import decision
from benchmarks.comparing import results_of

pytest.importorskip("tabulate")

# Of the threshold kind, and of the kind beyond one
THRESHOLD, BEYOND = "bank_f1", "dominoes"


def record(task, method, seed, scores):
    noise = np.random.default_rng(seed).normal(0, 0.002, 10)
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "calls": {},
        "seconds": {"run": 1.0},
        "config": {},
        "variants": {
            name: {
                "scores": {"report": score + noise.mean(), "selection": score},
                "items": (score + noise).tolist(),
                "calls": {},
            }
            for name, score in scores.items()
        },
    }


def results(task, start, loss_only, metricopt=None, **others):
    """(plain, post-hoc) scores of each method, over five seeds."""
    methods = {"start": start, "loss_only": loss_only, "metricopt": metricopt, **others}
    return results_of(
        record(task, method, seed, {"plain": scores[0] + 1e-4 * seed, "post-hoc": scores[1] + 2e-4 * (-1) ** seed})
        for method, scores in methods.items()
        if scores is not None
        for seed in range(5)
    )


@pytest.mark.parametrize(
    "start, loss_only, metricopt, said",
    [
        ((0.5, 0.5), (0.6, 0.6), (0.7, 0.7), "**MetricOpt**"),
        ((0.5, 0.6), (0.6, 0.6), (0.6, 0.6), "**a threshold**"),
        ((0.5, 0.5), (0.6, 0.6), (0.6, 0.6), "**the loss alone**"),
        ((0.5, 0.5), (0.6, 0.6), (0.61, 0.61), "**MetricOpt**"),  # little, and real
        ((0.5, 0.6), (0.6, 0.6), (0.7, 0.7), "**MetricOpt**"),
        ((0.5, 0.5), (0.6, 0.7), (0.7, 0.7), "**the loss alone**"),  # with a bias it is as good
    ],
)
def test_what_paid_is_what_is_advised(start, loss_only, metricopt, said):
    table = decision.table(results(THRESHOLD, start, loss_only, metricopt), "docs/results/")
    assert said in table and table.count("**") == 2
    assert max(len(cell.strip()) for line in table.splitlines() if line[:2] == "| " for cell in line.split("|")) <= 60
    better = "MetricOpt is better on [bank_f1](docs/results/bank_f1.md)"
    assert (better in table) == (said == "**MetricOpt**")


def test_where_nothing_was_run_nothing_is_advised():
    table = decision.table(results(BEYOND, (0.5, 0.5), (0.6, 0.6)), "")
    assert "**" not in table and "| 0 of 0 " in table


def test_a_method_that_sees_more_is_named_where_it_is_better_than_its_reference():
    flat = {"start": (0.5, 0.5), "loss_only": (0.6, 0.6), "metricopt": (0.6, 0.6)}
    assert "(dominoes)" not in decision.table(results(BEYOND, **flat, dfr=(0.6, 0.6)), "")
    assert "last layer anew on balanced groups (DFR) (dominoes)" in decision.table(
        results(BEYOND, **flat, dfr=(0.8, 0.8)), ""
    )


def test_only_what_stands_between_the_marks_is_renewed(tmp_path):
    page, found = tmp_path / "README.md", results(THRESHOLD, (0.5, 0.5), (0.6, 0.6), (0.7, 0.7))
    page.write_text(f"before\n{decision.BEGIN}\nold\n{decision.END}\nbehind\n")
    decision.write_into(page, found)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nbehind\n")
    assert "old" not in text and decision.table(found, "docs/results/") in text
    decision.write_into(page, found)
    assert page.read_text() == text
    page.write_text("no marks")
    decision.write_into(page, found)
    assert page.read_text() == "no marks"


def test_the_readme_has_the_marks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for mark in (decision.BEGIN, decision.END, decision.COST, decision.END_COST):
        assert text.count(mark) == 1


def test_what_pays_on_some_tasks_only_is_left_to_the_diagnosis():
    assert decision.advice(2, 5, 2, 5) == decision.ASK
    assert decision.advice(3, 5, 5, 5) == decision.OURS_PAYS
    assert decision.advice(1, 7, 5, 7) == decision.THRESHOLD
    assert decision.advice(0, 6, 0, 4) == decision.NOTHING
    assert decision.advice(0, 0, 0, 0) == ""
