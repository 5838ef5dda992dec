"""Of a phi of tens of thousands of numbers: do coordinates from a random sketch of J^T J lead as far as exact ones?

    python -m benchmarks.wide_phi            (make bench ARGS=wide-phi), writes docs/results/wide_phi.md

MetricOpt goes up the metric from the start model, three times: in FiLM's few hundred numbers, and in a wide phi, in
coordinates by the library's sketch and in exact ones. These are the leading eigenvectors of J J^T, which is as large as
the rows allow, carried over to phi.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers import HfArgumentParser

from examples.comparison.report import mean_and_error
from metricopt_hf import Ledger, MetricOptConfig, PhiSpace, Subset
from metricopt_hf.linear import linearizer as linearizers
from metricopt_hf.phi import adapter
from metricopt_hf.phi.coordinates import Sketch

from .looks import evaluator
from .pages import page
from .problem import Problem, Task, no_data
from .run import quiet
from .searchers import linearizer
from .tables import markdown
from .tasks import tasks
from .training import Budget, train

PAGE = Path(__file__).parents[1] / "docs" / "results" / "wide_phi.md"
HEADERS = ["task", "phi", "numbers", "start", "FiLM", "wide, sketch", "wide, exact", "sketch - exact", "variance kept"]


class ExactSketch(Sketch):
    """The same directions from all derivatives, which are held."""

    def __init__(self, phi_dim: int, dim: int):
        super().__init__(phi_dim, dim)
        self.rows: list[Tensor] = []

    def add(self, jacobian: Tensor) -> None:
        centred = jacobian - jacobian.mean(1, keepdim=True) if jacobian.shape[1] > 1 else jacobian
        self.rows.append(centred.flatten(0, 1))

    def directions(self) -> Tensor:
        rows = torch.cat(self.rows)
        values, vectors = torch.linalg.eigh((rows @ rows.T).double())
        leading = vectors[:, -self.dim :].flip(-1) / values[-self.dim :].flip(-1).sqrt()
        return torch.linalg.qr(rows.T @ leading.float()).Q


def lora(problem: Problem) -> Problem:
    """A problem whose phi is a LoRA on the two layers of the last block's MLP."""
    config = peft.LoraConfig(r=8, target_modules=["intermediate.dense", "output.dense"])
    torch.manual_seed(0)
    return replace(problem, model=peft.get_peft_model(copy.deepcopy(problem.model), config).eval(), phi=adapter)


def weights(problem: Problem) -> Problem:
    """A problem whose phi are all weights of the hidden layers."""

    def phi(model: nn.Module) -> PhiSpace:
        return Subset(model, r"linear\d\.weight")

    return replace(problem, phi=phi)


WIDE: dict[str, tuple[str, Callable[[Problem], Problem]]] = {
    "stsb_pool": ("LoRA, r = 8, on two layers", lora),
    "a9a_groups": ("all weights of both hidden layers", weights),
}


@dataclass
class WidePhiArguments:
    """What to measure."""

    tasks: list[str] = field(default_factory=lambda: list(WIDE), metadata={"help": ", ".join(WIDE)})
    seeds: list[int] = field(default_factory=lambda: list(range(100, 105)), metadata={"help": "Development seeds."})
    page: str = field(default=str(PAGE), metadata={"help": "Where the table is written to."})


def exactly() -> AbstractContextManager:
    """Inside, coordinates are exact."""
    return patch.object(linearizers, "Sketch", ExactSketch)


def variance_kept(task: Task, problem: Problem, seed: int) -> float:
    """How much of what exact coordinates hold of J's squares those of the sketch hold, at the start."""

    def held(context: AbstractContextManager) -> float:
        phi = problem.phi(copy.deepcopy(problem.model))
        with context:
            observation = evaluator(task, problem, phi, problem.observation, Ledger())
            made, prediction = linearizer(observation, seed), observation.predictions()
            linear = made.linearize(made.coordinates(prediction).basis, prediction)
        (leaf,) = linear.leaves.values()
        slopes = leaf.jacobian if leaf.jacobian.dim() > 2 else leaf.jacobian[:, None]
        return float((slopes - slopes.mean(1, keepdim=True) if slopes.shape[1] > 1 else slopes).square().sum())

    return held(nullcontext()) / held(exactly())


def ended(task: Task, problem: Problem, seed: int) -> float:
    """The score on the selection split of the model that comes out."""
    with TemporaryDirectory() as folder:
        return train(task, problem, seed, Budget(), folder, {}).selection


def row(task: Task, seeds: list[int]) -> list[str]:
    """The table's row of a task."""
    title, widen = WIDE[task.name]
    found, kept, dim = [], [], 0
    for seed in seeds:
        narrow = task.prepare(seed)
        wide = widen(task.prepare(seed))
        dim = len(wide.start())
        start = task.metric(narrow.outputs(narrow.start())["selection"])
        scores = [start, ended(task, narrow, seed), ended(task, wide, seed)]
        with exactly():
            scores.append(ended(task, wide, seed))
        found.append(scores)
        kept.append(variance_kept(task, wide, seed))
        print(task.name, seed, *(f"{score:.4f}" for score in scores), f"{kept[-1]:.4f}", flush=True)
    columns = np.array(found)
    cells = [mean_and_error(column.tolist()) for column in (*columns.T, columns[:, 2] - columns[:, 3])]
    told = [f"{mean:.4f} ± {error:.4f}" for mean, error in cells]
    return [f"`{task.name}`", title, f"{dim:,}", *told, f"{np.mean(kept):.4f}"]


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(WidePhiArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    quiet()
    torch.set_num_threads(1)
    known = tasks()
    table = markdown(HEADERS, [row(known[name], args.seeds) for name in args.tasks])
    text = page(
        "# Wide phi",
        "Written by `python -m benchmarks.wide_phi`; do not edit.",
        f"MetricOpt from the start model, in {Budget().metric_steps} metric steps and {MetricOptConfig.phi_dim} "
        "coordinates: scores on the selection split, which chooses among three candidates, mean ± standard error over "
        f"development seeds {args.seeds[0]} to {args.seeds[-1]}. Coordinates of a wide phi are found by a sketch of "
        "J^T J, in memory that is linear in phi; the exact ones need all of J at once. Variance kept is the sum of "
        "squares of J at the start in the sketch's coordinates, over that in exact ones.",
        table,
    )
    Path(args.page).write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
