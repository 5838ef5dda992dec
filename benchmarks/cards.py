"""Fills the cards in model_cards/ with figures measured here: a tuned model, and its value function.

    python -m benchmarks.cards            (make bench ARGS=cards)

The task of `worst_class` in ten steps, from activations in front of the last block that are computed once. All
methods of the comparison, several seeds; the model and the value function that are described are the first seed's.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import transformers
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from examples.comparison.methods import METHODS, REFERENCE, in_order, run_method, run_start
from examples.comparison.report import MethodRun, comparison_table, table_note

from . import cifar
from .problem import Problem, Sizes, no_data
from .worst_class import interval, make_trainer

NAME = "resnet20-cifar10-worst-class-recall"
FOLDER = Path(__file__).resolve().parents[1] / "model_cards"
TRAIN = 6000  # images to draw from
LEARNED = "value_function/README.md"  # in a run's folder
ABOUT = {
    "license": "bsd-2-clause",
    "tasks": "image-classification",
    "dataset": "CIFAR-10 (JPEG copy)",
    "dataset_tags": "cifar10",
}
SIZES = Sizes(TRAIN, TRAIN // 2, None, 2000)


@dataclass
class CardArguments:
    """What to run."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to run, two or more."})
    max_steps: int = field(default=10, metadata={"help": "Optimizer steps of every method."})
    folder: str = field(default=str(FOLDER), metadata={"help": "Where to write the cards."})


def comparison(runs: list[MethodRun], problem: Problem, args: CardArguments) -> str:
    """Markdown: what was run, the table, and intervals."""
    sizes = ", ".join(f"{len(part)} for {name}" for name, part in problem.items())
    lines = [
        "## Against what else one could do",
        "",
        "CIFAR-10 as JPEG (quality 75), a ResNet-20 that was trained on the lossless images (`akamaster/"
        "pytorch_resnet_cifar10` on GitHub), FiLM on the norms of its last block and the bias of its logits; "
        f"{args.max_steps} steps. Images: {sizes}; all but those for train are from the test split, as the net has "
        "seen all of train. Made by `python -m benchmarks.cards`.",
        "",
        comparison_table(in_order(runs), REFERENCE, ("selection", "report"), tablefmt="github"),
        "",
        table_note(len(args.seeds)),
        "",
    ]
    for name in ("metricopt", "shuffled", "random"):
        mean, low, high = interval(runs, METHODS[name].title)
        lines.append(f"- {METHODS[name].title} - {REFERENCE}: {mean:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(CardArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    transformers.logging.set_verbosity_error()
    logging.getLogger("metricopt_hf").setLevel(logging.ERROR)
    print("computing activations ...", flush=True)
    net = cifar.pretrained(20)
    train, test = (vars(cifar.activations(net, cifar.load(split))) for split in (f"train[:{TRAIN}]", "test"))
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=len(args.seeds) * len(METHODS), desc="runs") as bar:
        folder, runs, kept = Path(temporary) / NAME, [], None
        for seed in args.seeds:
            problem = cifar.cut(net, train, test, SIZES, seed)
            make = partial(make_trainer, seed, problem, args.max_steps, str(folder), hub_model_id=f"user/{NAME}")
            runs += run_start(make(), problem.measured)
            for name, method in METHODS.items():
                trainer, rows = run_method(method, make, problem.measured, class_bias=True)
                runs += rows
                bar.update()
                if name == "metricopt" and kept is None:
                    kept, score = trainer, rows[0].scores["report"]
        kept.create_model_card(**ABOUT, scores={"report": score}, comparison=comparison(runs, problem, args))
        for source, target in (("README.md", f"{NAME}.md"), (LEARNED, f"{NAME}-value-function.md")):
            publish(folder / source, args, target)
    return 0


def publish(card: Path, args: CardArguments, name: str) -> None:
    shutil.copy(card, Path(args.folder) / name)
    print(f"{Path(args.folder) / name}")


if __name__ == "__main__":
    sys.exit(main())
