"""The paper's other two tasks, retrieval and detection, by the example scripts: a table of methods for each.

    python -m benchmarks.paper            (make bench ARGS=paper)
    python -m benchmarks.paper --studies retrieval --seeds 42

Neither is a classification: embeddings and boxes have no bias per logit, and no decision of a row. A script's run of
one seed is a process, and becomes one record; what is recorded already is not run again, and the page is written from
the records alone. The number of metric calls is fixed, so that a slow machine finds the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from examples.comparison.methods import REFERENCE, in_order
from examples.comparison.report import MethodRun, comparison_table, table_note
from metricopt_hf import ConfigurationError

from .bench_report import ROOT
from .pages import page
from .problem import data_root, no_data
from .records import RESULTS, context, read, rounded, write

METHODS = ("loss_only", "shuffled", "random", "metricopt")
OURS = "MetricOpt"  # as its rows are called
PAGE, RECORDS = ROOT / "docs" / "results" / "paper.md", RESULTS / "paper"
KEPT = ("method", "seed", "scores", "calls", "seconds")  # of a row


class Study(NamedTuple):
    """A script with the options that differ from its defaults.

    Attributes:
        about: what was measured, in a sentence.
    """

    script: str
    options: tuple[str, ...]
    title: str
    about: str


STUDIES = {
    "retrieval": Study(
        "image_retrieval.py",
        ("--metric", "recall_at_k", "--metric_call_budget", "2000"),
        "Retrieval: Omniglot, Recall@1",
        "A small ResNet's embeddings of characters; no class, and no alphabet, is in two of the splits, so that a gain "
        "has to hold for classes that nothing was fitted to.",
    ),
    "detection": Study(
        "object_detection.py",
        ("--metric_for_best_model", "map", "--metric_call_budget", "200"),
        "Detection: blood cells, COCO's mean average precision",
        "A small RT-DETR that was trained from scratch, once; some fifty images each to observe, to select and to "
        "report on.",
    ),
}


@dataclass
class PaperArguments:
    """What to run."""

    studies: list[str] = field(default_factory=lambda: list(STUDIES), metadata={"help": f"Of {', '.join(STUDIES)}."})
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44, 45, 46], metadata={"help": "Seeds."})
    records: str = field(default=str(RECORDS), metadata={"help": "Folder of the records, a file per study."})
    page: str = field(default=str(PAGE), metadata={"help": "The page to write."})


def recorded(name: str, results: Mapping[str, Any], seed: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a script's `results.json`: all rows, and why MetricOpt's run ended with what it kept."""
    rows = [{key: row[key] for key in KEPT} for row in results["runs"]]
    why = next(row["details"]["why"] for row in results["runs"] if row["method"] == OURS)
    return rounded({"task": name, "seed": seed, **known, "metric": results["metric"], "rows": rows, "why": why})


def run(name: str, seed: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """A seed of a study, in a process of its own."""
    study, folder = STUDIES[name], ROOT / "out" / "paper" / name
    command = [sys.executable, str(ROOT / "examples" / study.script), *study.options, "--methods", *METHODS]
    command += ["--seeds", str(seed), "--diagnose", "false", "--use_cpu", "true", "--disable_tqdm", "true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "METRICOPT_DATA": str(data_root())}
    subprocess.run([*command, "--output_dir", str(folder)], check=True, env=environment, capture_output=True)
    return recorded(name, json.loads((folder / "results.json").read_text(encoding="utf-8")), seed, known)


def section(name: str, records: Iterable[Mapping[str, Any]]) -> str:
    """The table of a study, and what each seed's run said at its end."""
    study, records = STUDIES[name], sorted(records, key=lambda record: record["seed"])
    runs = in_order([MethodRun(**row) for record in records for row in record["rows"]])
    return "\n\n".join(
        [
            f"## {study.title}",
            study.about,
            comparison_table(runs, REFERENCE, ("observation", "selection", "report"), tablefmt="github"),
            table_note(len(records)),
            "Why MetricOpt's runs ended with what they kept, by the selection split:",
            "\n".join(f"- seed {record['seed']}: {record['why']}" for record in records),
        ]
    )


def paper_page(records: Iterable[Mapping[str, Any]]) -> str:
    by_study: dict[str, list] = {name: [] for name in STUDIES}
    for record in records:
        by_study[record["task"]].append(record)
    return page(
        "# Retrieval and detection",
        "The two tasks of the paper that are no classification. Every method starts from the same model, with the same "
        "steps; the last ten of MetricOpt's and of the controls' go up the metric, or only seem to.",
        *(section(name, found) for name, found in by_study.items() if found),
        "Written by `python -m benchmarks.paper` from the records in `benchmarks/results/paper/`; do not edit.",
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(PaperArguments).parse_args_into_dataclasses(argv)
    if unknown := set(args.studies) - set(STUDIES):
        raise ConfigurationError(f"--studies {sorted(unknown)[0]}: there are {', '.join(STUDIES)}.")
    if no_data():
        return 2
    folder, known = Path(args.records), context()
    done = {(record["task"], record["seed"]) for record in read(folder)}
    for name, seed in tqdm([(n, s) for n in args.studies for s in args.seeds if (n, s) not in done], desc="runs"):
        write(run(name, seed, known), folder)
        Path(args.page).write_text(paper_page(read(folder)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
