"""Diagnosis: before any training, what a bias per logit gives, what phi gives beyond it, and whether that can be told.

Observation and selection rows are two folds. On each, the predictions are linearised at the present phi; a bias is
tuned and phi goes up the metric on one fold, and both are measured on the other's predictions. Nothing is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import EvalPrediction

from ..errors import ConfigurationError, MetricError
from ..evaluation.evaluator import Evaluator, agreed
from ..evaluation.ledger import Faults, Ledger
from ..evaluation.linearization import Linearization
from ..evaluation.linearizer import Linearizer, NotLinearizable
from ..evaluation.local_metric import LocalMetric
from ..evaluation.rows import take_rows, unsplittable
from ..evaluation.trajectory import Trajectory
from ..extras import require
from ..guides import AUTO, GuideContext, from_spec
from ..phi import Coordinates
from ..posthoc import add_bias, logits_of, tune_bias
from .ascent import ascend
from .observing import Observing
from .plan import PhasePlan
from .setup import Setup

Candidate = Literal["start", "bias", "phi"]
START, BIAS, PHI = "start", "bias", "phi"
TITLES = {START: "start", BIAS: "a bias per logit", PHI: "phi, near where it is"}

Recommendation = Literal["nothing to gain here", "a threshold suffices", "guidance pays", "too few examples to tell"]
NOTHING, THRESHOLD, GUIDANCE, TOO_FEW = Recommendation.__args__
Verdict = Literal["yes", "no", "cannot tell"]
YES, NO, OPEN = Verdict.__args__

HALVES = 50  # random halves of a fold's rows, whose scatter is the error
ERRORS = 2.0  # a gain of more than so many standard errors is none of chance
FEWEST_ROWS = 16  # of a fold, of which halves say anything
UPDATES = 40  # of phi, on one linearization
MOST_NEEDED = 1e6  # examples; beyond, no number is named


@dataclass(frozen=True)
class Gain:
    """How much better one candidate is than another on rows that it was not fitted to.

    Attributes:
        mean: difference of their scores, in the metric's unit; positive where it is better.
        error: its standard error; inf where there are too few rows to know.
    """

    mean: float
    error: float

    def verdict(self, worthwhile: float) -> Verdict:
        """Is it better? "no": no gain is worth having. "cannot tell": the error is too great to say."""
        if self.mean > ERRORS * self.error:
            return YES
        return NO if self.mean + ERRORS * self.error < 2 * worthwhile or self.mean <= -self.error else OPEN

    def __str__(self) -> str:
        error = f" ± {self.error:.2g}" if math.isfinite(self.error) else ", error unknown"
        return f"{self.mean:+.4g}{error}"


@dataclass(frozen=True)
class Diagnosis:
    """What is known before any training; printed, it is a table.

    Attributes:
        metric: its name.
        greater_is_better: which way it is better.
        examples: rows, of both folds.
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
    scores: Mapping[Candidate, float]
    gains: Mapping[tuple[Candidate, Candidate], Gain]
    ledger: Ledger
    seconds: float

    RECOMMENDATIONS: ClassVar[tuple[str, ...]] = Recommendation.__args__

    @property
    def beyond(self) -> Gain:
        """Of phi over what needs no training."""
        return self.gains.get((PHI, BIAS), self.gains[PHI, START])

    def verdict(self, of: Candidate) -> Verdict:
        """Does a bias pay against the start; does phi pay beyond a bias (or the start, where a bias has no place)?"""
        gain = self.beyond if of == PHI else self.gains.get((BIAS, START))
        return NO if gain is None else gain.verdict(self.worthwhile)

    @property
    def recommendation(self) -> Recommendation:
        """What to do."""
        bias, phi = self.verdict(BIAS), self.verdict(PHI)
        if phi == YES and self.gains[PHI, START].verdict(self.worthwhile) == YES:
            return GUIDANCE
        if bias == YES:
            return THRESHOLD
        return TOO_FEW if OPEN in (bias, phi) else NOTHING

    @property
    def examples_needed(self) -> float | None:
        """About how many examples would settle what cannot be told, to two digits; None where all can be, inf where
        more would be needed than anybody has."""
        gains = [self.beyond, *([self.gains[BIAS, START]] if BIAS in self.scores else [])]
        found = [gain for gain in gains if gain.verdict(self.worthwhile) == OPEN]
        if not found:
            return None
        ratio = max((ERRORS * gain.error / max(abs(gain.mean), self.worthwhile)) ** 2 for gain in found)
        needed = self.examples * ratio
        return float(f"{needed:.1e}") if needed <= MOST_NEEDED else math.inf

    def __str__(self) -> str:
        rows = [["", "score", "better than start by", "better than a bias by"]]
        for name, score in self.scores.items():
            over = [str(self.gains[name, other]) if (name, other) in self.gains else "" for other in (START, BIAS)]
            rows.append([TITLES[name], f"{score:.4g}", *over])
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        calls, passes = (sum(spent.values()) for spent in (self.ledger.calls, self.ledger.passes))
        direction = "greater" if self.greater_is_better else "smaller"
        return (
            f"Diagnosis before training: {self.metric} ({direction} is better), {self.examples} examples, each judged "
            "by what was fitted to others\n\n" + "\n".join(lines) + f"\n\n{self.advice}\n± is one standard error; "
            f"{passes} passes and {calls} metric calls in {self.seconds:.1f} s. Nothing was trained."
        )

    @property
    def advice(self) -> str:
        """The recommendation with its reasons, as sentences."""
        words = {YES: "pays", NO: "does not pay", OPEN: "cannot be told"}
        other = "a bias" if BIAS in self.scores else "the start"
        reasons = [f"phi beyond {other} {words[self.verdict(PHI)]} ({self.beyond})"]
        if BIAS in self.scores:
            reasons.insert(0, f"a bias {words[self.verdict(BIAS)]} ({self.gains[BIAS, START]})")
        needed = self.examples_needed
        more = ""
        if needed is not None:
            many = f"about {needed:,.0f} examples" if math.isfinite(needed) else "more examples than you will get"
            more = f" To tell what cannot be told would take {many}."
        return f"Recommendation: {self.recommendation}. {'; '.join(reasons).capitalize()}.{more}"

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the gains over the start, with two standard errors, into an image file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        require("matplotlib", "plot")
        from matplotlib.figure import Figure  # no pyplot: no windows, no global state

        figure = Figure(figsize=(8, 2.6), layout="constrained")
        axes = figure.subplots()
        names = [name for name in (PHI, BIAS) if name in self.scores]  # the first stands lowest
        for i, name in enumerate(names):
            gain = self.gains[name, START]
            error = ERRORS * gain.error if math.isfinite(gain.error) else None
            color = "tab:orange" if name == PHI else "tab:blue"
            axes.errorbar(gain.mean, i, xerr=error, fmt="o", capsize=4, color=color)
        axes.axvspan(-self.worthwhile, self.worthwhile, color="tab:gray", alpha=0.15, label="not worth having")
        axes.axvline(0, color="tab:gray", linewidth=1)
        axes.set_yticks(range(len(names)), [TITLES[name] for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel(f"{self.metric}: better than at the start ({self.scores[START]:.3g}) by, ± 2 standard errors")
        axes.set_title(self.recommendation)
        axes.legend(fontsize="small", framealpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class _Fold:
    """One of the two sets."""

    evaluator: Evaluator
    linear: Linearization
    coordinates: Coordinates
    value: float


def diagnose(seen: Observing, setup: Setup, worthwhile: float | None) -> Diagnosis:
    """See `MetricOptTrainer.diagnose`.

    Raises:
        ConfigurationError: the metric is one of the model, its predictions cannot be linearised, or `worthwhile` is not
            positive.
        MetricError: the metric fails at the start.
    """
    since, trainer, metric = perf_counter(), seen.trainer, setup.metric
    if not metric.of_predictions:
        raise ConfigurationError(
            f"The metric {metric.name!r} is one of the model: what phi and a bias reach cannot be told from "
            "predictions, so there is nothing to diagnose."
        )
    if worthwhile is not None and not worthwhile > 0:
        raise ConfigurationError(f"worthwhile={worthwhile!r} must be positive: a gain, in the metric's unit.")
    ledger, args = Ledger(), trainer.args
    generator = torch.Generator().manual_seed(args.seed)
    plan = PhasePlan.from_args(args, 1, True)
    silent = args.disable_tqdm or not trainer.is_local_process_zero()
    with tqdm(total=6, desc="diagnosing", leave=False, disable=silent) as bar:
        folds: list[_Fold] = []
        coordinates, way = None, None
        for part in (setup.observation, setup.selection):
            evaluator = seen.evaluator(part, ledger)
            score, prediction = evaluator.evaluate_with_predictions("observe")
            if prediction is None:
                raise ConfigurationError("The metric is computed batch by batch: there are no predictions to diagnose.")
            linearizer = Linearizer(evaluator, plan.dim, seen.loss_gradients, generator)
            linearizer.way = way or linearizer.way
            try:
                coordinates = coordinates or linearizer.coordinates()
                way = linearizer.way
                linear = linearizer.linearize(coordinates.basis, prediction)
            except NotLinearizable as error:
                raise ConfigurationError(
                    f"Nothing can be told before training: {error}, so that every number would take a forward pass. "
                    "Train a short run instead, and print its result."
                ) from error
            folds.append(_Fold(evaluator, linear, coordinates, metric.merit(score)))
            bar.update()
        found = []
        for fitted, held_out in (folds, folds[::-1]):
            z = _ascended(fitted, plan, generator, seen)
            bar.update()
            found.append(_measured(fitted, held_out, z, args.seed))
            bar.update()
    names = [name for name in TITLES if all(name in scores for scores, _ in found)]
    sign = metric.sign
    pairs = [(PHI, START)] + [(BIAS, START), (PHI, BIAS)] * (BIAS in names)
    gains = {pair: _gain(found, pair) for pair in pairs}
    spread = math.sqrt(sum(_scatter(halves[START]) ** 2 for _, halves in found)) / 2
    default = spread if math.isfinite(spread) and spread > 0 else 0.01 * abs(np.mean([s[START] for s, _ in found]))
    return Diagnosis(
        metric.name,
        metric.greater_is_better,
        sum(fold.linear.num_rows for fold in folds),
        worthwhile or float(default) or 1e-9,
        {name: sign * float(np.mean([scores[name] for scores, _ in found])) for name in names},
        gains,
        ledger,
        perf_counter() - since,
    )


def _ascended(fold: _Fold, plan: PhasePlan, generator: torch.Generator, seen: Observing) -> Tensor:
    """z, [k], to which the better of the guides goes on a fold's linearization."""
    best, best_value = torch.zeros(fold.coordinates.dim), fold.value
    for guide in from_spec(AUTO, linearised=True).values():
        local = LocalMetric(
            fold.evaluator, fold.coordinates, fold.linear, plan.spread(fold.coordinates.dim), generator, Faults(),
            Trajectory(), 0, fold.value, plan.on_all_rows, allowance=plan.calls // 2,
        )
        guide.start(GuideContext(fold.coordinates.dim, generator))
        if not guide.applies(local):
            continue
        rate = plan.learning_rate(fold.coordinates.dim) / 2
        z = ascend(guide, local, UPDATES, rate, _adam)
        value = _value(fold.evaluator, fold.linear.at(z))
        if value > best_value:
            best, best_value = z, value
    return best


def _adam(parameter: Tensor, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([parameter], rate)


def _measured(fitted: _Fold, held_out: _Fold, z: Tensor, seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(values on all rows, on the same random halves) of each candidate, on the fold that it was not fitted to."""
    evaluator = held_out.evaluator
    predictions = {START: held_out.linear.centre, PHI: held_out.linear.at(z)}
    if _has_place_for_bias(fitted.linear.centre, evaluator.concat) and evaluator.complete is None:
        for name, there in ((START, fitted.linear.centre), (PHI, fitted.linear.at(z))):
            bias = agreed(
                evaluator.rank,
                evaluator.world_size,
                lambda there=there: tune_bias(evaluator.metric, there, evaluator.ledger),
            )
            predictions[BIAS if name == START else PHI] = add_bias(predictions[name], bias)

    def compute() -> tuple[dict[str, float], dict[str, np.ndarray]]:
        generator = np.random.default_rng(seed)
        rows, sizes = held_out.linear.num_rows, held_out.linear.batch_sizes
        divisible = unsplittable(held_out.linear.centre, evaluator.concat, sizes) is None
        enough = rows >= FEWEST_ROWS and evaluator.complete is None and divisible
        halves = [np.sort(generator.permutation(rows)[: rows // 2]) for _ in range(HALVES * enough)]
        on_halves = {
            name: np.array([_merit(evaluator, take_rows(p, half, evaluator.concat, sizes)) for half in halves])
            for name, p in predictions.items()
        }
        return {name: _merit(evaluator, p) for name, p in predictions.items()}, on_halves

    return agreed(evaluator.rank, evaluator.world_size, compute)


def _value(evaluator: Evaluator, prediction: EvalPrediction) -> float:
    """The metric of predictions, the same on every rank; nan where it fails."""
    return agreed(evaluator.rank, evaluator.world_size, lambda: _merit(evaluator, prediction))


def _merit(evaluator: Evaluator, prediction: EvalPrediction) -> float:
    try:
        return evaluator.metric.merit(evaluator.score(prediction, "select"))
    except MetricError:
        return float("nan")


def _gain(found: list[tuple[dict[str, float], dict[str, np.ndarray]]], pair: tuple[str, str]) -> Gain:
    of, over = pair
    mean = float(np.mean([scores[of] - scores[over] for scores, _ in found]))
    error = math.sqrt(sum(_scatter(halves[of] - halves[over]) ** 2 for _, halves in found)) / 2
    return Gain(mean, error)


def _scatter(values: np.ndarray) -> float:
    """Standard deviation over the halves of what is finite; inf of too few."""
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > HALVES // 2 else math.inf


def _has_place_for_bias(prediction: EvalPrediction, concat: bool) -> bool:
    """Whether the predictions are logits: numbers with whole numbers as labels."""
    if not concat:
        return False
    labels = prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids
    outputs = logits_of(prediction)
    return outputs.dtype.kind == "f" and getattr(labels, "dtype", np.dtype(float)).kind in "iub"
