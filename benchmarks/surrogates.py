"""Losses that know the metric's formula: smooth versions of it on a mini-batch. A ceiling, not a black-box rival.

Each is `(logits, labels) -> scalar` to be minimised; hard decisions become probabilities, ranks become sums of
sigmoids. Own and small: LibAUC's losses want its own samplers, optimizers and a memory of every example.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .opaque_cost import CALL, SALE
from .scores import PRECISION

EPSILON = 1e-6
# of the sigmoid that stands for "greater than": in scores, and in numbers to be ranked
SCORE_TEMPERATURE, RANK_TEMPERATURE = 0.05, 0.1


def _soft_counts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """True and false positives, false and true negatives of a binary decision made by chance with its probability."""
    p, y = logits.softmax(-1)[:, 1], labels.float()
    return (p * y).sum(), (p * (1 - y)).sum(), ((1 - p) * y).sum(), ((1 - p) * (1 - y)).sum()


def _soft_recalls(logits: Tensor, labels: Tensor) -> Tensor:
    """[classes in the batch]."""
    hits = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    return torch.stack([hits[labels == c].mean() for c in labels.unique()])


def soft_error(logits: Tensor, labels: Tensor) -> Tensor:
    return 1 - logits.softmax(-1).gather(1, labels[:, None]).mean()


def soft_worst_class_recall(logits: Tensor, labels: Tensor) -> Tensor:
    """A soft minimum, so that the classes near the worst are heard too."""
    recalls = _soft_recalls(logits, labels)
    return 1 - (recalls * (-recalls / 0.1).softmax(0)).sum()


def soft_g_mean(logits: Tensor, labels: Tensor) -> Tensor:
    return 1 - (_soft_recalls(logits, labels) + EPSILON).log().mean().exp()


def soft_f1(logits: Tensor, labels: Tensor) -> Tensor:
    tp, fp, fn, _ = _soft_counts(logits, labels)
    return 1 - 2 * tp / (2 * tp + fp + fn + EPSILON)


def soft_mcc(logits: Tensor, labels: Tensor) -> Tensor:
    tp, fp, fn, tn = _soft_counts(logits, labels)
    return 1 - (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + EPSILON).sqrt()


def soft_recall_at_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """Recall, and a penalty where the precision falls short."""
    tp, fp, fn, _ = _soft_counts(logits, labels)
    return 1 - tp / (tp + fn + EPSILON) + 5 * F.relu(PRECISION - tp / (tp + fp + EPSILON))


def soft_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """The expected cost: what a user would write who may look into the accounts."""
    _, fp, fn, _ = _soft_counts(logits, labels)
    return (CALL * fp + SALE * fn) / len(labels)


def smooth_ap(logits: Tensor, labels: Tensor) -> Tensor:
    """Smooth-AP (Brown et al., ECCV 2020) of every class of the batch against the rest."""
    scores, losses = logits.softmax(-1), []
    for c in labels.unique():
        positive = labels == c
        s = scores[:, c]
        # above[i, j]: how far j stands above the positive i
        above = torch.sigmoid((s[None, :] - s[positive][:, None]) / SCORE_TEMPERATURE)
        above = above - 0.5 * torch.eye(len(s))[positive]  # i itself, sigmoid(0)
        ranks = 1 + above.sum(1)
        among_positives = 1 + above[:, positive].sum(1)
        losses.append(1 - (among_positives / ranks).mean())
    return torch.stack(losses).mean()


def soft_spearman(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - the correlation of soft ranks with the true ranks."""
    x, y = logits.reshape(-1), labels.float()
    scale = x.detach().std() + EPSILON
    ranks = torch.sigmoid((x[:, None] - x[None, :]) / (RANK_TEMPERATURE * scale)).sum(1)
    true = (y[:, None] > y[None, :]).float().sum(1) + 0.5 * (y[:, None] == y[None, :]).float().sum(1)
    return 1 - F.cosine_similarity(ranks - ranks.mean(), true - true.mean(), dim=0)


# by `Task.metric`'s name
SURROGATES = {
    "misclassification": soft_error,
    "worst_class_recall": soft_worst_class_recall,
    "g_mean": soft_g_mean,
    "macro_auprc": smooth_ap,
    "f1": soft_f1,
    "mcc": soft_mcc,
    "recall_at_precision": soft_recall_at_precision,
    "spearman": soft_spearman,
    "opaque_cost": soft_cost,
}


def surrogate_loss(metric: str, task_loss_weight: float) -> Callable:
    """Of outputs and labels: the surrogate of `metric`, and `task_loss_weight` times the ordinary loss."""
    surrogate = SURROGATES[metric]

    def loss(outputs, labels):
        logits = outputs["logits"]
        value = surrogate(logits, labels)
        if task_loss_weight:
            numbers = labels.is_floating_point()
            task = F.mse_loss(logits.squeeze(-1), labels) if numbers else F.cross_entropy(logits, labels)
            value = value + task_loss_weight * task
        return value

    return loss
