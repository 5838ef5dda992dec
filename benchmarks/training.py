"""One run of a method that trains by gradient: `MetricOptTrainer` on a copy of the problem's model.

Every such method has the same phi, start, steps, batches and selection rounds; what differs is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import process_time
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import EvalPrediction

from examples.comparison.methods import LOSS_ONLY
from examples.comparison.study import Start
from metricopt_hf import Ledger, Metric, MetricOptConfig, MetricOptTrainer
from metricopt_hf.phi import Coordinates
from metricopt_hf.training.plan import CHECKS, SELECTIONS

from .problem import Problem, Task

NO_GUIDE = {name: value for name, value in LOSS_ONLY.changes.items() if name != "tune_output_bias"}
# What the library does by default, whatever the metric's time; all that trains and is not MetricOpt observes scores.
# What no run of a benchmark says or keeps, and where it computes
SILENT = {
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
PREDICTIONS = {
    "observe": "predictions",
    "forward_pass_budget": 60,
    "metric_call_budget": 1200,
    "tune_output_bias": True,
}


@dataclass(frozen=True)
class Budget:
    """What every method may spend.

    Attributes:
        steps: optimizer steps.
        rounds: evenly over the steps; in each, one look at the selection split, and `calls` metric calls to observe:
            as many as the library makes.
        batch_size: training examples per step.
    """

    steps: int = 200
    rounds: int = SELECTIONS
    calls: int = CHECKS
    batch_size: int = 64


@dataclass
class Outcome:
    """What a run left.

    Attributes:
        phi: [d] the best of the rounds by the selection split.
        step: at which it was met (black-box searchers: round times steps per round).
        selection: its score there.
        curve: per round "step", "passes" (to observe, before it), "seconds" (so far), "selection", and, where phi was
            trained, "trust" and "coverage" (mean of the calls to observe until the next).
        ledger: metric calls and seconds by purpose.
        seconds: of processor time, of the whole run: on one thread, what else the machine does counts little.
        soup: [d] the mean of phi over the last half of the rounds, where phi was trained.
        outputs: of the splits that are measured, where not the model at phi is what the method says.
    """

    phi: Tensor
    step: int
    selection: float
    curve: list[dict[str, Any]]
    ledger: Ledger
    seconds: float
    soup: Tensor | None = None
    outputs: dict[str, EvalPrediction] | None = None


class Recorder(transformers.TrainerCallback):
    """phi at the start of every round, and the time at the end of every step."""

    def __init__(self, every: int):
        self.every, self.phis, self.ends = every, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.phis.append(self.trainer.phi.read())

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(process_time())


def make_trainer(
    task: Task,
    problem: Problem,
    seed: int,
    budget: Budget,
    folder: str,
    changes: Mapping[str, Any],
    **options: Any,
) -> MetricOptTrainer:
    """A trainer on a copy of the model, with `changes` as a `Method` makes them; `options` are of the trainer."""
    args = MetricOptConfig(
        folder,
        max_steps=budget.steps,
        observe="scores",
        metric_call_budget=budget.rounds * budget.calls,
        tune_output_bias=False,
        lr_scheduler_type="constant",
        metric_start_ratio=0,
        per_device_train_batch_size=budget.batch_size,
        per_device_eval_batch_size=problem.eval_batch,
        greater_is_better=task.greater_is_better,
        label_names=problem.label_names,
        seed=seed,
        **SILENT,
    )
    metric = Metric(task.metric, task.metric_name, task.greater_is_better)
    start = Start(problem.model, args, problem, {"metric": metric, "phi": problem.phi, **options})
    trainer = start.trainer(**changes)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(
    task: Task,
    problem: Problem,
    seed: int,
    budget: Budget,
    folder: str,
    changes: Mapping[str, Any],
    **options: Any,
) -> Outcome:
    """Train phi, and say what came of it; the arguments are those of `make_trainer`."""
    start = process_time()
    recorder = Recorder(budget.steps // budget.rounds)
    recorder.trainer = trainer = make_trainer(
        task, problem, seed, budget, folder, changes, callbacks=[recorder], **options
    )
    trainer.train()
    result = trainer.result
    seconds = process_time() - start
    visited = [*recorder.phis, result.last_phi]
    return Outcome(
        result.best_phi,
        result.best_step,
        result.best_score,
        per_look(result.curve, [0.0, *(end - start for end in recorder.ends)]),
        trainer.ledger,
        seconds,
        torch.stack(visited[len(visited) // 2 :]).mean(0),
    )


def per_look(curve: list[dict[str, Any]], ended: list[float]) -> list[dict[str, Any]]:
    """The curve of a run with one row per look at the selection split; see `Outcome.curve`.

    Args:
        curve: of `MetricPhase`, in which there are rounds of observations between looks.
        ended: seconds after so many steps.
    """
    rows, passes = [], 0
    for entry in curve:
        if entry["selection"] is not None:
            seconds = round(ended[entry["step"]], 2)
            rows.append({"step": entry["step"], "passes": passes, "seconds": seconds, "selection": entry["selection"]})
            rows[-1] |= {"trust": round(entry["trust"], 3), "coverage": []}
        passes = entry["passes"]  # its round came behind its look
        rows[-1]["coverage"] += [entry["coverage"]] * (entry["coverage"] is not None)
    return [{**row, "coverage": float(np.mean(row["coverage"])) if row["coverage"] else None} for row in rows]


def coordinates(task: Task, problem: Problem, seed: int, folder: str) -> Coordinates:
    """The coordinates that MetricOpt would take at the start of the same run."""
    trainer = make_trainer(task, problem, seed, Budget(steps=1), folder, {"value_weight": 0.0, "metric_call_budget": 0})
    trainer.train()
    return trainer.result.coordinates
