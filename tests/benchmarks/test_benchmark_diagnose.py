"""The command that measures the diagnosis: what runs came to, the page, and a run at small sizes."""

import numpy as np
import pytest

from benchmarks import diagnose, records
from benchmarks.problem import data_root
from benchmarks.tasks import tasks
from metricopt_hf import ConfigurationError
from metricopt_hf.diagnosis import NO, OPEN, YES

NEEDED = ("a9a", "bank_marketing")
needs_data = pytest.mark.skipif(not all((data_root() / name).is_dir() for name in NEEDED), reason="needs its data")
BANK = tasks()["bank_f1"]


def run_of(method, seed, plain, tuned, task="bank_f1"):
    """A record of a run, as far as it is read here; scores scatter over the seeds by a hundredth."""
    noise = np.random.default_rng(seed).normal(0, 0.01, 20)
    plain, tuned = plain + 0.002 * seed, tuned + 0.001 * seed
    variants = {
        name: {"scores": {"report": score, "selection": score}, "items": (score + noise).tolist(), "calls": {}}
        for name, score in (("plain", plain), ("post-hoc", tuned))
    }
    return {"task": task, "method": method, "seed": seed, "variants": variants}


def runs(start, metricopt):
    """Records of two methods over three seeds, by their scores (as they are, with a bias)."""
    scores = {"start": start, "metricopt": metricopt}
    return [run_of(method, seed, *pair) for method, pair in scores.items() for seed in range(3)]


def said(bias, phi, worthwhile=0.02, error=0.01, seed=0):
    """A record of a diagnosis with these verdicts."""

    def gain(verdict):
        if error is None:
            return [0.0, None]
        return [{YES: 3, NO: -2, OPEN: 1.5}[verdict] * error, error]

    gains = {"bias - start": gain(bias), "phi - bias": gain(phi), "phi - start": gain(phi)}
    more = {"worthwhile": worthwhile, "gains": gains, "seconds": 2.0, "passes": 8}
    return {"task": "bank_f1", "method": "diagnosis", "seed": seed, **more}


@pytest.mark.parametrize(
    ("start", "metricopt", "paid"),
    [
        ((0.5, 0.5), (0.7, 0.7), [False, True]),
        ((0.5, 0.7), (0.7, 0.7), [True, False]),
        ((0.5, 0.7), (0.5, 0.8), [True, False]),  # MetricOpt as it comes out of a run
        ((0.5, 0.7), (0.8, 0.8), [True, True]),
        ((0.7, 0.6), (0.7, 0.65), [False, False]),  # selection does not choose a bias that harms
    ],
)
def test_what_runs_came_to(start, metricopt, paid):
    found = diagnose.judged(BANK, [*runs(start, metricopt), said(YES, YES)])
    assert [verdict.paid for verdict in found] == [verdict.right for verdict in found] == paid


def test_without_runs_nothing_came():
    lines = [line for line in runs((0.5, 0.5), (0.7, 0.7)) if line["method"] != "metricopt"]
    assert set(diagnose.came_to(BANK, lines)) == {"bias"}


@pytest.mark.parametrize(
    ("verdict", "gain", "worthwhile", "error", "right"),
    [
        (YES, 0.1, 0.02, 0.01, True), (YES, 0.0, 0.02, 0.01, False),
        (NO, 0.0, 0.02, 0.01, True), (NO, 0.1, 0.02, 0.01, False), (NO, 0.1, 0.06, 0.01, True),
        (OPEN, 0.1, 0.02, 0.06, True), (OPEN, 0.1, 0.02, 0.04, False), (OPEN, 0.1, 0.02, None, True),
    ],
)  # fmt: skip
def test_right_and_wrong(verdict, gain, worthwhile, error, right):
    lines = runs((0.5, 0.5), (0.5 + gain, 0.5))
    (found,) = (v for v in diagnose.judged(BANK, [*lines, said(NO, verdict, worthwhile, error)]) if v.asked == "phi")
    assert found.right == right


def test_the_page_counts_verdicts():
    verdicts = [(YES, YES), (NO, NO), (OPEN, NO)]
    lines = runs((0.5, 0.5), (0.7, 0.7)) + [said(*pair, seed=seed) for seed, pair in enumerate(verdicts)]
    text = diagnose.diagnosis_page(lines)
    assert "Of 6 verdicts, 5 say yes or no, and 2 of these are right (40%)" in text
    assert "1 say that it cannot be told, and of 1 of these that is so" in text
    rows = [[cell.strip() for cell in line.split("|")][1:5] for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row[0] in (YES, NO)] == [["yes", "1", "1", "1"], ["no", "2", "1", "1"]]


@pytest.mark.slow
@needs_data
def test_two_tasks_at_small_sizes_are_diagnosed_once_and_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnose, "tasks", lambda smoke=False: tasks(smoke=True))
    for line in runs((0.5, 0.5), (0.7, 0.7)):
        records.write(line, tmp_path / "diagnoses")
    options = ["--diagnoses", str(tmp_path / "diagnoses"), "--page", str(tmp_path / "page.md")]
    options += ["--tasks", "bank_f1", "a9a_groups", "--seeds", "0", "1"]
    assert diagnose.main(options) == 0
    made = [r for r in records.read(tmp_path / "diagnoses") if r["method"] == "diagnosis"]
    assert [(r["task"], r["seed"]) for r in made] == [(t, s) for t in ("a9a_groups", "bank_f1") for s in (0, 1)]
    for record in made:
        assert set(record["scores"]) == {"start", "bias", "phi"}
        assert record["passes"] <= 46
    text = (tmp_path / "page.md").read_text()
    for task in ("bank_f1", "a9a_groups"):
        assert f"| `{task}`" in text

    monkeypatch.setattr(diagnose, "made", None)  # it is not asked again
    assert diagnose.main(options) == 0
    assert (tmp_path / "page.md").read_text() == text


def test_unknown_tasks_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="--tasks nothing: there are a9a_gmean"):
        diagnose.run(diagnose.DiagnoseArguments(tasks=["nothing"]), tmp_path)
