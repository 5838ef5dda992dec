"""Does the method do what it claims on real data? Exits 1 if not.

    python -m benchmarks.check_cifar            (make check-cifar)

CIFAR-10 as JPEG, a ResNet-20 pretrained on the lossless images, default phi, worst-class recall, which the cross-
entropy does not see. Per seed four disjoint splits: 6,000 training images (from the train split), and 2,000 for
observation, 2,000 for selection and 6,000 for the report (from the test split, since the net has seen all of train).
200 steps of Adam, 160 metric calls. Every method has the same phi, start, data, steps and selection rounds.

The claim: over seeds 0-4, the paired 95 % interval of MetricOpt minus loss-only on the report split lies above +0.02,
and those of both controls include zero.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import transformers
from scipy.stats import t as student_t
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from metricopt_hf import MetricOptConfig, MetricOptTrainer
from metricopt_hf.comparison.methods import METHODS, run_method, run_start, summary
from metricopt_hf.comparison.report import MethodRun, compare, save_results
from metricopt_hf.comparison.study import Start

from . import cifar
from .problem import Problem, Sizes, no_data

METRIC = "worst_class_recall"
LOSS_ONLY, OURS = METHODS["loss_only"].title, METHODS["metricopt"].title
CONTROLS = (METHODS["shuffled"].title, METHODS["random"].title)
CLAIM = 0.02
SIZES = Sizes(None, 6000, None, 2000)


@dataclass
class CheckArguments:
    """What to run. The claim is made for the defaults."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds to run, two or more."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps of every method."})
    results: str | None = field(default=None, metadata={"help": "File to write all figures to, as JSON."})


def make_trainer(seed: int, problem: Problem, max_steps: int, folder: str, **changes) -> MetricOptTrainer:
    """A trainer on a copy of the model, with `changes` as a `Method` makes them."""
    args = MetricOptConfig(
        folder,
        max_steps=max_steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        per_device_eval_batch_size=100,
        metric_name_or_path=METRIC,
        greater_is_better=True,
        metric_start_ratio=0,
        select_steps=10,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Start(problem.model, args, problem).trainer(**changes)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def interval(runs: list[MethodRun], method: str) -> tuple[float, float, float]:
    """Mean of the paired differences to loss only on the report split, and its 95 % interval (Student's t)."""
    difference = compare(runs, LOSS_ONLY, "report")[method]
    half = float(student_t.ppf(0.975, len({run.seed for run in runs}) - 1)) * difference.error
    return difference.mean, difference.mean - half, difference.mean + half


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(CheckArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    transformers.logging.set_verbosity_error()
    logging.getLogger("metricopt_hf").setLevel(logging.ERROR)
    print("decoding images ...", flush=True)
    net, train, test = cifar.pretrained(20), vars(cifar.load("train")), vars(cifar.load("test"))
    runs = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(args.seeds) * len(METHODS), desc="runs") as bar:
        for seed in args.seeds:
            problem = cifar.cut(net, train, test, SIZES, seed)
            make = partial(make_trainer, seed, problem, args.max_steps, folder)
            trainer = make()
            runs.append(run_start(trainer, problem.measured))
            for method in METHODS.values():
                trainer, rows = run_method(method, make, problem.measured, class_bias=True)
                runs += rows
                tqdm.write(f"seed {seed}, {rows[0].method}: {rows[0].scores['report']:.4f} on the report split")
                bar.update()

    start = perf_counter()
    trainer.evaluate(problem.observation)
    evaluate_seconds = perf_counter() - start
    probe_seconds = trainer.ledger.seconds["observe"] / trainer.ledger.calls["observe"]
    images, folds = len(problem.observation), trainer.args.observation_folds

    print(f"\nCIFAR-10 (JPEG), ResNet-20, {METRIC}, {args.max_steps} steps\n")
    print(summary(runs, trainer) + "\n")
    print(
        f"One observation, of {images // folds} images, takes {probe_seconds:.3f} s; trainer.evaluate() on "
        f"{images} {evaluate_seconds:.3f} s: {evaluate_seconds / folds / probe_seconds:.1f} times as long per image.\n"
    )
    fine = True
    for method in (OURS, *CONTROLS):
        mean, low, high = interval(runs, method)
        holds = low > CLAIM if method == OURS else low <= 0 <= high
        fine &= holds
        claim = f"above {CLAIM:+.2f}" if method == OURS else "includes 0"
        print(
            f"{method} - {LOSS_ONLY}: {mean:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]; "
            f"{claim}: {'yes' if holds else 'NO'}"
        )
    if args.results is not None:
        save_results(args.results, runs, metric=METRIC, arguments=vars(args))
    print("\nThe claim holds." if fine else "\nThe claim FAILS.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
