"""The benchmark's tasks: a real data set, a pretrained model, and the metric that it is judged by.

`tasks()[name].prepare(seed)` gives four disjoint splits and a small model: whatever the net computes in front of phi's
first layer stands still in every method, so it is computed once, and is what the data sets hold.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from . import cameras, cifar, dominoes, groups, scores, spurious_word, tabular, text_tasks, unseen
from .problem import Sizes, Task

CIFAR, CIFAR_SMOKE = Sizes(10_000, 6_000, None, 2_000), Sizes(120, 80, 200, 60)
CIFAR_TUNING = replace(CIFAR, observation=800)  # a quicker problem to choose settings on
TABULAR, TABULAR_SMOKE = Sizes(None, None, None, 2_000), Sizes(600, None, 200, 150)
RARE_POSITIVES = replace(TABULAR, observation=6_000)  # 700 positive ones, of which the metric counts a fifth

BANK = ("bank_marketing", "Bank marketing (without duration), MLP")
FLIPPED = "a9a, 30 % of the positive training labels flipped, MLP"
CLEAN = "Labels of observation, selection and report are clean; those that the MLP was trained on are not."
OPAQUE = "The metric is another process (`benchmarks/opaque_cost.py`): asymmetric, with noise in every call."
LINEAR = "phi is all of the linear layer."

RARE = {"kind": "threshold", "why": "The rarer label is decided for too seldom at one half, and a bias moves that."}
COST = {"kind": "threshold", "why": "A missed sale costs more than a call, so the best decision is a lower threshold."}
CLASSES = {"kind": "threshold", "why": "A bias per class lifts the worst class at the others' expense."}
ERROR = {"kind": "no conflict", "why": "Cross-entropy bounds the error, and its optimum makes the fewest errors."}
RANKS = {"kind": "no conflict", "why": "True probabilities are the best ranking, and a net can come near to them."}
MISFIT = {
    "kind": "beyond threshold",
    "why": "The metric chooses its own threshold, and a line that fits all examples ranks those at the top less well.",
}


def tasks(smoke: bool = False, image_sizes: Sizes = CIFAR) -> dict[str, Task]:
    """All tasks by name, the cheapest headline ones first; for a smoke run with a few examples each."""
    image_sizes = CIFAR_SMOKE if smoke else image_sizes

    def images(name: str, depth: int, metric, metric_name: str, headline: bool, kind: dict, greater=True) -> Task:
        prepare = functools.partial(cifar.problem, depth, image_sizes)
        title = f"CIFAR-10, ResNet-{depth}"
        return Task(name, title, metric, metric_name, greater, headline, "classes", prepare, **kind)

    def table(
        name: str,
        data: str,
        title: str,
        metric,
        metric_name: str,
        headline: bool,
        kind: dict,
        greater=True,
        flipped=0.0,
        note="",
        sizes=TABULAR,
        **model,
    ) -> Task:
        prepare = functools.partial(tabular.problem, data, TABULAR_SMOKE if smoke else sizes, flipped, **model)
        return Task(name, title, metric, metric_name, greater, headline, "binary", prepare, note, **kind)

    recall = (scores.recall_at_precision, f"recall at precision >= {scores.PRECISION}", False)
    linear = ("bank_marketing", "Bank marketing (without duration), linear")
    whole = {"build": tabular.Linear, "phi": tabular.whole, "sizes": RARE_POSITIVES, "note": LINEAR}
    made = (
        table("a9a_gmean", "a9a", FLIPPED, scores.g_mean, "G-mean", True, RARE, flipped=0.3, note=CLEAN),
        table("bank_f1", *BANK, scores.f1, "F1", True, RARE),
        table("bank_cost", *BANK, scores.opaque_cost, "opaque cost", True, COST, greater=False, note=OPAQUE),
        *text_tasks.tasks(smoke),
        images("cifar_worst", 20, scores.worst_class_recall, "worst-class recall", True, CLASSES),
        images("cifar_auprc", 20, scores.macro_auprc, "macro AUCPR", True, RANKS),
        *groups.tasks(TABULAR_SMOKE if smoke else TABULAR),
        cameras.task(image_sizes),
        dominoes.task(smoke),
        spurious_word.task(smoke),
        *unseen.tasks(TABULAR_SMOKE if smoke else TABULAR),
        table("bank_precision", *linear, *recall, MISFIT, **whole),
        table("a9a_error", "a9a", "a9a, MLP", scores.misclassification, "misclassification", False, ERROR, False),
        table("bank_recall", *BANK, *recall, RANKS),
        images("cifar_error", 20, scores.misclassification, "misclassification", False, ERROR, greater=False),
        images("cifar32_worst", 32, scores.worst_class_recall, "worst-class recall", False, CLASSES),
    )
    return {task.name: task for task in made}
