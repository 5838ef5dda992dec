"""What guidance costs per training step, between observations, against plain Trainer on the same frozen model.

    python -m benchmarks.overhead            (make bench ARGS=overhead)
    python -m benchmarks.overhead --device cuda --models ViT-B/16 ResNet-50 ViT-S/16

On a CPU it is measured with one thread, and with as many as there are cores beside workers that load the data, where
whoever starts threads for small products loses most.

Both trainers run the same steps on copies of the same model with the same phi, alternately, so that whatever else the
machine does hits both; the figure is the median over pairs of the ratio of their median step times. Needs no data.

glibc is told to keep freed memory: where it gives it back after every step, as in plain Trainer's runs here, the pages
have to be faulted in again, and plain Trainer seemed 9 % slower than the same steps guided.
"""

from __future__ import annotations

import copy
import ctypes
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple

import numpy as np
import timm
import torch
import transformers
from tabulate import tabulate
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from metricopt_hf import (
    FiLM,
    GuideContext,
    MetricOptConfig,
    MetricOptTrainer,
    Observation,
    Round,
    Subset,
    Trajectory,
    ValueFunctionGuide,
)
from metricopt_hf.guides.blend import correction
from metricopt_hf.guides.trust import PREDICTIVE
from metricopt_hf.phi import Coordinates, random_basis

from . import cifar
from .problem import Rows

WARM_UP = 5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
LIMITS = {"cpu": 1.03, "cuda": 1.05}


@dataclass
class OverheadArguments:
    """What to measure."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    models: list[str] = field(
        default_factory=lambda: ["ResNet-20", "small ViT"], metadata={"help": "Of ResNet-20, small ViT, ViT-B/16, ..."}
    )
    workers: int = field(default=2, metadata={"help": "Workers that load the data; on a CPU, beside all threads."})
    pairs: int = field(default=9, metadata={"help": "Pairs of runs per model."})
    steps: int = field(default=40, metadata={"help": "Timed steps of a run."})
    processor_time: bool = field(
        default=False, metadata={"help": "Count seconds of processor time, where other work shares the machine."}
    )
    phi_sizes: list[int] = field(
        default_factory=lambda: [100, 1_000, 10_000, 100_000, 1_000_000], metadata={"help": "phi to blend in."}
    )
    observations: list[int] = field(
        default_factory=lambda: [100, 1_000, 10_000], metadata={"help": "Observations to fit a value function to."}
    )


class WithLoss(nn.Module):
    """A timm model as Trainer wants it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels):
        logits = self.model(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def small_vit() -> nn.Module:
    return WithLoss(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, num_classes=10
        )
    )


class Setting(NamedTuple):
    """A model, and the batches on which it is trained."""

    make: Callable[[], nn.Module]
    batch_size: int
    image_size: int = 32


def timm_model(name: str) -> Callable[[], nn.Module]:
    return lambda: WithLoss(timm.create_model(name, num_classes=10))


MODELS = {
    "ResNet-20": Setting(cifar.CifarResNet, 64),
    "small ViT": Setting(small_vit, 64),
    "ViT-B/16": Setting(timm_model("vit_base_patch16_224"), 64, 224),
    "ResNet-50": Setting(timm_model("resnet50"), 128, 224),
    "ViT-S/16": Setting(timm_model("vit_small_patch16_224"), 16, 224),
}
ON_GPU = ["ViT-B/16", "ResNet-50", "ViT-S/16"]


def noise(count: int, size: int) -> Rows:
    """Random images and classes."""
    columns = {"pixel_values": torch.randn(count, 3, size, size), "labels": torch.randint(10, (count,))}
    return Rows(columns, np.arange(count), "noise")


def observations(count: int, dim: int, seed: int = 0) -> Trajectory:
    """Noisy values of a quadratic, whose optimum is not where phi starts: there no direction is certain."""
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(count, dim)).astype(np.float32)
    scores = -((z - 1) ** 2).sum(1) + generator.normal(size=count)
    return Trajectory([Observation(z[i], float(scores[i]), 1.0, i // 8, 0.0) for i in range(count)])


def context(coordinates: Coordinates) -> GuideContext:
    """Of a guide that never calls the metric."""
    return GuideContext(coordinates, True, torch.Generator().manual_seed(0), lambda prediction: float("nan"))


class ReadyGuide(ValueFunctionGuide):
    """Fitted and trusted from the start, so that every step is blended and none observes."""

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.fit(observations(160, context.coordinates.dim))
        self.trust.evidence, self.trust.correlation_sum = 1000.0, 500.0


class FrozenTrainer(Trainer):
    """Plain Trainer on the frozen model in eval mode: what the metric phase is without the guidance."""

    def compute_loss(self, model, *args, **kwargs):
        model.eval()
        return super().compute_loss(model, *args, **kwargs)


class Clock(TrainerCallback):
    """When each step ended; the run ends behind so many."""

    def __init__(self, steps: int, now: Callable[[], float]):
        self.steps, self.now, self.ends = steps, now, []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(self.now())
        control.should_training_stop = len(self.ends) == self.steps

    @property
    def step(self) -> float:
        return median(np.diff(self.ends)[WARM_UP:])


def step_seconds(
    model: nn.Module, guided: bool, args: OverheadArguments, data: Rows, batch_size: int, workers: int, folder: str
) -> float:
    clock = Clock(args.steps + WARM_UP + 1, process_time if args.processor_time else perf_counter)
    on_cpu, few = args.device == "cpu", Rows(data.columns, np.arange(8), data.pool)
    common = {
        "max_steps": 20 * clock.steps,  # of which only the first are taken: so none is beside a look
        "per_device_train_batch_size": batch_size,
        "dataloader_num_workers": workers,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if guided:
        config = MetricOptConfig(
            folder,
            metric_start_ratio=0,
            metric_call_budget=0,
            greater_is_better=True,
            **common,
        )
        trainer = MetricOptTrainer(
            model,
            config,
            train_dataset=data,
            observation_dataset=few,
            selection_dataset=few,
            metric=lambda prediction: 0.5,
            guide=ReadyGuide(),
            coordinates="random",  # found at once
            callbacks=[clock],
        )
    else:
        phi = FiLM(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in phi.names)
        trainer = FrozenTrainer(model, TrainingArguments(folder, **common), train_dataset=data, callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert not guided or trainer.phase.direction.reason == PREDICTIVE
    return clock.step


def ratios(name: str, args: OverheadArguments, threads: int, workers: int) -> list[str]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    make, batch_size, size = MODELS[name]
    model, count = make(), 4 * batch_size
    data = noise(count, size)
    plain, guided = [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in tqdm(range(args.pairs), desc=f"{name}, {threads} threads"):
            for is_guided in (False, True) if pair % 2 else (True, False):
                seconds = step_seconds(copy.deepcopy(model), is_guided, args, data, batch_size, workers, folder)
                (guided if is_guided else plain).append(seconds)
    ratio, limit = median(g / p for g, p in zip(guided, plain, strict=True)), LIMITS[args.device]
    return [
        name,
        f"{batch_size}",
        f"{threads}",
        f"{workers}",
        f"{1000 * median(plain):.2f}",
        f"{1000 * median(guided):.2f}",
        f"{ratio:.3f}",
        f"{'yes' if ratio <= limit else 'NO'} ({limit})",
    ]


HEADERS = ["model", "batch", "CPU threads", "workers", "Trainer, ms", "guided, ms", "ratio (of pairs)", "as hoped"]


def step_rows(args: OverheadArguments) -> list[list[str]]:
    """A row per model: on a CPU with one thread alone, and with a thread per core beside workers."""
    cores = os.cpu_count()
    settings = [(cores, args.workers)] if args.device != "cpu" else [(1, 0), (cores, args.workers)]
    before = torch.get_num_threads()
    try:
        return [ratios(name, args, *setting) for name in args.models for setting in settings]
    finally:
        torch.set_num_threads(before)


def blending_milliseconds(size: int) -> float:
    """One correction: read phi, predict the direction, blend; with the default coordinates."""
    model = nn.Module()
    model.register_parameter("phi", nn.Parameter(torch.zeros(size)))
    model.phi.grad = torch.randn(size)
    phi, guide = Subset(model, "phi"), ReadyGuide()
    basis = random_basis(size, min(MetricOptConfig.phi_dim, size), torch.Generator().manual_seed(0))
    guide.start(context(Coordinates(phi.read(), basis)))
    times = []
    for _ in range(30):
        start = perf_counter()
        direction = guide.direction(phi.read())
        phi.add_grad(correction(phi.read_grad(), direction.vector, direction.trust, MetricOptConfig.value_weight))
        times.append(perf_counter() - start)
    return 1000 * median(times)


def fit_seconds(count: int) -> float:
    """A warm refit of the value function, as after each round."""
    guide = ReadyGuide()
    guide.start(context(Coordinates(torch.zeros(MetricOptConfig.phi_dim), None)))
    trajectory = observations(count, MetricOptConfig.phi_dim)
    start = perf_counter()
    guide.observe(Round(trajectory))
    return perf_counter() - start


def keep_freed_memory() -> None:
    """Have glibc keep up to 2 GB of freed memory in this process; does nothing under another C library."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, 2_000_000_000)


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(OverheadArguments).parse_args_into_dataclasses(argv)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    rows = step_rows(args)
    kind = "processor time" if args.processor_time else "wall-clock time"
    print(f"\nA step on {args.device}, {kind}, median of {args.steps}, {args.pairs} pairs\n")
    print(tabulate(rows, HEADERS, disable_numparse=True))
    print("\nBlending in one step\n")
    print(tabulate([[f"{n:,}", f"{blending_milliseconds(n):.2f}"] for n in args.phi_sizes], ["phi", "ms"]))
    print("\nFitting the value function after a round\n")
    print(tabulate([[f"{n:,}", f"{fit_seconds(n):.2f}"] for n in args.observations], ["observations", "s"]))
    print(f"\nPeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    return 0 if all(row[-1].startswith("yes") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
