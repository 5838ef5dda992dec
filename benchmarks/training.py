"""One run of MetricOpt on a problem, with whatever guide: the last steps of `MetricOptTrainer` on a trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any

import transformers
from torch import Tensor
from transformers import EvalPrediction

from examples.comparison.study import Start
from metricopt_hf import Ledger, Metric, MetricOptConfig, MetricOptTrainer, RunResult

from .problem import Problem, Task

# What no run of a benchmark says or keeps, and where it computes
SILENT = {
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Budget:
    """What every method may spend.

    Attributes:
        steps: optimizer steps of what trains by the loss alone.
        rounds: evenly over these steps, or of a searcher; in each, one look at the selection split, and `calls` metric
            calls of a searcher.
        batch_size: training examples per step.
        metric_steps: of MetricOpt, whose metric calls are the library's default.
    """

    steps: int = 200
    rounds: int = 20
    calls: int = 8
    batch_size: int = 64
    metric_steps: int = 10


@dataclass
class Outcome:
    """What a run left.

    Attributes:
        phi: [d] what the run has chosen by the selection split.
        step: at which it was met (black-box searchers: round times steps per round).
        selection: its score there.
        curve: per look at the selection split "step", "passes" (to observe, before it), "seconds" (so far) and
            "selection".
        ledger: metric calls and seconds by purpose.
        seconds: of processor time, of the whole run: on one thread, what else the machine does counts little.
        soup: [d] the mean of phi over the last half of the rounds, where phi was trained by the loss.
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


class StepTimes(transformers.TrainerCallback):
    """Processor time at the end of every step."""

    def __init__(self):
        self.ends: list[float] = []

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
    """A trainer on a copy of the model.

    Args:
        changes: to the library's defaults.
        options: of the trainer.
    """
    args = MetricOptConfig(
        folder,
        max_steps=budget.metric_steps,
        metric_steps=budget.metric_steps,
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
    """Go up the metric, and say what came of it; the arguments are those of `make_trainer`."""
    start, times = process_time(), StepTimes()
    trainer = make_trainer(task, problem, seed, budget, folder, changes, callbacks=[times], **options)
    trainer.train()
    seconds, result = process_time() - start, trainer.result
    return Outcome(
        result.best_phi,
        result.best_step,
        result.best_score,
        per_look(result, [0.0, *(end - start for end in times.ends)]),
        result.ledger,
        seconds,
    )


def per_look(result: RunResult, ended: Sequence[float]) -> list[dict[str, Any]]:
    """The curve of a run with one row per look at the selection split; see `Outcome.curve`.

    Args:
        ended: seconds after so many steps.
    """
    passes = {row["step"] + 1: row["passes"] for row in result.curve}
    rows = []
    for candidate in result.candidates:
        spent = max((count for step, count in passes.items() if step <= candidate.step), default=0)
        row = {"step": candidate.step, "passes": spent, "seconds": round(ended[candidate.step], 2)}
        rows.append({**row, "selection": candidate.score, "kind": candidate.kind})
    return rows
