"""The report's pages, as text: the front page, one per task, all comparisons, harm, and the protocol."""

from __future__ import annotations

from collections.abc import Sequence

from .comparing import (
    ABOVE,
    BELOW,
    BLACK_BOX,
    LOSS,
    LOSS_ONLY,
    OURS,
    SIGNIFICANT,
    TIE,
    UNGUIDED,
    WIN,
    Key,
    Result,
)
from .conduct import BEST, ONE_SETTING, calls_needed, coverage, harms, seconds_ratio
from .measure import PLAIN, POST_HOC
from .protocol import Protocol
from .provenance import PUBLISHED, made_by, protocol_text
from .tables import (
    controls_table,
    cost_table,
    harm_by_task,
    harm_table,
    interval,
    methods_table,
    one_setting_table,
    overview,
    share,
)

FEW = 5  # of a searcher's calls, that part
WRITTEN = "Written by `make bench-report` from the records in `benchmarks/results/`; do not edit."
VERDICTS = (
    f"Win and loss: p < {SIGNIFICANT}, corrected for all comparisons of the task (Holm). Above and below: the 95 % "
    "interval alone excludes zero. Tie: it does not."
)
# As a verdict is said of one task, and of several.
VERBS = {
    ABOVE: ("lies above", "lie above"),
    TIE: ("ties", "tie"),
    BELOW: ("lies below", "lie below"),
    LOSS: ("is lost", "are lost"),
}


def page(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def verdicts(results: Sequence[Result], key: Key) -> dict[str, list[str]]:
    """Verdict -> the tasks that it is said of."""
    found: dict[str, list[str]] = {verdict: [] for verdict in (WIN, *VERBS)}
    for result in results:
        if key in result.compared and (verdict := result.compared[key].verdict):
            found[verdict].append(result.task.name)
    return found


def standing(results: Sequence[Result], variant: str) -> str:
    """Where MetricOpt wins, as a clause: "MetricOpt wins nowhere yet; of the 2 tasks, 1 ties and 1 lies below"."""
    found = verdicts(results, (OURS, variant))
    won, count = found[WIN], sum(map(len, found.values()))
    if not count:
        return "MetricOpt has not been measured yet"
    said = [f"{len(found[v])} {verbs[len(found[v]) > 1]}" for v, verbs in VERBS.items() if found[v]]
    rest = " and ".join(", ".join(said).rsplit(", ", 1))
    all_tasks = f"{count} task{'s' * (count > 1)}"
    if not won:
        return f"MetricOpt wins nowhere yet; of the {all_tasks}, {rest}"
    names = ", ".join(f"`{name}`" for name in won)
    return f"MetricOpt wins on {len(won)} of {all_tasks} ({names})" + (rest and f"; of the others, {rest}")


def cost(results: Sequence[Result]) -> str:
    """How often it harms, and how long it takes; "" where it was not run."""
    worse, _, runs = harms(results, OURS, BEST)
    theirs, _, their_runs = harms(results, LOSS_ONLY[0], BEST)
    if not runs:
        return ""
    said = (
        f"It ends below loss only at its best by more than two standard errors in {worse} of {runs} runs "
        f"({worse / runs:.1%}); loss only at one setting for all tasks does so in {share(theirs, their_runs)}"
    )
    ratios = [seconds_ratio(result.rows.get((OURS, PLAIN)), result.rows.get((UNGUIDED, PLAIN))) for result in results]
    ratios = [ratio for ratio in ratios if ratio is not None]
    if ratios:
        said += f", and a run takes {min(ratios):.1f} to {max(ratios):.1f} times as long as without guidance"
    return said + "."


def lead(results: Sequence[Result]) -> str:
    """Three sentences; whoever reads only the first knows what is true at the end."""
    return (
        f"**With a bias per logit tuned on both sides, {standing(results, POST_HOC)}.** Without that tuning, "
        f"{standing(results, PLAIN)}. {cost(results)}"
    ).rstrip()


def front(results: Sequence[Result]) -> str:
    return page(
        "# Benchmarks",
        lead(results),
        "![MetricOpt minus loss only, by task, as they are and both with post-hoc tuning](docs/results/forest.png)",
        overview(results),
        "Scores are means over seeds on the report split. Differences are paired by seed and positive where MetricOpt "
        "is better; brackets are 95 % intervals (filled marks in the figure: win or loss; hollow ones: the interval "
        f"alone). Loss only is taken at its best of {len(LOSS_ONLY)} settings in each task, chosen on the selection "
        f"split. {VERDICTS} * marks the headline pairs, for which claims are made.",
        "- A task's page shows the methods that matter most; the CSV beside it holds all of them.\n"
        "- [All comparisons](docs/results/README.md): controls, loss only at one setting, and what did better.\n"
        "- [Harm, calibration, time and calls](docs/results/harm.md): what a run does besides its score.\n"
        "- [Protocol](docs/protocol.md): how all this was measured, with which settings, and published figures.\n"
        "- [Experiments](docs/experiments.md): what was tried, what it gave, and whether it was kept.",
        WRITTEN,
    )


def task_page(result: Result) -> str:
    task = result.task
    direction = "greater" if task.greater_is_better else "smaller"
    a_run = next(iter(next(iter(result.rows.values())).runs.values()))
    sizes = ", ".join(f"{name} {split['size']:,}" for name, split in a_run["splits"].items())
    unguided = result.difference((OURS, PLAIN), (UNGUIDED, PLAIN))
    return page(
        f"# {task.title}: {task.metric_name}{' *' if task.headline else ''}",
        f"`{task.name}`; {direction} is better. Examples: {sizes}. {task.note}".rstrip(),
        f"Kind: {task.kind}. {task.why}",
        methods_table(result),
        *([f"MetricOpt minus the same without guidance: {interval(unguided)}."] if unguided else []),
        f"All methods and columns: [{task.name}.csv]({task.name}.csv). Of the black-box searchers, and of the methods "
        "that train on observation labels, the table shows the one that is best on the selection split. How to read "
        "it: [protocol](../protocol.md#how-to-read-the-tables).",
        f"![{task.title}, {task.metric_name}: curves]({task.name}.png)",
        WRITTEN,
    )


def all_comparisons(results: Sequence[Result]) -> str:
    stars = {result.task.name: result.name for result in results}

    def tally(variant: str) -> str:
        found = verdicts(results, (OURS, variant))
        return "; ".join(
            f"{verdict} {len(names)}" + (f" ({', '.join(stars[name] for name in names)})" if names else "")
            for verdict, names in found.items()
        )

    return page(
        "# All comparisons",
        f"Of {len(results)} tasks, {sum(result.task.headline for result in results)} of them headline pairs (*). "
        f"{VERDICTS}",
        f"MetricOpt against loss only: {tally(PLAIN)}.",
        f"Both with post-hoc tuning: {tally(POST_HOC)}.",
        "## Controls",
        "The same without guidance shows what guidance alone is worth. The shuffled control fits its value function to "
        "shuffled scores; the random control follows a random direction.",
        controls_table(results),
        "## Loss only at one setting",
        "Elsewhere loss only is taken at its best in each task. Here it has the one setting that was chosen for it "
        "over all tasks.",
        one_setting_table(results),
        "## What did better",
        "Rivals whose interval lies above MetricOpt's, not corrected for looking at all of them; a method that reads "
        "labels (†) is compared with MetricOpt and post-hoc tuning:",
        what_did_better(results),
        WRITTEN,
    )


def what_did_better(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        for row in result.rows.values():
            ours = result.rows.get((OURS, POST_HOC)) if row.reads_labels else None
            ours = ours or result.rows.get((OURS, PLAIN))
            if ours is None or row.method == OURS:
                continue
            difference = row.minus(ours, result.task.sign)
            if difference is not None and difference.low > 0:
                name = result.task.name
                lines.append(f"- `{name}`: {row.title} is better than {ours.title} by {interval(difference)}")
    return "\n".join(lines) or "None."


def harm_page(results: Sequence[Result]) -> str:
    ours = [result for result in results if (OURS, PLAIN) in result.rows]
    seen = [coverage(result.rows[OURS, PLAIN]) for result in ours]
    inside, observations = (sum(column) for column in zip(*seen, strict=True)) if seen else (0, 0)
    few = 0
    for result in ours:
        _, needed, spent = calls_needed(result.task, result.rows, OURS, BLACK_BOX)
        few += result.task.headline and needed is not None and FEW * needed <= spent
    return page(
        "# Harm, calibration, time and calls",
        "A run is harmed if it ends below the other by more than two standard errors of the paired difference (over "
        f'items). "{ONE_SETTING}": chosen over all tasks. "{BEST}": the best of {len(LOSS_ONLY)} settings in each '
        "task, chosen on the selection split. The negated guide turns its predictions and directions around. The "
        "last column counts harmed runs that the selection split nevertheless prefers, so that nobody could have "
        "known.",
        harm_table(results),
        "## By task",
        harm_by_task(results),
        "## Calibration, time and calls",
        cost_table(results),
        f"In all, {inside / max(observations, 1):.1%} of the new observations lay in the 90 % interval that the value "
        "function gave before it was fitted to them. Time is that of a run with all of its guidance's calls, with the "
        "same cached evaluation, beside other processes. The searcher is the one that ends best on the selection "
        "split; MetricOpt reaches that score, also on the selection split, with at most "
        f"1/{FEW} of its calls on {few} headline pairs.",
        WRITTEN,
    )


def protocol_page(fixed: Protocol, records: Sequence[dict]) -> str:
    return page(
        "# Protocol",
        protocol_text(fixed),
        "## How to read the tables",
        "A † marks a method that reads the labels of the observation split, not only the metric; its reference is loss "
        "only with post-hoc tuning, where there is one. The reference of all others is loss only. A § marks a method "
        "that also reads the groups of the observation split, a ¶ one that has to know the group of every example that "
        "it decides about, a ‡ one that knows the metric's formula. Loss only is taken at its best: at the setting "
        'chosen for it over all tasks, in small steps, or in one after the other ("MetricOpt without guidance"); in '
        "each task the selection split chooses.",
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
