"""What guidance costs per training step, between observations, against plain Trainer on the same frozen model.

    python -m benchmarks.overhead            (make bench-overhead)

Both trainers run the same steps on copies of the same model with the same phi, alternately, so that whatever else the
machine does hits both; the figure is the median over pairs of the ratio of their median step times. Needs no data.

`make` also tells glibc to keep freed memory: where it gives it back after every step, as in plain Trainer's runs here,
the pages have to be faulted in again, and plain Trainer seemed 9 % slower than the same steps guided.
"""

from __future__ import annotations

import copy
import resource
import sys
import tempfile
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

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
from metricopt_hf.phi import Coordinates, random_basis

from . import cifar
from .problem import Rows

WARM_UP = 5
LIMIT = 1.03


@dataclass
class OverheadArguments:
    """What to measure."""

    pairs: int = field(default=9, metadata={"help": "Pairs of runs per model."})
    steps: int = field(default=40, metadata={"help": "Timed steps of a run."})
    batch_size: int = field(default=64, metadata={"help": "Images per step."})
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


MODELS = {"ResNet-20": cifar.CifarResNet, "small ViT": small_vit}


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

    def __init__(self, steps: int):
        self.steps, self.ends = steps, []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(perf_counter())
        control.should_training_stop = len(self.ends) == self.steps

    @property
    def step(self) -> float:
        return median(np.diff(self.ends)[WARM_UP:])


def step_seconds(model: nn.Module, guided: bool, args: OverheadArguments, data: Rows, folder: str) -> float:
    clock, few = Clock(args.steps + WARM_UP + 1), Rows(data.columns, np.arange(8), data.pool)
    common = {
        "max_steps": 20 * clock.steps,  # of which only the first are taken: so none is beside a look
        "per_device_train_batch_size": args.batch_size,
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
            callbacks=[clock],
        )
    else:
        phi = FiLM(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in phi.names)
        trainer = FrozenTrainer(model, TrainingArguments(folder, **common), train_dataset=data, callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert not guided or trainer.phase.direction.trust > 0
    return clock.step


def ratios(name: str, args: OverheadArguments) -> list[str]:
    torch.manual_seed(0)
    model = MODELS[name]()
    columns = {"pixel_values": torch.randn(256, 3, 32, 32), "labels": torch.randint(10, (256,))}
    data = Rows(columns, np.arange(256), "noise")
    plain, guided = [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in tqdm(range(args.pairs), desc=name):
            for is_guided in (False, True) if pair % 2 else (True, False):
                seconds = step_seconds(copy.deepcopy(model), is_guided, args, data, folder)
                (guided if is_guided else plain).append(seconds)
    ratio = median(g / p for g, p in zip(guided, plain, strict=True))
    return [
        name,
        f"{1000 * median(plain):.2f}",
        f"{1000 * median(guided):.2f}",
        f"{ratio:.3f}",
        "yes" if ratio <= LIMIT else "NO",
    ]


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


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(OverheadArguments).parse_args_into_dataclasses(argv)
    transformers.logging.set_verbosity_error()
    rows = [ratios(name, args) for name in MODELS]
    print(f"\nA step of {args.batch_size} images, median of {args.steps}, {args.pairs} pairs\n")
    print(tabulate(rows, ["model", "Trainer, ms", "guided, ms", "ratio (median of pairs)", f"<= {LIMIT}"]))
    print("\nBlending in one step\n")
    print(tabulate([[f"{n:,}", f"{blending_milliseconds(n):.2f}"] for n in args.phi_sizes], ["phi", "ms"]))
    print("\nFitting the value function after a round\n")
    print(tabulate([[f"{n:,}", f"{fit_seconds(n):.2f}"] for n in args.observations], ["observations", "s"]))
    print(f"\nPeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    return 0 if all(row[-1] == "yes" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
