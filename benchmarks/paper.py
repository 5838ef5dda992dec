"""The paper's other two tasks, retrieval and detection, by the example scripts: a table of methods for each.

    python -m benchmarks.paper            (make bench ARGS=paper)
    python -m benchmarks.paper --studies retrieval --seeds 42

Neither is a classification: of embeddings and boxes there is no decision of a row. A script's run of one seed is a
process, and becomes one record; what is recorded already is not run again, and the page is written from the records
alone. The number of metric calls is fixed, so that a slow machine finds the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from examples.comparison.methods import METHODS, REFERENCE, in_order
from examples.comparison.report import MethodRun, compare, comparison_table, mean_and_error, table_note
from metricopt_hf import ConfigurationError
from metricopt_hf.phase.selection import MEAN, START

from .bench_report import ROOT
from .pages import page
from .problem import data_root, no_data
from .records import RESULTS, context, read, rounded, write
from .tables import markdown

RUN = ("loss_only", "shuffled", "random", "metricopt")
OURS, CONTROL = METHODS["metricopt"].title, METHODS["shuffled"].title
PAGE, RECORDS = ROOT / "docs" / "results" / "paper.md", RESULTS / "paper"
KEPT = ("method", "seed", "scores", "calls", "seconds")  # of a row


class Study(NamedTuple):
    """A script with the options that differ from its defaults.

    Attributes:
        about: what was measured, in a sentence.
        finding: what came, and why.
    """

    script: str
    options: tuple[str, ...]
    title: str
    about: str
    finding: str


STUDIES = {
    "retrieval": Study(
        "image_retrieval.py",
        ("--metric", "recall_at_k", "--metric_call_budget", "2000", "--observation_size", "1200"),
        "Retrieval: Omniglot, Recall@1",
        "A small ResNet's embeddings of characters; no class, and no alphabet, is in two of the splits, so that a gain "
        "has to hold for classes that nothing was fitted to.",
        "No gain: the shuffled control, which learns nothing of the metric, ends at the same place, often at a tuned "
        "bias, one shift for all embeddings, which is a candidate in every run. The steps do go up on the classes "
        "that they follow, and other classes have nothing of it: see the second table. "
        "[Experiments](../experiments.md#retrieval-and-detection-why-the-steps-gain-nothing) has what was tried: the "
        "linearisation holds, and even a loss that reads these labels brings little of its gain to other classes.",
    ),
    "detection": Study(
        "object_detection.py",
        ("--metric_for_best_model", "map", "--metric_call_budget", "200"),
        "Detection: blood cells, COCO's mean average precision",
        "A small RT-DETR that was trained from scratch, once; some fifty images each to observe, to select and to "
        "report on.",
        "No gain: near its start the model is about as good as it gets in this phi. Random steps lose, steps by "
        "shuffled answers lose less, and those by the metric keep what there is; what they find is far below the "
        "metric's standard error, on the images that they follow as on others. "
        "[Experiments](../experiments.md#retrieval-and-detection-why-the-steps-gain-nothing) has what was looked at.",
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
    """The record of a script's `results.json`: all rows, what steps gave, and why MetricOpt kept what it kept."""
    rows = [{key: row[key] for key in KEPT} | steps_of(row["details"]) for row in results["runs"]]
    why = next(row["details"]["why"] for row in results["runs"] if row["method"] == OURS)
    return rounded({"task": name, "seed": seed, **known, "metric": results["metric"], "rows": rows, "why": why})


def steps_of(details: Mapping[str, Any]) -> dict[str, Any]:
    """What a guided run's steps gave, before anything was chosen: greater is better.

    On observation the values behind the last half of the steps, on selection their mean as a candidate, each against
    the start of the metric phase.
    """
    curve, scores = details.get("curve"), {c["kind"]: c["score"] for c in details.get("candidates", ())}
    if not curve or MEAN not in scores:
        return {}
    taken = [step for step in curve if step["guide"] is not None]
    sign = 1 if details["greater_is_better"] else -1
    gains = {
        "observation": mean(step["value"] for step in taken[len(taken) // 2 :]) - curve[0]["before"],
        "selection": sign * (scores[MEAN] - scores[START]),
    }
    return {"steps": {"made": len(curve), "taken": len(taken), **gains}}


def run(name: str, seed: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """A seed of a study, in a process of its own."""
    study, folder = STUDIES[name], ROOT / "out" / "paper" / name
    command = [sys.executable, str(ROOT / "examples" / study.script), *study.options, "--methods", *RUN]
    command += ["--seeds", str(seed), "--diagnose", "false", "--use_cpu", "true", "--disable_tqdm", "true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "METRICOPT_DATA": str(data_root())}
    subprocess.run([*command, "--output_dir", str(folder)], check=True, env=environment, capture_output=True)
    return recorded(name, json.loads((folder / "results.json").read_text(encoding="utf-8")), seed, known)


def steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """By method: steps taken of those made, and the gain on observation and on selection, means over seeds."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows if "steps" in row):
        steps = [row["steps"] for row in rows if row["method"] == method and "steps" in row]
        gains = [mean_and_error([each[split] for each in steps]) for split in ("observation", "selection")]
        taken = f"{sum(each['taken'] for each in steps)} of {sum(each['made'] for each in steps)}"
        table.append([method, taken, *(f"{gain:+.4f} ± {error:.4f}" for gain, error in gains)])
    return markdown(["method", "steps taken", "observation", "selection"], table)


def section(name: str, records: Iterable[Mapping[str, Any]]) -> str:
    """The table of a study, and what each seed's run said at its end."""
    study, records = STUDIES[name], sorted(records, key=lambda record: record["seed"])
    rows = [row for record in records for row in record["rows"]]
    runs = in_order([MethodRun(**{key: row[key] for key in KEPT}) for row in rows])
    control = compare([run for run in runs if run.method in (OURS, CONTROL)], CONTROL, "report")[OURS]
    parts = (
        f"## {study.title}",
        study.about,
        study.finding,
        comparison_table(runs, REFERENCE, ("observation", "selection", "report"), tablefmt="github"),
        f"MetricOpt against the shuffled control, on report: {control.mean:+.4f} ± {control.error:.4f} "
        f"({control.verdict}). {table_note(len(records))}",
        "What the metric phase's steps gave by themselves, whatever was kept: on the rows that they followed "
        "(observation), and on others (selection).",
        steps_table(rows),
        "Why MetricOpt's runs ended with what they kept, by the selection split:",
        "\n".join(f"- seed {record['seed']}: {record['why']}" for record in records),
    )
    return "\n\n".join(filter(None, parts))


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
