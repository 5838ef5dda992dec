"""The report's pages, as text: the front page, one per task, all comparisons, harm, and the protocol."""

from __future__ import annotations

from collections.abc import Sequence

from .comparing import ABOVE, BELOW, LOSS, OURS, SIGNIFICANT, TIE, WIN, Result, groups
from .conduct import harms
from .protocol import Protocol
from .provenance import PUBLISHED, made_by, protocol_text
from .tables import (
    controls_table,
    cost,
    cost_table,
    harm_by_task,
    harm_table,
    interval,
    methods_table,
    overview,
    searched_table,
    share,
    ways_table,
)

WRITTEN = "Written by `make bench-report` from the records in `benchmarks/results/`; do not edit."
RIVAL = (
    "The rival of each task is the best of what is cheap, by the selection split: loss only at the setting chosen for "
    "it over all tasks, loss only in small steps, and the model as it came, each with and without a bias per logit "
    "tuned on the observation split."
)
READERS = (
    "The last column's methods are trained on the labels of the observation split; DFR and group DRO read its groups "
    "too. MetricOpt is given scores alone, but its row moves recover these labels through the metric. Its pairs, a "
    "tuned bias, CMA-ES and SPSA see scores of whole sets, and recover no row's label."
)
VERDICTS = (
    f"Win and loss: p < {SIGNIFICANT}, corrected for all comparisons of the task (Holm). Above and below: the 95 % "
    "interval alone excludes zero. Tie: it does not."
)
# Kind of task -> where that is, as the first sentence of the front page says it
WHERE = {
    "beyond threshold": "Where the metric asks for more than a threshold",
    "threshold": "Where it asks for a threshold",
    "no conflict": "Where loss and metric agree",
}


def page(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def verdicts(results: Sequence[Result]) -> dict[str, list[str]]:
    """Verdict -> the tasks that it is said of, for MetricOpt."""
    found: dict[str, list[str]] = {verdict: [] for verdict in (WIN, ABOVE, TIE, BELOW, LOSS)}
    for result in results:
        if result.ours is not None and (verdict := result.ours.verdict):
            found[verdict].append(result.task.name)
    return found


def standing(results: Sequence[Result]) -> str:
    """Where MetricOpt is better than the rival and where it is worse, by kind of task, a sentence each."""
    sentences = []
    for kind, members in groups(results).items():
        found = verdicts(members)
        better, worse, count = found[WIN] + found[ABOVE], found[BELOW] + found[LOSS], sum(map(len, found.values()))
        if not count:
            continue
        said = [f"better on {len(better)} of {count} task{'s' * (count > 1)}{_named(better)}"]
        said += [f"worse on {len(worse)}{_named(worse)}"] if worse else []
        sentences.append(f"{WHERE.get(kind, f'Of kind {kind}')}, MetricOpt is {' and '.join(said)}.")
    return " ".join(sentences) or "MetricOpt has not been measured yet."


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(f'`{name}`' for name in names)})" if names else ""


def searched(results: Sequence[Result]) -> str:
    """How MetricOpt's mean stands to that of CMA-ES at equal calls; "" where that was not run."""
    means = [result.searched.mean for result in results if result.searched is not None]
    above = sum(mean > 0 for mean in means)
    told = f"Its mean is above that of CMA-ES on the same linearisation at equal calls on {above} of {len(means)} tasks"
    return f"{told} ([differences](docs/results/README.md#cma-es-at-equal-calls))." if means else ""


def lead(results: Sequence[Result]) -> str:
    """Whoever reads only the first paragraph knows what is true at the end."""
    worse, _, runs = harms(results, OURS)
    harmed = f"Of its runs, {share(worse, runs)} end below the rival by more than two standard errors."
    return f"**{standing(results)}**" + (f" {harmed} {cost(results)}" if runs else "")


def front(results: Sequence[Result]) -> str:
    return page(
        "# Benchmarks",
        lead(results),
        "All of this is against the best of what is cheap: the loss alone, or no training, each with and without a "
        "bias per logit.",
        "![MetricOpt minus the rival, by task](docs/results/forest.png)",
        overview(results),
        f"{READERS} {searched(results)}".rstrip(),
        f"{RIVAL} MetricOpt is what comes out of a run by the loss whose last ten steps are metric steps with the "
        "library's defaults; it begins them where the better setting of the loss has led, by the observation split. "
        "Scores are means over seeds on the report split. Differences are paired by seed and positive where MetricOpt "
        "is better; brackets are 95 % intervals (filled marks in the figure: win or loss; hollow ones: the interval "
        "alone). "
        f"{VERDICTS} * marks the headline pairs, for which claims are made.",
        "- A task's page shows the methods that matter most; the CSV beside it holds all of them.\n"
        "- [All comparisons](docs/results/README.md): controls, each of the two ways alone, and what did better.\n"
        "- [Harm and time](docs/results/harm.md): what a run does besides its score.\n"
        "- [Diagnosis](docs/results/diagnosis.md): what `trainer.diagnose()` says of these tasks, against what came.\n"
        "- [Retrieval and detection](docs/results/paper.md): the paper's other two tasks, by the example scripts.\n"
        "- [Protocol](docs/protocol.md): how all this was measured, with which settings, and published figures.\n"
        "- [Experiments](docs/experiments.md): what was tried, what it gave, and whether it was kept.",
        WRITTEN,
    )


def task_page(result: Result) -> str:
    task = result.task
    direction = "greater" if task.greater_is_better else "smaller"
    a_run = next(iter(next(iter(result.rows.values())).runs.values()))
    sizes = ", ".join(f"{name} {split['size']:,}" for name, split in a_run["splits"].items())
    return page(
        f"# {task.title}: {task.metric_name}{' *' if task.headline else ''}",
        f"`{task.name}`; {direction} is better. Examples: {sizes}. {task.note}".rstrip(),
        f"Kind: {task.kind}. {task.why}",
        methods_table(result),
        f"All methods and columns: [{task.name}.csv]({task.name}.csv). Of the black-box searchers, and of the methods "
        "that train on observation labels, the table shows the one that is best on the selection split. How to read "
        "it: [protocol](../protocol.md#how-to-read-the-tables).",
        f"![{task.title}, {task.metric_name}: curves]({task.name}.png)",
        WRITTEN,
    )


def all_comparisons(results: Sequence[Result]) -> str:
    stars = {result.task.name: result.name for result in results}
    tally = "; ".join(
        f"{verdict} {len(names)}" + (f" ({', '.join(stars[name] for name in names)})" if names else "")
        for verdict, names in verdicts(results).items()
    )
    return page(
        "# All comparisons",
        f"Of {len(results)} tasks, {sum(result.task.headline for result in results)} of them headline pairs (*). "
        f"{VERDICTS}",
        f"MetricOpt against the rival: {tally}.",
        "## Controls",
        "The shuffled control makes the same metric calls and follows their values in a random order; the random "
        "control follows one random direction; the negated one goes where the metric gets worse. Each goes through "
        "the same metric phase, with the same selection.",
        controls_table(results),
        "## The two ways alone",
        "MetricOpt follows the better of two steps: along the slope of perturbed predictions (pairs), and along what "
        "each row's decision is worth (rows). Here each is alone, on few seeds.",
        ways_table(results),
        "## CMA-ES at equal calls",
        "CMA-ES on the same linearisation, with as many metric calls and the same candidates, over the seeds that both "
        "have.",
        searched_table(results),
        "## What did better",
        "Rivals whose interval lies above MetricOpt's, not corrected for looking at all of them:",
        what_did_better(results),
        WRITTEN,
    )


def what_did_better(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        for row in result.rows.values():
            if result.ours is None or row.method == OURS:
                continue
            difference = row.minus(result.ours.row, result.task.sign)
            if difference is not None and difference.low > 0:
                lines.append(f"- `{result.task.name}`: {row.title} is better by {interval(difference)}")
    return "\n".join(lines) or "None."


def harm_page(results: Sequence[Result]) -> str:
    worse, _, runs = harms(results, OURS)
    return page(
        "# Harm and time",
        "A run is harmed if it ends below the rival by more than two standard errors of the paired difference (over "
        f"items): of MetricOpt's, {share(worse, runs) or 'none was run yet'}. {RIVAL} The last column counts harmed "
        "runs that the selection split nevertheless prefers, so that nobody could have known.",
        harm_table(results),
        "## By task",
        harm_by_task(results),
        "## Time",
        cost_table(results),
        "Processor seconds of a run of MetricOpt, with its steps by the loss at both settings, and all of its passes "
        "and metric calls, against those of 200 steps by the loss at one setting. Both are measured in one run, on one "
        "thread of a machine that did other things too.",
        WRITTEN,
    )


def protocol_page(fixed: Protocol, records: Sequence[dict]) -> str:
    return page(
        "# Protocol",
        protocol_text(fixed),
        "## How to read the tables",
        f"{RIVAL} All methods are compared with it. A † marks a method that reads the labels of the observation split, "
        "not only the metric, a § one that also reads its groups, a ¶ one that has to know the group of every example "
        "that it decides about, a ‡ one that knows the metric's formula. MetricOpt and its row moves are given scores "
        "alone, and recover labels through them; all others without a mark see scores of whole sets.",
        "Differences are paired by seed and positive where the method is better. Their 95 % intervals come from a "
        "bootstrap over seeds and items, with Student's t. p is Holm-corrected over all methods of the task, also "
        f"those that only the CSV shows. {VERDICTS} ± is the standard error over seeds. Calls are metric calls to "
        "observe / select / tune post hoc. Seconds are those of the run, on one thread of a machine that did other "
        "things too.",
        "## Published figures of other protocols",
        PUBLISHED.rstrip(),
        "## Made by",
        made_by(records),
    )
