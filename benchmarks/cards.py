"""Writes the cards in model_cards/: of a model that a run of MetricOpt has tuned, and of its value function.

    python -m benchmarks.cards            (make bench ARGS=cards)

Two tasks of the benchmark whose metric reads what no training example shows: groups, and money. The run is made here,
with the first seed; what rivals reach is in the committed records, which `make bench ARGS=run` has measured.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from metricopt_hf import ConfigurationError

from . import protocol
from .bench_report import ROOT
from .by_loss import trained_first
from .comparing import OURS, Result, results_of
from .problem import no_data
from .records import RESULTS, read
from .run import quiet
from .tables import methods_table
from .tasks import tasks
from .training import make_trainer

# Task -> name on the card, and what the card says of its data
CARDS = {
    "dominoes": (
        "resnet20-dominoes-worst-group",
        {
            "license": "bsd-2-clause",
            "tasks": "image-classification",
            "dataset": "Dominoes of CIFAR-10 (JPEG copy) and scikit-learn's digits",
            "dataset_tags": "cifar10",
        },
    ),
    "money": (
        "mlp-bank-marketing-money",
        {
            "license": "cc-by-4.0",
            "tasks": "tabular-classification",
            "dataset": "Bank marketing, without duration",
            "dataset_tags": "bank-marketing",
        },
    ),
}
LEARNED = "value_function/README.md"  # in a run's folder


@dataclass
class CardArguments:
    """What to write, and where."""

    tasks: list[str] = field(default_factory=lambda: list(CARDS), metadata={"help": f"Of {', '.join(CARDS)}."})
    results: str = field(default=str(RESULTS), metadata={"help": "Folder of the records of the rivals."})
    folder: str = field(default=str(ROOT / "model_cards"), metadata={"help": "Where to write the cards."})


def comparison(result: Result) -> str:
    """Markdown: the methods of the task, by their records."""
    return "\n\n".join(
        [
            "## Against what else one could do",
            f"{result.task.note} {result.task.why}",
            methods_table(result),
            "Means over the seeds, ± standard error; brackets are 95 % intervals over seeds and examples. A † marks a "
            "method that reads the labels of the observation split, a § one that also reads its groups. This card is "
            "of the first seed. Made by `python -m benchmarks.cards`.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(CardArguments).parse_args_into_dataclasses(argv)
    if unknown := set(args.tasks) - set(CARDS):
        raise ConfigurationError(f"--tasks {sorted(unknown)[0]}: there are {', '.join(CARDS)}.")
    if no_data():
        return 2
    quiet()
    fixed, known = protocol.load(), tasks()
    results = {result.task.name: result for result in results_of(read(Path(args.results)))}
    with tempfile.TemporaryDirectory() as temporary:
        for task in tqdm([known[name] for name in args.tasks], desc="runs"):
            name, about = CARDS[task.name]
            folder, loss = Path(temporary) / name, fixed.config(OURS)["by_loss"]
            problem, _, _ = trained_first(task, task.prepare(0), 0, fixed.budget, loss)
            trainer = make_trainer(task, problem, 0, fixed.budget, str(folder), {"hub_model_id": f"user/{name}"})
            trainer.train()
            score = task.metric(problem.predict(trainer.model.eval(), problem.report))
            told = comparison(results[task.name]) if task.name in results else None
            trainer.create_model_card(**about, scores={"report": score}, comparison=told)
            for source, target in (("README.md", f"{name}.md"), (LEARNED, f"{name}-value-function.md")):
                shutil.copy(folder / source, Path(args.folder) / target)
                print(Path(args.folder) / target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
