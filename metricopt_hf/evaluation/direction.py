"""The direction of a metric whose user gave none: by its name, or by the description of its `evaluate` module."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigurationError, brief
from .answer import plain

SMALLER = frozenset(
    """loss losses error errors err mse mae rmse rmsle msle mape smape mase medae wer cer ter mer wil perplexity ppl
    nll bpb bpc ece brier crps eer fid kid kl divergence distance hamming misclassification regret
    latency deviance""".split()
)
GREATER = frozenset(
    """accuracy acc f f1 fbeta precision recall auc auroc auprc roc ap map mar mrr ndcg dcg bleu sacrebleu gleu rouge
    meteor chrf bertscore bleurt comet matthews mcc pearson pearsonr spearman spearmanr kendall kendalltau correlation
    kappa iou miou jaccard dice r2 em exact match ssim psnr sensitivity specificity hit hits top probability likelihood
    gmean similarity passed reward success""".split()
)


_WORDS = {"true": True, "false": False}  # as of a JSON or YAML file that quotes them


class Assumed(int):
    """A direction that Trainer assumed. It counts as a bool, and copies of the config know that nobody gave it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(bool(self))


def given(value: Any) -> bool | None:
    """The direction that a user gave as `greater_is_better`; None if it is None or only `Assumed`.

    Raises:
        ConfigurationError: it is neither true nor false.

    Example:
        >>> given(1), given("False"), given(Assumed(1)), given(None)
        (True, False, None, None)
    """
    value = _WORDS.get(value.lower(), value) if isinstance(value, str) else plain(value)
    if value is None or isinstance(value, Assumed):
        return None
    if not isinstance(value, int) or value not in (0, 1):
        raise ConfigurationError(f"greater_is_better={brief(value)} must be True or False.")
    return bool(value)


def by_name(name: str) -> bool | None:
    """Whether greater is better, for a name in common use; None for any other.

    Parts of the name count ("eval_macro_f1", "mean_squared_error"). "neg_", as scikit-learn writes before an error so
    that greater is better, and "negative" before a likelihood turn it round.

    Example:
        >>> by_name("eval_macro_f1"), by_name("mse"), by_name("neg_mean_squared_error"), by_name("score")
        (True, False, True, None)
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    parts = [part for part in re.split(r"[^a-z0-9]+", spaced.lower()) if part]
    parts = [part if part in SMALLER | GREATER else part.rstrip("0123456789") for part in parts]
    joined = ["".join(pair) for pair in zip(parts, parts[1:], strict=False)]  # "R_2", "g_mean"
    smaller, greater = (bool(words & {*parts, *joined}) for words in (SMALLER, GREATER))
    if smaller and greater:  # "top5_error"; of "cer_accuracy" who knows
        smaller, greater = parts[-1] in SMALLER, False
    answer = None if smaller == greater else greater
    turned = bool(parts) and (parts[0] == "neg" or ("negative" in parts and "likelihood" in parts))
    return answer if answer is None or not turned else not answer


def by_description(text: str) -> bool | None:
    """Whether greater is better, if the text of an `evaluate` module says so, and only once; else None.

    Example:
        >>> by_description("The lower the value, the better the performance."), by_description("Higher is better.")
        (False, True)
    """
    smaller, greater = (
        re.search(rf"\b({words})\b[^.]{{0,40}}\bbetter\b", text, re.IGNORECASE)
        for words in ("lower|smaller|less", "higher|greater|larger")
    )
    return None if bool(smaller) == bool(greater) else bool(greater)
