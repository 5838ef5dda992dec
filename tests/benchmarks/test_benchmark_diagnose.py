"""The command that measures the diagnosis: what runs came to, the page, and a run at small sizes."""

import numpy as np
import pytest

from benchmarks import comparing, diagnose, records
from benchmarks.diagnose import GUIDANCE, NOTHING, THRESHOLD, TOO_FEW
from benchmarks.problem import data_root
from benchmarks.tasks import tasks
from metricopt_hf import ConfigurationError

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


def runs(start, metricopt, loss_only=(0.5, 0.5)):
    """Records of three methods over three seeds, by their scores (as they are, with a bias)."""
    scores = {"start": start, "metricopt": metricopt, "loss_only": loss_only}
    return [run_of(method, seed, *pair) for method, pair in scores.items() for seed in range(3)]


def result_of(lines):
    (result,) = comparing.results_of(lines)
    return result


@pytest.mark.parametrize(
    ("start", "metricopt", "came"),
    [
        ((0.5, 0.5), (0.7, 0.7), GUIDANCE),
        ((0.5, 0.7), (0.7, 0.7), THRESHOLD),
        ((0.5, 0.7), (0.5, 0.8), THRESHOLD),  # MetricOpt as it comes out of a run
        ((0.7, 0.7), (0.7, 0.7), NOTHING),
        ((0.7, 0.6), (0.7, 0.65), NOTHING),  # selection does not choose a bias that harms
    ],
)
def test_what_runs_came_to(start, metricopt, came):
    assert diagnose.outcome(result_of(runs(start, metricopt))) == came


def test_too_few_runs_come_to_nothing_known():
    assert diagnose.outcome(result_of([r for r in runs((0.5, 0.5), (0.7, 0.7)) if r["method"] != "metricopt"])) is None


def test_right_and_wrong_are_counted():
    pairs = [(GUIDANCE, GUIDANCE), (GUIDANCE, NOTHING), (THRESHOLD, THRESHOLD), (TOO_FEW, NOTHING)]
    assert "Of 4 diagnoses, 3 say what to do, and 2 of these are right (67%)" in diagnose.share_right(pairs)
    lines = diagnose.confusion(pairs).splitlines()
    cells = {[c.strip() for c in line.split("|")][1]: [c.strip() for c in line.split("|")][2:5] for line in lines[2:]}
    assert cells == {
        NOTHING: ["0", "0", "0"],
        THRESHOLD: ["0", "1", "0"],
        GUIDANCE: ["1", "0", "1"],
        TOO_FEW: ["1", "0", "0"],
    }


@pytest.mark.slow
@needs_data
def test_two_tasks_at_small_sizes_are_diagnosed_once_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diagnose, "tasks", lambda smoke=False: tasks(smoke=True))
    for line in runs((0.5, 0.5), (0.7, 0.7)):
        records.write(line, tmp_path / "results")
    options = ["--results", str(tmp_path / "results"), "--diagnoses", str(tmp_path / "diagnoses")]
    options += ["--page", str(tmp_path / "page.md"), "--tasks", "bank_f1", "a9a_groups", "--seeds", "0"]
    assert diagnose.main(options) == 0
    made = records.read(tmp_path / "diagnoses")
    assert [(r["task"], r["seed"]) for r in made] == [("a9a_groups", 0), ("bank_f1", 0)]
    for record in made:
        assert record["recommendation"] in diagnose.RECOMMENDATIONS
        assert set(record["scores"]) == {"start", "bias", "phi"} and record["passes"] <= 46
    text = (tmp_path / "page.md").read_text()
    assert "| `bank_f1`" in text and "not run" in next(line for line in text.splitlines() if "`a9a_groups`" in line)
    assert "Of 1 diagnoses" in text

    monkeypatch.setattr(diagnose, "diagnosed", None)  # it is not asked again
    assert diagnose.main(options) == 0
    assert (tmp_path / "page.md").read_text() == text


def test_unknown_tasks_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="--tasks nothing: there are a9a_gmean"):
        diagnose.run(diagnose.DiagnoseArguments(tasks=["nothing"]), tmp_path)
