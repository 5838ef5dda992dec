"""How the numbers of BENCHMARKS.md came about: the protocol in words, and what made them; and figures of others."""

from __future__ import annotations

from collections import defaultdict

from . import protocol
from .methods import RIVALS
from .records import TUNING, read, setting

PUBLISHED = """\
| figure | value | where, and why it does not compare |
|---|---|---|
| CIFAR-10 AUCPR | 0.972 (adaptive loss alignment: 0.949) | MetricOpt, CVPR 2021: lossless images, a whole training |
| a9a misclassification | 13.69 % | MetricOpt, CVPR 2021; gradient boosting gives 14.5 to 15.0 % on the official split |
| CIFAR-10 ResNet-32 misclassification | 7.51 % | He et al. 2015: the lossless images; here they are JPEG (quality 75) |
| Adult, 30 % of positive labels flipped, 1 - G-mean | 0.4396 by cross-entropy, 0.1827 with the threshold tuned, \
0.1777 theirs | Adaptive Surrogates, ICML 2020: 25,000 metric calls; gradient boosting on *clean* labels with the best \
threshold *of the test set* gives 0.177 on our split |
"""


def protocol_text(fixed: protocol.Protocol, records: list[dict]) -> str:
    budget = fixed.budget
    settings = "\n".join(
        f"- {RIVALS[name].title}: {', '.join(f'{key} {value}' for key, value in config.items())}"
        for name, config in fixed.settings.items()
    )
    tried = defaultdict(set)
    for record in read(TUNING):
        tried[record["method"]].add(setting(record["config"]))
    more = ", ".join(
        f"{RIVALS[name].title} {len(configs)}"
        for name, configs in sorted(tried.items())
        if len(configs) > len(RIVALS[name].grid)
    )
    chosen = ", ".join(f"{task} with seed {seed}" for task, seed in fixed.chosen["tasks and seeds"])
    return (
        f"Four disjoint splits. Every method starts from the same model and moves the same phi (FiLM on the last "
        f"norms, and the output bias); {budget.steps} steps with batches of {budget.batch_size}, {budget.rounds} "
        f"rounds of {budget.calls} metric calls where it observes, {budget.rounds + 1} looks at the selection split, "
        "of which the best is kept. MetricOpt observes in the first half of its steps; in the other half it follows "
        "the loss alone, from the start model again, and so do its controls and what is named the same without "
        "guidance. Searchers without a loss have no steps. Seeds 0 to 9 for MetricOpt, with and "
        "without guidance, loss only, and the shuffled and random controls, 0 to 4 for the others; each was run behind "
        "the commit that fixed its settings. MetricOpt, the controls and what takes its exploration were run five "
        "times on these seeds: before the method was improved, and after each of four rounds of it (see the log). It "
        "was improved on development seeds and the selection split alone, in more trials than the grids.\n\n"
        f"One setting per method for all tasks, each from a grid of six, by the selection split on development seeds "
        f"({chosen}; `python -m benchmarks.tune`, worth of every setting in `benchmarks/protocol.json`). Grids "
        f"whose best lay at an edge were moved after a first look at these seeds, so that of some more settings "
        f"were tried in all: {more}. MetricOpt's last grid was laid round its setting of the round before, as the "
        "settings cannot be told apart on these seeds; it is not the best of all that were tried (see the log). "
        f"Controls, and MetricOpt without guidance, take MetricOpt's:\n\n{settings}\n\n"
        "Post-hoc tuning is a coordinate search for a bias per logit on the observation split, at most 160 calls. The "
        "soup is the mean of phi over the last half of the rounds, kept where it is at least as good on the selection "
        "split. Surrogates of the formula are our own small ones (`benchmarks/surrogates.py`), not LibAUC's."
    )


def made_by(records: list[dict]) -> str:
    commits = sorted({r["commit"][:12] + (" (changed)" if r["dirty"] else "") for r in records})
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records})
    peak = max(r["peak_mib"] for r in records)
    hours = sum(r["seconds"]["whole"] for r in records) / 3600
    return (
        f"`python -m benchmarks.run` (`make bench`), {len(records)} runs, "
        f"{hours:.1f} hours in all, at most {peak / 1024:.1f} GiB a process; "
        f"at {', '.join(commits)}; with {'; '.join(versions)}. The text by `python -m benchmarks.bench_report` "
        "(`make bench-report`)."
    )
