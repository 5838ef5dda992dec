"""Trust: how far a guide may be followed, judged by what it predicted before it was fitted.

Each round's observations are ranked by the guide *before* it learns them (prequential; Dawid, 1984). Within a round the
points differ only by the perturbation, so that following a common trend earns nothing. Spearman's rank correlation of n
unrelated pairs has mean 0 and variance 1 / (n - 1), +-0.38 for 8 observations, so one round says little: the rounds are
pooled, and trust is a lower confidence bound on the pooled correlation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

NO_EVIDENCE = "no evidence yet"
NOT_PREDICTIVE = "does not predict"
PREDICTIVE = "predicts"

# One standard error below the pooled estimate: a guide that knows nothing passes in 16 % of cases, and then by little.
STANDARD_ERRORS = 1.0
# Weight of a round against the next one: a memory of about ten rounds, since phi and the guide both move on.
DISCOUNT = 0.9


@dataclass
class Trust:
    """Pools prequential rank correlations over rounds.

    Attributes:
        evidence: discounted sum of (n - 1) over rounds of n observations.
        correlation_sum: the same sum with each term times the round's rank correlation.
    """

    evidence: float = 0.0
    correlation_sum: float = 0.0

    def update(self, predicted: np.ndarray, observed: np.ndarray) -> None:
        """Take in one round: what the guide predicted, [n], and what was observed, [n], in the same unit and sign.

        A round in which all observed scores are equal says nothing. Equal predictions, or such as are not finite, are
        evidence of not predicting.
        """
        n = len(observed)
        if n < 2 or np.ptp(observed) == 0:
            return
        useful = np.isfinite(predicted).all() and np.ptp(predicted) > 0
        correlation = float(spearmanr(predicted, observed).statistic) if useful else 0.0
        self.evidence = DISCOUNT * self.evidence + (n - 1)
        self.correlation_sum = DISCOUNT * self.correlation_sum + (n - 1) * correlation

    @property
    def correlation(self) -> float:
        """The pooled rank correlation in [-1, 1]; nan without evidence."""
        return self.correlation_sum / self.evidence if self.evidence else float("nan")

    def value(self) -> tuple[float, str]:
        """Trust in [0, 1] and its reason."""
        if not self.evidence:
            return 0.0, NO_EVIDENCE
        bound = self.correlation - STANDARD_ERRORS / np.sqrt(self.evidence)
        return (float(bound), PREDICTIVE) if bound > 0 else (0.0, NOT_PREDICTIVE)

    def state_dict(self) -> dict[str, float]:
        return {"evidence": self.evidence, "correlation_sum": self.correlation_sum}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.evidence, self.correlation_sum = state["evidence"], state["correlation_sum"]
