"""How the seconds and the memory of a guided run grow with the data, the outputs, phi, the coordinates and the calls.

    python -m benchmarks.growth              (make bench ARGS=growth), some minutes; writes docs/results/growth.md
    python -m benchmarks.growth --calls 100000

One thing is varied at a time, the others stay as in the first row. Every run is a process of its own: seconds are its
processor time, in one thread, and memory is what its peak has beyond the process that it was forked from. The model is
a linear layer with phi as a layer beside it, so that little of either is the model's own. Needs no data.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import numpy as np
import torch
import transformers
from tabulate import tabulate
from threadpoolctl import threadpool_limits
from torch import nn
from transformers import HfArgumentParser

from metricopt_hf import MetricOptConfig, MetricOptTrainer

FEATURES = 8
PAGE = Path(__file__).parents[1] / "docs" / "results" / "growth.md"


@dataclass(frozen=True)
class Size:
    """Of one run."""

    rows: int = 1000
    logits: int = 10
    phi: int = 1000
    coordinates: int = 16
    calls: int = 1000


@dataclass
class GrowthArguments:
    """Which sizes to measure; the first of each is not the base, which is `Size()`."""

    rows: list[int] = field(default_factory=lambda: [100, 10_000, 100_000])
    logits: list[int] = field(default_factory=lambda: [2, 100, 1000])
    phi: list[int] = field(default_factory=lambda: [100, 10_000, 100_000])
    coordinates: list[int] = field(default_factory=lambda: [8, 64, 256])
    calls: list[int] = field(default_factory=lambda: [100, 10_000, 100_000])
    page: str = field(default=str(PAGE), metadata={"help": "Where the table is written to."})


class Adapter(nn.Module):
    """Logits of a linear layer, with phi, another one, beside it on random features."""

    def __init__(self, size: Size):
        super().__init__()
        width = size.phi // size.logits
        self.base = nn.Linear(FEATURES, size.logits)
        self.register_buffer("project", torch.randn(FEATURES, width) / FEATURES**0.5)
        self.phi = nn.Linear(width, size.logits, bias=False)
        nn.init.zeros_(self.phi.weight)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.base(x) + self.phi(torch.tanh(x @ self.project)) / len(self.project.T) ** 0.5
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    """Random features, and classes that a linear layer could tell."""

    def __init__(self, count: int, logits: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, FEATURES, generator=generator)
        layer = torch.randn(FEATURES, logits, generator=torch.Generator().manual_seed(0))
        self.labels = (self.x @ layer).argmax(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[i], "labels": self.labels[i]}


def recall_of_the_worst_half(prediction) -> float:
    """Of the classes: a metric that costs little."""
    right = prediction.predictions.argmax(1) == prediction.label_ids
    recalls = np.bincount(prediction.label_ids, right) / np.maximum(np.bincount(prediction.label_ids), 1)
    return float(np.sort(recalls)[: max(1, len(recalls) // 2)].mean())


def run(size: Size, told: Connection) -> None:
    """One guided run; sends its seconds, its peak memory (bytes of this process), and its metric steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = process_time()
    with TemporaryDirectory() as folder:
        trainer = MetricOptTrainer(
            Adapter(size),
            MetricOptConfig(
                folder,
                max_steps=10,
                metric_steps=10,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=1000,
                phi=r"^phi\.weight$",
                phi_dim=size.coordinates,
                metric_call_budget=size.calls,
                greater_is_better=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Rows(1000, size.logits, 1),
            observation_dataset=Rows(size.rows, size.logits, 2),
            selection_dataset=Rows(1000, size.logits, 3),
            metric=recall_of_the_worst_half,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told.send((process_time() - start, peak, len(trainer.result.curve)))


def measured(size: Size) -> tuple[float, float, int]:
    """Seconds, bytes and metric steps of a run, in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    process = context.Process(target=run, args=(size, theirs))
    process.start()
    theirs.close()
    try:
        seconds, peak, steps = ours.recv()
    except EOFError:
        raise SystemExit(f"The run of {size} ended without a result.") from None
    process.join()
    return seconds, max(0, peak - before), steps


def sizes(args: GrowthArguments) -> Iterator[tuple[str, Size]]:
    """What is varied, and the run; the base comes first."""
    yield "", Size()
    for name in ("rows", "logits", "phi", "coordinates", "calls"):
        for value in getattr(args, name):
            yield name, replace(Size(), **{name: value})


def page(rows: list[list[str]]) -> str:
    """The page with the table."""
    headers = ["observation rows", "logits", "phi", "coordinates", "metric calls", "steps", "seconds", "MiB"]
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=["right"] * len(headers))
    return (
        "# Growth\n\n"
        "Written by `python -m benchmarks.growth`; do not edit.\n\n"
        "Seconds (processor time in one thread) and memory (peak beyond the libraries) of a guided run, by the size of "
        "what it is about. One thing is varied at a time, in bold; the first row is what the others differ from.\n\n"
        f"{table}\n\n"
        "A run has ten metric steps, and fewer where three in a row made the metric worse. Calls are the most that it "
        "may make; observations that are kept are bounded, and so is what a checkpoint holds.\n"
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(GrowthArguments).parse_args_into_dataclasses(argv)
    transformers.logging.set_verbosity_error()
    threadpool_limits(1)  # the runs are forked from this process and inherit it
    rows = []
    for name, size in sizes(args):
        seconds, memory, steps = measured(size)
        cells = {key: f"**{value:,}**" if key == name else f"{value:,}" for key, value in vars(size).items()}
        rows.append([*cells.values(), f"{steps}", f"{seconds:.1f}", f"{memory / 2**20:,.0f}"])
        print(*rows[-1], flush=True)
        Path(args.page).write_text(page(rows))
    print(f"Written to {args.page}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
