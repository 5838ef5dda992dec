"""How the seconds and the memory of a guided run grow with the data, the outputs, phi, the coordinates and the calls.

    python -m benchmarks.growth              (make bench ARGS=growth), some minutes; writes docs/results/growth.md
    python -m benchmarks.growth --calls 100000

One thing is varied at a time, the others stay as in the first row. Every run is a process of its own: seconds are its
processor time, in one thread, and memory is how far its peak is above where it started; one that
takes longer than `--most_seconds` is ended, and has no figures. The model is a linear layer with phi as a layer beside
it, so that little of either is the model's own. Needs no data.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
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
    most_seconds: int = field(default=360, metadata={"help": "Of processor time, of one run."})
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


def run(size: Size, told: Connection, most_seconds: int) -> None:
    """One guided run; sends its seconds, the bytes by which its memory grew, and its metric steps."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CPU, (most_seconds, most_seconds))
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
    told.send((process_time() - start, max(0, peak - before), len(trainer.result.curve)))


def measured(size: Size, most_seconds: int) -> tuple[float, float, int] | None:
    """Seconds, bytes and metric steps of a run, in a process of its own; None where it was ended, being too slow."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(size, theirs, most_seconds))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()  # sets its exit code
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return None
        raise SystemExit(f"The run of {size} ended without a result.") from None
    finally:
        process.join()


def sizes(args: GrowthArguments) -> list[tuple[str, Size]]:
    """What is varied, and the run; the base comes first."""
    names = ("rows", "logits", "phi", "coordinates", "calls")
    return [("", Size()), *((name, replace(Size(), **{name: n})) for name in names for n in getattr(args, name))]


def cells(name: str, size: Size, found: tuple[float, float, int] | None) -> list[str]:
    """A row of the table."""
    of_size = [f"**{value:,}**" if key == name else f"{value:,}" for key, value in vars(size).items()]
    if found is None:
        return [*of_size, "", "not measured", ""]
    seconds, memory, steps = found
    return [*of_size, f"{steps}", f"{seconds:.1f}", f"{memory / 2**20:,.0f}"]


def page(rows: list[list[str]], most_seconds: int) -> str:
    """The page with the table."""
    headers = ["observation rows", "logits", "phi", "coordinates", "metric calls", "steps", "seconds", "MiB"]
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=["right"] * len(headers))
    return (
        "# Growth\n\n"
        "Written by `python -m benchmarks.growth`; do not edit.\n\n"
        "Seconds (processor time in one thread) and memory (peak above the start, pages of libraries included) of a "
        "guided run, by the size of what it is about. One thing is varied at a time, in bold; the first row is what "
        "the others differ from.\n\n"
        f"{table}\n\n"
        "A run has ten metric steps, and fewer where three in a row made the metric worse. Calls are the most that it "
        "may make; observations that are kept are bounded, and so is what a checkpoint holds. "
        f'"Not measured" took more than {most_seconds:,} s, and was ended.\n'
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(GrowthArguments).parse_args_into_dataclasses(argv)
    transformers.logging.set_verbosity_error()
    threadpool_limits(1)  # the runs are forked from this process and inherit it
    found: dict[int, list[str]] = {}
    places = sizes(args)
    factor = [max(a / b for a, b in zip(vars(s).values(), vars(Size()).values(), strict=True)) for _, s in places]
    for place in sorted(range(len(places)), key=factor.__getitem__):  # the cheap ones first
        found[place] = cells(*places[place], measured(places[place][1], args.most_seconds))
        print(*found[place], flush=True)
        Path(args.page).write_text(page([found[i] for i in sorted(found)], args.most_seconds))
    print(f"Written to {args.page}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
