"""Measures `metricopt_hf.experimental.Bridge`: sorting ten numbers, and k-means codes inside of a classifier of digits.

    python -m benchmarks.bridge_sorting --minutes 60            (make bench ARGS="bridge --minutes 60")

Sorting is the first experiment of the paper on differentiable approximation bridges (Ramapuram and Webb, arXiv
1905.03658), with its sizes: an encoder 10-128-128-256 with tanh, signum with a margin of 0.5, an output 256-100, the
approximator 256-128-128-256, Adam with 1e-4, batches of 1,024. A test example counts as right where all ten places are.
Every run has the same share of `--minutes`, in processor time of one thread. Writes docs/results/bridge.md and the
learning curves in bridge.csv beside it.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from examples.comparison.report import mean_and_error, require
from metricopt_hf.experimental import Bridge

from . import bridge_codes
from .run import quiet

LENGTH, HIDDEN, LATENT, MARGIN = 10, 128, 256, 0.5
BATCH, LEARNING_RATE, TESTED = 1024, 1e-4, 8192
POINTS = 8  # of a learning curve
PUBLISHED = (
    "Published: 94.2 %; the authors' code (apple/ml-dab) prints 94.64 % after 2,168 epochs of 2 million examples, some "
    "4.2 million steps."
)


@dataclass
class SortingArguments:
    """How long to measure."""

    minutes: float = field(default=6.0, metadata={"help": "Processor time for all runs of sorting together."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds, of both experiments."})
    output: str = field(
        default=str(Path(__file__).resolve().parents[1] / "docs" / "results"), metadata={"help": "Folder of the page."}
    )


def signum(x: Tensor) -> Tensor:
    """-1, 0 or 1, with zero between -MARGIN and MARGIN."""
    return (x > MARGIN).to(x.dtype) - (x < -MARGIN).to(x.dtype)


class StraightThrough(nn.Module):
    """A hard function whose gradient is taken to be the identity."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.function(x.detach()) - x.detach())


class GumbelSoftmax(nn.Module):
    """-1, 0 or 1 drawn by three logits a number (straight-through, temperature 1); the likeliest in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        logits = x.unflatten(-1, (-1, 3))
        if self.training:
            chosen = F.gumbel_softmax(logits, hard=True)
        else:
            chosen = F.one_hot(logits.argmax(-1), 3).to(x.dtype)
        return chosen @ chosen.new_tensor([-1.0, 0.0, 1.0])


def perceptron(*sizes: int) -> list[nn.Module]:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return layers[:-1]


def sorter(method: str) -> nn.Sequential:
    """[n, 10] numbers -> [n, 100], of each place ten logits for which number belongs there."""
    hard = {
        "bridge": lambda: Bridge(signum, nn.Sequential(*perceptron(LATENT, HIDDEN, HIDDEN, LATENT))),
        "straight-through": lambda: StraightThrough(signum),
        "Gumbel-softmax": GumbelSoftmax,
    }[method]()
    width = 3 * LATENT if method == "Gumbel-softmax" else LATENT
    last = [] if method == "Gumbel-softmax" else [nn.Tanh()]
    return nn.Sequential(*perceptron(LENGTH, HIDDEN, HIDDEN, width), *last, hard, nn.Linear(LATENT, LENGTH * LENGTH))


METHODS = ("bridge", "straight-through", "Gumbel-softmax")


@torch.no_grad()
def right(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """The share of examples with all places right, and the share of places."""
    model.eval()
    hits = model(x).unflatten(-1, (LENGTH, LENGTH)).argmax(-1) == x.argsort(-1)
    model.train()
    return float(hits.all(1).float().mean()), float(hits.float().mean())


def learn(method: str, seed: int, seconds: float) -> list[dict]:
    """The learning curve of one run: rows with "seconds", "steps", "loss", "examples" and "places"."""
    torch.manual_seed(seed)
    test = torch.rand(TESTED, LENGTH)
    model, curve, steps, spent = sorter(method), [], 0, 0.0
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    for point in range(1, POINTS + 1):
        start = process_time()
        while spent + process_time() - start < seconds * point / POINTS:
            x = torch.rand(BATCH, LENGTH)
            logits = model(x).unflatten(-1, (LENGTH, LENGTH))
            loss = F.cross_entropy(logits.flatten(0, 1), x.argsort(-1).flatten(), reduction="sum") / BATCH
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        spent += process_time() - start
        examples, places = right(model, test)
        row = {"method": method, "seed": seed, "seconds": round(spent, 2), "steps": steps}
        shares = {"loss": loss.item(), "examples": examples, "places": places}
        curve.append({**row, **{name: round(value, 4) for name, value in shares.items()}})
    return curve


def table(rows: list[dict], seeds: list[int]) -> str:
    """Of each method, at some moments of its time: steps, and shares right with the standard error over seeds."""
    cells = []
    for method in METHODS:
        curves = [[row for row in rows if row["method"] == method and row["seed"] == seed] for seed in seeds]
        for point in (POINTS // 4, POINTS // 2, POINTS):
            now = [curve[point - 1] for curve in curves]
            shares = (mean_and_error([row[name] for row in now]) for name in ("places", "examples"))
            seconds, steps, loss = (mean(row[name] for row in now) for name in ("seconds", "steps", "loss"))
            means = (f"{seconds:.0f}", f"{steps:.0f}", f"{loss:.2f}")
            cells.append([method, *means, *(f"{m:.4f} ± {e:.4f}" for m, e in shares)])
    headers = ["method", "seconds", "steps", "training loss", "places right", "all ten right"]
    return require("tabulate", "report").tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def page(arguments: SortingArguments, rows: list[dict], codes: list[dict]) -> str:
    most = max(row["steps"] for row in rows)
    return "\n".join(
        [
            "# Bridges",
            "",
            "Written by `python -m benchmarks.bridge_sorting` from what it measured; do not edit.",
            "",
            "`Bridge` carries a gradient past a function that has none. What that is worth beside the straight-through "
            "estimator, which takes the function for the identity, and, where the function draws from categories, "
            "beside Gumbel-softmax:",
            "",
            "## Sorting ten numbers",
            "",
            f"{arguments.minutes:g} minutes of one core in all, {len(arguments.seeds)} seeds, {TESTED} test examples; "
            f"mean and standard error over seeds. {PUBLISHED} Here no run took more than {most:,} steps, so this is "
            "the very beginning of the curve, and says who starts faster, not who ends better. By chance 0.1 of the "
            "places are right. Every batch is drawn anew. For Gumbel-softmax the encoder's last layer gives three "
            "logits a number, as it chooses among three.",
            "",
            table(rows, arguments.seeds),
            "",
            "## k-means codes inside of a classifier of digits",
            "",
            bridge_codes.section(codes),
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(SortingArguments).parse_args_into_dataclasses(argv)
    quiet()
    runs = [(method, seed) for seed in arguments.seeds for method in METHODS]
    seconds, rows = 60 * arguments.minutes / len(runs), []
    for method, seed in tqdm(runs, desc="sorting"):
        rows += learn(method, seed, seconds)
    codes = bridge_codes.measure(arguments.seeds)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "bridge.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (output / "bridge.md").write_text(page(arguments, rows, codes), encoding="utf-8")
    print((output / "bridge.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
