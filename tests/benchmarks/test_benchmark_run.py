"""Runs: disjoint splits, equal budgets, repeatable, taken up again, and one of every part."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import example
from toy import TINY, TOY, needs_data

from benchmarks import ceiling, comparing, measure, methods, protocol, records, run, tabular, tasks
from benchmarks.problem import data_root
from metricopt_hf import ConfigurationError
from metricopt_hf.phase.plan import CALLS, PREDICTIONS
from metricopt_hf.phase.selection import BIAS, MEAN, START

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@needs_data
def test_smoke():
    """Every task once and every method once; about a minute."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--smoke"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not finished" not in done.stdout


def test_the_smoke_plan_leaves_nothing_out():
    keys = [key for unit in run.smoke_plan() for key in unit]
    assert {key[0] for key in keys} == set(tasks.tasks())
    assert {key[1] for key in keys} == set(methods.RIVALS)


def test_the_data_lie_beside_the_project(monkeypatch):
    monkeypatch.delenv("METRICOPT_DATA", raising=False)
    beside = ROOT.parent / "shared" / "data"
    assert data_root() == beside
    for name in ("image_retrieval", "object_detection", "text_classification"):
        assert example(name).DATA == beside


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", tasks.tasks())
def test_splits_are_disjoint_and_cut_by_the_seed(name):
    task = tasks.tasks(smoke=True)[name]
    first, again, other = (task.prepare(seed) for seed in (0, 0, 1))
    rows = [(split.pool, int(row)) for _, split in first.items() for row in split.rows]
    assert len(set(rows)) == len(rows)
    digests = [{n: s.digest for n, s in problem.items()} for problem in (first, again, other)]
    assert digests[0] == digests[1]
    for split in ("observation", "selection"):
        assert digests[0][split] != digests[2][split]
    item, batch = first.report[0], next(first.report.batches(2))
    assert all(torch.equal(item[column], batch[column][0]) for column in batch)


@needs_data
def test_flipped_labels_are_positive_ones_of_train_alone():
    flipped, clean = (tabular.problem("a9a", tasks.TABULAR_SMOKE, share, 0) for share in (0.3, 0.0))
    before, after = (next(problem.train.batches())["labels"] for problem in (clean, flipped))
    assert (before - after).min() == 0
    assert (before - after).sum() == round(0.3 * int(before.sum()))
    for split in ("observation", "selection", "report"):
        labels = [next(getattr(problem, split).batches())["labels"] for problem in (clean, flipped)]
        assert torch.equal(*labels)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, rival in methods.RIVALS.items() if rival.applies(TOY)])
def test_every_method_spends_the_same(name):
    if name.startswith("cma"):
        pytest.importorskip("cma")
    config = protocol.first_of_grids().config(name)
    record = measure.run_one(TOY, name, 0, config, TINY, {})
    json.dumps(record, allow_nan=False)
    if name == "start":
        assert record["calls"] == {}
        return
    ours = ("metricopt", *comparing.CONTROLS, *comparing.WAYS, "cma_virtual")
    best, curve = record["variants"]["plain"]["scores"]["selection"], record["curve"]
    assert best == record["selected"]["score"]
    if name in ours:
        kinds = [kind for kind in curve["kind"] if kind != BIAS]
        assert kinds == [START, MEAN] or (name in comparing.CONTROLS and kinds == [START])  # all taken back
        assert best in curve["selection"]
        begun = TINY.steps - TINY.metric_steps
        assert curve["step"] == [begun] + [TINY.steps] * (len(curve["step"]) - 1)
        assert 0 < record["calls"]["observe"] <= CALLS[PREDICTIONS] and 0 < record["calls"]["post-hoc"] <= 3 * 160
        assert record["calls"]["select"] >= 2 * (begun // (TINY.steps // TINY.rounds) + 1)  # the looks of both settings
    else:
        observes = name not in ("loss_only", "loss_small", "train_obs", "obs", "formula")
        assert curve["step"] == list(range(21)) and best == max(curve["selection"])
        assert record["calls"].get("observe", 0) == (160 if observes else 0)
        assert record["calls"]["select"] == 21
        assert curve["passes"] == ([8 * turn for turn in range(21)] if observes else [0] * 21)
    assert set(record["variants"]) >= {"plain", "post-hoc"}
    assert 0 < record["variants"]["post-hoc"]["calls"]["post-hoc"] <= 160


@pytest.mark.slow
def test_the_same_run_twice_is_the_same():
    config = protocol.first_of_grids().config("metricopt")
    first, second = (measure.run_one(TOY, "metricopt", 1, config, TINY, {}) for _ in range(2))
    assert first["variants"]["plain"] == second["variants"]["plain"]


@pytest.mark.slow
def test_a_second_start_runs_only_what_is_missing(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(run, "tasks", lambda smoke=False: {"toy": TOY})
    monkeypatch.setattr(run, "ProcessPoolExecutor", Inline)

    def fake(task, method, seed, config, budget, known):
        ran.append((task.name, method, seed))
        return {"task": task.name, "method": method, "seed": seed, "config": config, "seconds": {"whole": 60.0}}

    monkeypatch.setattr(run, "run_one", fake)
    fixed = protocol.first_of_grids()
    some = run.BenchArguments(methods=["loss_only"], seeds=[0])
    assert run.execute(run.plan(some), fixed, tmp_path, some) == 0
    with open(tmp_path / "toy.jsonl", "a") as file:
        file.write('{"task": "toy", "meth')  # killed while writing
    more = run.BenchArguments(methods=["loss_only", "metricopt"], seeds=[0, 1])
    assert run.execute(run.plan(more), fixed, tmp_path, more) == 0
    assert ran == [("toy", m, s) for m, s in (("loss_only", 0), ("metricopt", 0), ("loss_only", 1), ("metricopt", 1))]
    assert len(records.read(tmp_path)) == 4
    fixed.settings["loss_only"] = {"phi_learning_rate": 0.5}
    with pytest.raises(ConfigurationError, match="two protocols"):
        run.execute(run.plan(more), fixed, tmp_path, more)


class Inline:
    """In place of a pool of processes."""

    def __init__(self, jobs, context, initializer):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments))
        return future


def test_ceilings_are_of_the_start():
    for seed in range(3):
        plain, observed, _, itself = ceiling.ceilings(TOY, seed)
        started = measure.run_one(TOY, "start", seed, {}, TINY, {})["variants"]
        assert plain == pytest.approx(started[measure.PLAIN]["scores"]["report"], rel=1e-5)
        assert observed == pytest.approx(started[measure.POST_HOC]["scores"]["report"], rel=1e-5)
        assert itself >= plain


def test_the_estimate():
    done = [
        {"task": "a", "method": "x", "seed": 0, "seconds": {"whole": 60.0}},
        {"task": "b", "method": "y", "seed": 0, "seconds": {"whole": 180.0}},
    ]
    assert run.minutes([("a", "x", 1), ("b", "x", 1), ("a", "y", 0)], done, jobs=1) == 1 + 1 + 3
    assert run.minutes([("a", "z", 1)], done, jobs=2) == 1  # median of all, on two processes
    assert run.minutes([("a", "x", 1)], [], jobs=1) is None


def test_unknown_names_are_refused():
    with pytest.raises(ConfigurationError, match="--methods nothing: there are start, loss_only"):
        run.plan(run.BenchArguments(methods=["nothing"]))


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(
        "import multiprocessing, os, signal\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from benchmarks.run import start_worker\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), start_worker)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    worker = int(done.stdout)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
