"""One run and its record: a method on a task with a seed, measured on the splits, as one JSON line."""

from __future__ import annotations

import functools
import resource
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from transformers import EvalPrediction

from metricopt_hf import Ledger, Metric
from metricopt_hf.posthoc import add_bias, tune_bias

from .by_loss import POST_HOC_CALLS
from .methods import RIVALS
from .problem import Problem, Rows, Task, take
from .records import rounded
from .scaling import scaled, tune_scale_and_bias
from .training import Budget, Outcome

REPLICATES = 100  # of the bootstrap over items
PLAIN, POST_HOC, SCALE, SOUP = "plain", "post-hoc", "post-hoc, scale and bias", "soup"


@functools.lru_cache(maxsize=4)
def item_counts(pool: str, size: int, replicates: int = REPLICATES) -> np.ndarray:
    """[replicates, size] how often each item of a pool is drawn: Poisson with mean 1.

    The same for all methods, tasks and seeds, so that differences stay paired, and splits of different seeds that share
    items are drawn alike (Owen's pigeonhole bootstrap).
    """
    generator = np.random.default_rng(zlib.crc32(pool.encode()))
    return generator.poisson(1.0, (replicates, size)).astype(np.uint8)


def item_bootstrap(task: Task, rows: Rows, prediction: EvalPrediction) -> list[float]:
    """The metric on each replicate of the split."""
    counts = item_counts(rows.pool, len(rows.columns["labels"]))[:, rows.rows]
    drawn = (np.repeat(np.arange(len(rows)), count) for count in counts)
    return [task.metric(take(prediction, i)) for i in drawn]


def variants(task: Task, problem: Problem, method: str, outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Scores of the run's phi, and of what costs no training: its soup, and post-hoc tuning on the observation split.

    The soup competes with the best round on the selection split, which is one call more.
    """
    metric = Metric(task.metric, task.metric_name, task.greater_is_better)

    def row(outputs: Mapping[str, EvalPrediction], **more: Any) -> dict[str, Any]:
        scores = {name: task.metric(output) for name, output in outputs.items()}
        return {"scores": scores, "items": item_bootstrap(task, problem.report, outputs["report"]), **more}

    made = {PLAIN: outcome.outputs or problem.outputs(outcome.phi)}
    rows = {PLAIN: row(made[PLAIN], calls={})}
    if RIVALS[method].soup:
        soup = problem.outputs(outcome.soup)
        used = metric.sign * (task.metric(soup["selection"]) - rows[PLAIN]["scores"]["selection"]) >= 0
        made[SOUP] = soup if used else made[PLAIN]
        alone = {name: task.metric(output) for name, output in soup.items()}
        rows[SOUP] = row(made[SOUP], calls={"select": 1}, used=used, alone=alone)
    if task.decides and not RIVALS[method].needs_group:  # whose decisions are made
        for name, outputs in list(made.items()):
            ledger = Ledger()
            bias = tune_bias(metric, outputs["observation"], ledger, POST_HOC_CALLS)
            calls = {**rows[name]["calls"], "post-hoc": ledger.calls["post-hoc"]}
            tuned = {split: add_bias(output, bias) for split, output in outputs.items()}
            title = POST_HOC if name == PLAIN else f"{name}, {POST_HOC}"
            rows[title] = row(tuned, calls=calls, bias=bias.tolist(), seconds=ledger.seconds["post-hoc"])
        ledger = Ledger()
        scale, bias = tune_scale_and_bias(metric, made[PLAIN]["observation"], ledger, POST_HOC_CALLS)
        tuned = {split: scaled(output, scale, bias) for split, output in made[PLAIN].items()}
        calls, numbers = {"post-hoc": ledger.calls["post-hoc"]}, {"scale": scale.tolist(), "bias": bias.tolist()}
        rows[SCALE] = row(tuned, calls=calls, **numbers, seconds=ledger.seconds["post-hoc"])
    return rows


def run_one(
    task: Task, method: str, seed: int, config: Mapping[str, Any], budget: Budget, context: Mapping[str, Any]
) -> dict[str, Any]:
    """Run, measure, and say all about it.

    Args:
        context: what the caller knows: commit, versions.
    """
    start = perf_counter()
    problem = task.prepare(seed)
    reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        outcome = RIVALS[method].run(task, problem, seed, budget, folder, config)
    peak = peak_memory()
    spent = {name: seconds for name, seconds in outcome.ledger.seconds.items() if seconds}
    record = {
        "task": task.name,
        "method": method,
        "seed": seed,
        "config": dict(config),
        "budget": asdict(budget),
        **context,
        "splits": {name: {"size": len(rows), "rows": rows.digest} for name, rows in problem.items()},
        "calls": {name: calls for name, calls in outcome.ledger.calls.items() if calls},
        "passes": {name: passes for name, passes in outcome.ledger.passes.items() if passes},
        "seconds": {"run": outcome.seconds, **spent},
        "peak_mib": peak,
        "selected": {"step": outcome.step, "score": outcome.selection},
        "curve": {key: [row.get(key) for row in outcome.curve] for key in (outcome.curve or [{}])[0]},
        "variants": variants(task, problem, method, outcome),
    }
    record["seconds"]["whole"] = perf_counter() - start
    return rounded(record)


def reset_peak_memory() -> None:
    """Let the kernel forget the process's peak, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory() -> float:
    """MiB, of this process since `reset_peak_memory`."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
