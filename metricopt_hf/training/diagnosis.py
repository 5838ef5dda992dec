"""Diagnosis: before any training, what a bias per logit gives, what phi gives beyond it, and whether that can be told.

Observation and selection rows are two folds. On each, the predictions are linearised at the present phi; a bias is
tuned and phi goes up the metric on one fold, and both are measured on the other's predictions. Nothing is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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
from ..evaluation.rows import take_rows
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
SUMMED = 3  # of them, whose values and the other halves' make up that of all rows, if the metric is a sum over rows
ERRORS = 2.0  # a gain of more than so many standard errors is none of chance
FEWEST_ROWS = 16  # of a fold, of which halves say anything
UPDATES = 40  # of phi, on one linearization
MOST_NEEDED = 1e6  # examples; beyond, no number is named

Measured = tuple[dict[str, float], dict[str, np.ndarray]]  # by candidate: values on all rows; on the same random halves


@dataclass(frozen=True)
class Gain:
    """How much better one candidate is than another on rows that it was not fitted to.

    Attributes:
        mean: difference of their scores, in the metric's unit; positive where it is better.
        error: its standard error; inf where it is not known: of too few rows, or of a metric of all rows only.
    """

    mean: float
    error: float

    def verdict(self, worthwhile: float) -> Verdict:
        """Is it better? "no": twice `worthwhile` is ruled out. "cannot tell": the error is too great to say."""
        if self.mean > ERRORS * self.error:
            return YES
        return NO if self.mean + ERRORS * self.error < 2 * worthwhile or self.mean <= -self.error else OPEN

    def __str__(self) -> str:
        if self.mean == self.error == 0:
            return "no difference"
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
        """About how many examples would settle what cannot be told, two digits, rounded up; None where all can be told,
        inf where more would be needed than anybody has."""
        gains = [self.beyond, *([self.gains[BIAS, START]] if BIAS in self.scores else [])]
        found = [gain for gain in gains if gain.verdict(self.worthwhile) == OPEN]
        if not found:
            return None
        ratio = max((ERRORS * gain.error / max(abs(gain.mean), self.worthwhile)) ** 2 for gain in found)
        needed = self.examples * ratio
        if not needed <= MOST_NEEDED:
            return math.inf
        unit = 10.0 ** max(0, math.floor(math.log10(needed)) - 1)
        return math.ceil(needed / unit) * unit

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
        words = {YES: "{} pays", NO: "{} does not pay", OPEN: "whether {} pays cannot be told"}
        gain, name = self.beyond, f"phi beyond {'a bias' if BIAS in self.scores else 'the start'}"
        reasons = [f"{words[self.verdict(PHI)].format(name)} ({gain})"]
        if BIAS in self.scores:
            reasons.insert(0, f"{words[self.verdict(BIAS)].format('a bias')} ({self.gains[BIAS, START]})")
        needed, more = self.examples_needed, ""
        if needed is not None and not math.isfinite(gain.error):
            more = f" An error takes {FEWEST_ROWS} examples in each set, and a metric that makes sense on half of them."
        elif needed is not None:
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
        colors = {name: color for name, color in ((PHI, "tab:orange"), (BIAS, "tab:blue")) if name in self.scores}
        for i, (name, color) in enumerate(colors.items()):  # the first stands lowest
            gain = self.gains[name, START]
            error = ERRORS * gain.error if math.isfinite(gain.error) else None
            axes.errorbar(gain.mean, i, xerr=error, fmt="o", capsize=4, color=color)
        axes.axvspan(-self.worthwhile, self.worthwhile, color="tab:gray", alpha=0.15, label="not worth having")
        axes.axvline(0, color="tab:gray", linewidth=1)
        axes.set_yticks(range(len(colors)), [TITLES[name] for name in colors])
        label = f"{self.metric}: better than at the start ({self.scores[START]:.3g}) by, ± 2 standard errors"
        axes.set(ylim=(-0.6, len(colors) - 0.4), xlabel=label, title=self.recommendation)
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
    with tqdm(total=6, leave=False, disable=args.disable_tqdm or not trainer.is_local_process_zero()) as bar:
        folds: list[_Fold] = []
        coordinates, way = None, None  # the second fold's are the first's
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
                ledger.add("observe", 0, 0.0, linearizer.passes(prediction, coordinates.dim))
            except NotLinearizable as error:
                raise ConfigurationError(
                    f"Nothing can be told before training: {error}, so that every number would take a forward pass. "
                    "Train a short run instead, and print its result."
                ) from error
            folds.append(_Fold(evaluator, linear, coordinates, metric.merit(score)))
            bar.update()
        found = []
        for fitted, held_out in (folds, folds[::-1]):
            z = _ascended(fitted, plan, generator)
            bar.update()
            found.append(_measured(fitted, held_out, z, plan))
            bar.update()
    names: list[Candidate] = [name for name in TITLES if all(name in scores for scores, _ in found)]
    pairs = [(PHI, START)] + [(BIAS, START), (PHI, BIAS)] * (BIAS in names)
    spread = math.sqrt(sum(_scatter(halves[START]) ** 2 for _, halves in found)) / 2
    means = {name: float(np.mean([scores[name] for scores, _ in found])) for name in names}
    default = spread if 0 < spread < math.inf else 0.01 * abs(means[START])
    return Diagnosis(
        metric.name,
        metric.greater_is_better,
        sum(fold.linear.num_rows for fold in folds),
        worthwhile or default or 1e-9,
        {name: metric.sign * mean for name, mean in means.items()},
        {pair: _gain(found, pair) for pair in pairs},
        ledger,
        perf_counter() - since,
    )


def _ascended(fold: _Fold, plan: PhasePlan, generator: torch.Generator) -> Tensor:
    """z, [k], to which the better of the guides goes on a fold's linearization."""
    evaluator, best, best_value = fold.evaluator, torch.zeros(fold.coordinates.dim), fold.value
    for guide in from_spec(AUTO, linearised=True).values():
        local = LocalMetric(
            evaluator, fold.coordinates, fold.linear, plan.spread(fold.coordinates.dim), generator, Faults(),
            Trajectory(), 0, fold.value, plan.on_all_rows, allowance=plan.calls // 2,
        )
        guide.start(GuideContext(fold.coordinates.dim, generator))
        if not guide.applies(local):
            continue
        rate = plan.learning_rate(fold.coordinates.dim) / 2
        z = ascend(guide, local, UPDATES, rate, lambda parameter, rate: torch.optim.Adam([parameter], rate))
        value = agreed(evaluator.rank, evaluator.world_size, partial(_merit, evaluator, fold.linear.at(z)))
        if value > best_value:
            best, best_value = z, value
    return best


def _measured(fitted: _Fold, held_out: _Fold, z: Tensor, plan: PhasePlan) -> Measured:
    """Each candidate on the fold that it was not fitted to."""
    evaluator = held_out.evaluator
    predictions = {START: held_out.linear.centre, PHI: held_out.linear.at(z)}
    if evaluator.concat and evaluator.complete is None and _has_place_for_bias(fitted.linear.centre):
        for name, there in ((START, fitted.linear.centre), (PHI, fitted.linear.at(z))):
            tune = partial(tune_bias, evaluator.metric, there, evaluator.ledger)
            bias = agreed(evaluator.rank, evaluator.world_size, tune)
            predictions[BIAS if name == START else PHI] = add_bias(predictions[name], bias)

    def compute() -> Measured:
        generator = np.random.default_rng(plan.seed)
        rows, sizes = held_out.linear.num_rows, held_out.linear.batch_sizes
        on_part = not plan.on_all_rows and evaluator.complete is None and held_out.linear.unsplittable is None
        count = HALVES if on_part and rows >= FEWEST_ROWS else 0
        orders = [generator.permutation(rows) for _ in range(count)]

        def on(prediction: EvalPrediction, order: np.ndarray) -> float:
            return _merit(evaluator, take_rows(prediction, np.sort(order), evaluator.concat, sizes))

        scores = {name: _merit(evaluator, p) for name, p in predictions.items()}
        halves = {name: np.array([on(p, o[: rows // 2]) for o in orders]) for name, p in predictions.items()}
        rest = np.array([on(held_out.linear.centre, order[rows // 2 :]) for order in orders[:SUMMED]])
        if count and scores[START] and np.allclose(halves[START][:SUMMED] + rest, scores[START]):
            halves = {name: 2 * values for name, values in halves.items()}  # a sum over rows, not a mean
        return scores, halves

    return agreed(evaluator.rank, evaluator.world_size, compute)


def _merit(evaluator: Evaluator, prediction: EvalPrediction) -> float:
    """The metric of predictions, greater is better; nan where it fails."""
    try:
        return evaluator.metric.merit(evaluator.score(prediction, "select"))
    except MetricError:
        return float("nan")


def _gain(found: list[Measured], pair: tuple[str, str]) -> Gain:
    mean = float(np.mean([scores[pair[0]] - scores[pair[1]] for scores, _ in found]))
    error = math.sqrt(sum(_scatter(halves[pair[0]] - halves[pair[1]]) ** 2 for _, halves in found)) / 2
    return Gain(mean, math.inf if error == 0 != mean else error)  # a gain that never varies has an unknown error


def _scatter(values: np.ndarray) -> float:
    """Standard deviation over the halves of what is finite; inf of too few."""
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > HALVES // 2 else math.inf


def _has_place_for_bias(prediction: EvalPrediction) -> bool:
    """Whether the predictions are logits: numbers with whole numbers as labels."""
    labels = prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids
    outputs = logits_of(prediction)
    return outputs.dtype.kind == "f" and getattr(labels, "dtype", np.dtype(float)).kind in "iub"
