"""Diagnosis: does a bias per logit pay, does phi pay beyond it, and can that be told? Arrays in, verdicts out.

The rows are in folds. What a candidate predicts of a fold was fitted to the other rows (`scored`, a fold each); what
the folds say together is judged by its own error (`judged`). `MetricOptTrainer.diagnose` makes such predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import EvalPrediction

from .evaluation.ledger import Ledger
from .evaluation.metric import Metric

START, BIAS, PHI = "start", "bias", "phi"  # candidates
TITLES = {START: "start", BIAS: "a bias per logit", PHI: "phi, near where it is"}

YES, NO, OPEN = "yes", "no", "cannot tell"  # verdicts
NOTHING, THRESHOLD, GUIDANCE = "nothing to gain here", "a threshold suffices", "guidance pays"  # recommendations
TOO_FEW = "too few examples to tell"

HALVES = 50  # random halves of a fold's rows, whose scatter is the error
SUMMED = 3  # of them, whose values and the other halves' make up that of all rows, if the metric is a sum over rows
ERRORS = 2.0  # a gain of more than so many standard errors is none of chance
ATTEMPTS = 3  # to call the metric on all rows of a fold, where it fails
FEWEST_ROWS = 16  # of a fold, of which halves say anything
MOST_NEEDED = 1e6  # examples; beyond, no number is named

Scored = tuple[dict[str, float], dict[str, np.ndarray]]  # by candidate: on all rows; on the same random halves of them


@dataclass(frozen=True)
class Gain:
    """How much better one candidate is than another on rows that it was not fitted to.

    Attributes:
        mean: difference of their scores, in the metric's unit; positive where it is better.
        error: its standard error; inf where it is not known: of too few rows, or of a metric of all rows only.
    """

    mean: float
    error: float

    def verdict(self, worthwhile: float) -> str:
        """Is it better? "no": `worthwhile` is ruled out, or, of what looks like nothing, twice that."""
        bound = worthwhile if self.mean > self.error else 2 * worthwhile
        if self.mean + ERRORS * self.error < bound or self.mean <= -self.error:
            return NO
        return YES if self.mean > ERRORS * self.error else OPEN

    def __str__(self) -> str:
        if self.mean == self.error == 0:
            return "no difference"
        if math.isnan(self.mean):
            return "the metric fails"
        error = f" ± {self.error:.2g}" if math.isfinite(self.error) else ", error unknown"
        return f"{self.mean:+.4g}{error}"


@dataclass(frozen=True)
class Diagnosis:
    """What is known before any training; printed, it is a table.

    Attributes:
        metric: its name.
        greater_is_better: which way it is better.
        examples: rows, of all folds.
        worthwhile: the smallest gain that is worth having, in the metric's unit.
        scores: the metric for "start", "bias" (if a bias has a place) and "phi", mean over the folds.
        gains: (of, over) -> gain.
        ledger: metric calls, forward passes and seconds.
        seconds: in all.
    """

    metric: str
    greater_is_better: bool
    examples: int
    worthwhile: float
    scores: Mapping[str, float]
    gains: Mapping[tuple[str, str], Gain]
    ledger: Ledger
    seconds: float

    @property
    def beyond(self) -> Gain | None:
        """Of phi over the better of what needs no training; None where only a bias was looked at."""
        gains = [self.gains[pair] for pair in ((PHI, BIAS), (PHI, START)) if pair in self.gains]
        return min(gains, key=lambda gain: gain.mean, default=None)

    def verdict(self, of: str) -> str:
        """Does a bias pay against the start; does phi pay beyond the better of both?"""
        gain = self.beyond if of == PHI else self.gains.get((BIAS, START))
        return NO if gain is None else gain.verdict(self.worthwhile)

    @property
    def recommendation(self) -> str:
        """What to do."""
        bias, phi = self.verdict(BIAS), self.verdict(PHI)
        if phi == YES:
            return GUIDANCE
        if bias == YES:
            return THRESHOLD
        return TOO_FEW if OPEN in (bias, phi) else NOTHING

    @property
    def examples_needed(self) -> float | None:
        """About how many examples would settle what cannot be told, two digits, rounded up; None where all can be told,
        inf where more would be needed than anybody has."""
        gains = {PHI: self.beyond, BIAS: self.gains.get((BIAS, START))}
        found = [gain for of, gain in gains.items() if gain is not None and self.verdict(of) == OPEN]
        if not found:
            return None
        ratio = max((ERRORS * gain.error / max(abs(gain.mean), self.worthwhile)) ** 2 for gain in found)
        needed = self.examples * ratio
        if not needed <= MOST_NEEDED:
            return math.inf
        unit = 10.0 ** max(0, math.floor(math.log10(needed)) - 1)
        return math.ceil(needed / unit) * unit

    def __str__(self) -> str:
        rows = [("", "score", "better by", "pays?")]
        for name, score in self.scores.items():
            pays = self.verdict(name) if name == BIAS or (name == PHI and BIAS not in self.scores) else ""
            rows.append((TITLES[name], f"{score:.4g}", str(self.gains.get((name, START), "")), pays))
        if {BIAS, PHI} <= self.scores.keys():
            rows.append(("phi beyond the better", "", str(self.beyond), self.verdict(PHI)))
        lines = [f"{name:24}{score:12}{gain:24}{pays}".rstrip() for name, score, gain, pays in rows]
        needed, more = self.examples_needed, ""
        if any(math.isnan(gain.mean) for gain in self.gains.values()):
            more = f" The metric failed {ATTEMPTS} times on the same rows."
        elif needed is not None and not all(math.isfinite(gain.error) for gain in self.gains.values()):
            more = f" An error takes {FEWEST_ROWS} examples in each set, and a metric that makes sense on half of them."
        elif needed is not None:
            many = f"about {needed:,.0f} examples" if math.isfinite(needed) else "more examples than you will get"
            more = f" To tell what cannot be told would take {many}."
        advice = f"Recommendation: {self.recommendation}."
        if PHI not in self.scores and self.recommendation == NOTHING:
            advice = "A bias does not pay. Whether phi does, trainer.diagnose() says: that takes the model."
        calls, passes = (sum(spent.values()) for spent in (self.ledger.calls, self.ledger.passes))
        direction = "greater" if self.greater_is_better else "smaller"
        return (
            f"Diagnosis before training: {self.metric} ({direction} is better), {self.examples} examples, each judged "
            "by what was fitted to others\n\n" + "\n".join(lines) + f"\n\n{advice}"
            f"{more}\n± is one standard error; a gain below {self.worthwhile:.2g} is not worth having; {passes} passes "
            f"and {calls} metric calls in {self.seconds:.1f} s. Nothing was trained."
        )


def scored(
    score: Callable[[EvalPrediction], float],
    predictions: Mapping[str, EvalPrediction],
    num_rows: int,
    take: Callable[[EvalPrediction, np.ndarray], EvalPrediction] | None,
    seed: int,
) -> Scored:
    """The metric of candidates on one fold, none of whose rows they were fitted to.

    Args:
        score: greater is better; nan where the metric fails.
        predictions: of the fold, "start" among them.
        num_rows: of the fold.
        take: (prediction, sorted rows) -> that of some rows; None: the metric makes sense on all rows only.
        seed: of the halves.
    """
    generator, half = np.random.default_rng(seed), num_rows // 2
    count = HALVES if take is not None and num_rows >= FEWEST_ROWS else 0
    take = take or (lambda prediction, rows: prediction)
    orders = [generator.permutation(num_rows) for _ in range(count)]
    whole = {
        name: next(filter(math.isfinite, (score(prediction) for _ in range(ATTEMPTS))), math.nan)
        for name, prediction in predictions.items()
    }
    halves = {
        name: np.array([score(take(prediction, np.sort(order[:half]))) for order in orders])
        for name, prediction in predictions.items()
    }
    others = np.array([score(take(predictions[START], np.sort(order[half:]))) for order in orders[:SUMMED]])
    if count and whole[START] and np.allclose(halves[START][:SUMMED] + others, whole[START]):
        halves = {name: 2 * values for name, values in halves.items()}  # a sum over rows, not a mean
    return whole, halves


def judged(
    folds: Sequence[Scored], metric: Metric, examples: int, worthwhile: float | None, ledger: Ledger, seconds: float
) -> Diagnosis:
    """What the folds say together; the arguments are those of `Diagnosis`.

    Args:
        worthwhile: None: the metric's own standard error on the examples.
    """
    means = {name: float(np.mean([whole[name] for whole, _ in folds])) for name in TITLES if name in folds[0][0]}
    pairs = [(of, over) for of, over in ((PHI, START), (BIAS, START), (PHI, BIAS)) if {of, over} <= set(means)]
    spread = _error([halves[START] for _, halves in folds])
    default = spread if 0 < spread < math.inf else 0.01 * abs(means[START])
    return Diagnosis(
        metric.name,
        metric.greater_is_better,
        examples,
        worthwhile or default or 1e-9,
        {name: metric.sign * mean for name, mean in means.items()},
        {pair: _gain(folds, *pair) for pair in pairs},
        ledger,
        seconds,
    )


def _gain(folds: Sequence[Scored], of: str, over: str) -> Gain:
    mean = float(np.mean([whole[of] - whole[over] for whole, _ in folds]))
    error = _error([halves[of] - halves[over] for _, halves in folds])
    return Gain(mean, math.inf if error == 0 != mean else error)  # a gain that never varies has an unknown error


def _error(halves: Sequence[np.ndarray]) -> float:
    """Standard error of the folds' mean, by the scatter over random halves of what is finite; inf of too few."""
    finite = [values[np.isfinite(values)] for values in halves]
    if min(map(len, finite)) <= HALVES // 2:
        return math.inf
    return math.sqrt(sum(values.var(ddof=1) for values in finite)) / len(finite)
