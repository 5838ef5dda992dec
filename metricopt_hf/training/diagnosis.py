"""Diagnosis: before any training, whether there is something to gain for the metric, and by what.

On the observation split a bias per logit is tuned, and phi is moved uphill where the outputs are still about linear in
it, so that a metric call costs no forward pass; then, as at the end of a training, a bias is tuned there too. Each is
measured once on the selection split, and the noise of their differences says whether they can be told apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import EvalPrediction

from ..errors import MetricError
from ..evaluation.evaluator import Evaluator
from ..evaluation.ledger import Ledger
from ..evaluation.observer import Observer
from ..evaluation.rows import num_rows, take_rows
from ..evaluation.virtual_observer import VirtualObserver
from ..extras import require
from ..phi import Coordinates
from ..posthoc import add_bias, logits_of, tune_bias
from .climbing import climbs, measured

Candidate = Literal["start", "bias", "phi"]
START, BIAS, PHI = "start", "bias", "phi"
TITLES = {START: "start", BIAS: "a bias per logit", PHI: "phi, in its linear surroundings"}

Recommendation = Literal["nothing to gain here", "a threshold suffices", "guidance pays", "too few examples to tell"]
NOTHING, THRESHOLD, GUIDANCE, TOO_FEW = Recommendation.__args__

MOST_COORDINATES = 8  # so that the expansions, of two passes per coordinate, take some 40 passes with all the rest
DRAWS = 100  # random halves of the selection rows
ERRORS = 2.0  # a gain of more than so many standard errors is none of chance


@dataclass(frozen=True)
class Gain:
    """How much better one candidate is than another.

    Attributes:
        mean: difference of their scores on the selection split, in the metric's unit; positive where it is better.
        error: its standard error; nan where it is not known.
    """

    mean: float
    error: float

    def is_real(self, worthwhile: float) -> bool | None:
        """True: it exceeds the noise. False: no gain is worth having. None: the noise is too great to say."""
        if math.isnan(self.error):
            return self.mean >= worthwhile
        if self.mean > ERRORS * self.error:
            return True
        return None if max(self.mean, self.error) >= worthwhile else False

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class Diagnosis:
    """What is known before any training; printed, it is a table.

    Attributes:
        metric: its name.
        greater_is_better: which way it is better.
        examples: rows of the selection split.
        worthwhile: the smallest gain that is worth having, in the metric's unit.
        scores: the metric on the selection split, for "start", "bias" (if a bias has a place), and "phi".
        draws: for each of these, the metric on the same random halves of the rows, [draws]; nan where it failed, empty
            if the metric makes sense on all rows only.
        interpolation_error: how far the interpolated outputs were off at the phi that was measured, as a share of how
            far they had moved; None where scores were observed, one pass for each.
        ledger: metric calls, forward passes and seconds.
        seconds: in all.
    """

    metric: str
    greater_is_better: bool
    examples: int
    worthwhile: float
    scores: Mapping[Candidate, float]
    draws: Mapping[Candidate, np.ndarray]
    interpolation_error: float | None
    ledger: Ledger
    seconds: float

    RECOMMENDATIONS: ClassVar[tuple[str, ...]] = Recommendation.__args__

    def gain(self, of: Candidate, over: Candidate = START) -> Gain:
        """By how much a candidate is better than another.

        The error is the scatter of the difference on random halves of the rows: as great as a bootstrap's, without
        rows that stand there twice, which a retrieval metric would praise.
        """
        sign = 1 if self.greater_is_better else -1
        differences = self.draws[of] - self.draws[over]
        differences = differences[np.isfinite(differences)]
        error = float(differences.std(ddof=1)) if len(differences) > 1 else float("nan")
        return Gain(sign * (self.scores[of] - self.scores[over]), error)

    @property
    def gains(self) -> dict[tuple[Candidate, Candidate], Gain]:
        """(of, over) -> gain; what the recommendation is made of."""
        pairs = [(PHI, START)] + [(PHI, BIAS), (BIAS, START)] * (BIAS in self.scores)
        return {pair: self.gain(*pair) for pair in pairs}

    @property
    def recommendation(self) -> Recommendation:
        """What to do."""
        real = {pair: gain.is_real(self.worthwhile) for pair, gain in self.gains.items()}
        phi, bias = real[PHI, START], real.get((BIAS, START), False)
        beyond_bias = real.get((PHI, BIAS), phi)
        if phi and beyond_bias:
            return GUIDANCE
        if phi or bias:
            return TOO_FEW if beyond_bias is None or (beyond_bias and phi is None) else THRESHOLD
        return TOO_FEW if None in (phi, bias) else NOTHING

    @property
    def examples_needed(self) -> int | None:
        """How many selection examples, of the same kind, would settle it; None if there are enough."""
        if self.recommendation != TOO_FEW:
            return None
        open_ones = [gain for gain in self.gains.values() if gain.is_real(self.worthwhile) is None]
        ratio = max((ERRORS * gain.error / max(gain.mean, self.worthwhile)) ** 2 for gain in open_ones)
        return math.ceil(round(self.examples * ratio, 6))  # 1600.0000000000002 are 1600

    def __str__(self) -> str:
        rows = []
        for name, score in self.scores.items():
            over = [str(self.gain(name, other)) if other in self.scores else "" for other in (START, BIAS)]
            over = ["", ""] if name == START else [over[0], ""] if name == BIAS else over
            rows.append([TITLES[name], f"{score:.4f}", *over])
        headers = ["", "selection split", "better than start by", "better than a bias by"]
        table = require("tabulate", "report").tabulate(rows, headers, disable_numparse=True)
        calls, passes = (sum(spent.values()) for spent in (self.ledger.calls, self.ledger.passes))
        direction = "greater" if self.greater_is_better else "smaller"
        return (
            f"\nDiagnosis before training: {self.metric} ({direction} is better) on {self.examples} examples\n\n{table}"
            f"\n\n{self.advice}\n± is one standard error. {passes} forward passes and {calls} metric calls in "
            f"{self.seconds:.1f} s; nothing was trained.\n"
        )

    @property
    def advice(self) -> str:
        """The recommendation with its reason, as a sentence."""
        gains, recommendation = self.gains, self.recommendation
        if recommendation == GUIDANCE:
            why = f"phi reaches {gains.get((PHI, BIAS), gains[PHI, START])} more than what needs no training"
        elif recommendation == THRESHOLD:
            why = f"a bias per logit reaches {gains[BIAS, START]}, and phi {gains[PHI, BIAS]} more than that"
        elif recommendation == NOTHING:
            why = f"nothing that was tried gains {self.worthwhile:g}"
        else:
            why = (
                f"on {self.examples} examples the noise is as great as the gains; about {self.examples_needed} in the "
                "selection split would do"
            )
        return f"Recommendation: {recommendation}; {why}."

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
            gain = self.gain(name)
            error = None if math.isnan(gain.error) else ERRORS * gain.error
            color = "tab:orange" if name == PHI else "tab:blue"
            axes.errorbar(gain.mean, i, xerr=error, fmt="o", capsize=4, color=color)
        axes.axvspan(-self.worthwhile, self.worthwhile, color="tab:gray", alpha=0.15, label="not worth having")
        axes.axvline(0, color="tab:gray", linewidth=1)
        axes.set_yticks(range(len(names)), [TITLES[name] for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel(f"{self.metric}: better than at the start ({self.scores[START]:.3f}) by, ± 2 standard errors")
        axes.set_title(self.recommendation)
        axes.legend(fontsize="small", framealpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=120)


def diagnose(
    observation: Evaluator,
    selection: Evaluator,
    coordinates: Coordinates,
    perturbation_std: float,
    on_all_rows: bool,
    worthwhile: float,
    seed: int,
) -> Diagnosis:
    """Try what there is to gain; phi is put back.

    Args:
        observation, selection: the metric on either split, with one ledger.
        coordinates: in which phi is moved.
        perturbation_std: on each of them.
        on_all_rows: whether the metric makes sense on all rows only.
        worthwhile: see `Diagnosis`.
        seed: of the private generators, the same on every rank.

    Raises:
        MetricError: the metric fails on a split at the start.
    """
    since = perf_counter()
    metric, phi = observation.metric, observation.phi
    completed = observation.complete is not None  # by what knows all rows by their place
    observer = Observer(observation, perturbation_std, seed)
    virtual = VirtualObserver(observation, perturbation_std, on_all_rows, seed)
    for evaluator in (observation, selection):
        evaluator.freeze(lambda: observer.moved(coordinates))
    with phi.restored():
        start, (score, seen) = phi.read(), measured(observation, phi.read(), "observe")
        best, error = (score, start, seen), None
        for score, point, there, off in climbs(observer, virtual, coordinates):
            if metric.sign * (score - best[0]) > 0:
                best, error = (score, point, there), off
        _, moved, there = best
        held_out = {START: measured(selection, start, "select")[1], PHI: measured(selection, moved, "select")[1]}
    if not completed and _has_place_for_bias(seen, observation.concat):
        held_out[BIAS] = add_bias(held_out[START], _tuned_bias(observation, seen))
        held_out[PHI] = add_bias(held_out[PHI], _tuned_bias(observation, there))

    def measure() -> tuple[dict[str, float], dict[str, np.ndarray]]:
        predictions = {name: held_out[name] for name in TITLES if name in held_out}
        scores = {name: _score(selection, prediction) for name, prediction in predictions.items()}
        return scores, _on_halves(selection, predictions, 0 if on_all_rows or completed else DRAWS, seed)

    scores, draws = _agreed(selection, measure)
    return Diagnosis(
        metric.name,
        metric.greater_is_better,
        num_rows(held_out[START], selection.concat),
        worthwhile,
        scores,
        draws,
        error,
        observation.ledger,
        perf_counter() - since,
    )


def _has_place_for_bias(prediction: EvalPrediction, concat: bool) -> bool:
    """Whether the predictions are logits: numbers with whole numbers as labels."""
    if not concat:
        return False
    labels = prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids
    outputs = logits_of(prediction)
    return outputs.dtype.kind == "f" and getattr(labels, "dtype", np.dtype(float)).kind in "iub"


def _tuned_bias(evaluator: Evaluator, prediction: EvalPrediction) -> np.ndarray:
    return _agreed(evaluator, lambda: tune_bias(evaluator.metric, prediction, evaluator.ledger))


def _score(evaluator: Evaluator, prediction: EvalPrediction) -> float:
    with evaluator.ledger.charge("select"):
        return evaluator.metric(prediction, evaluator.complete)


def _on_halves(
    evaluator: Evaluator, predictions: Mapping[str, EvalPrediction], count: int, seed: int
) -> dict[str, np.ndarray]:
    """The metric of each of the predictions on `count` random halves of the rows, the same for all; nan: it failed."""
    generator = np.random.default_rng(seed)
    rows = num_rows(next(iter(predictions.values())), evaluator.concat)
    draws: dict[str, list[float]] = {name: [] for name in predictions}
    for _ in range(count):
        half = np.sort(generator.permutation(rows)[: max(1, rows // 2)])
        for name, prediction in predictions.items():
            try:
                draws[name].append(_score(evaluator, take_rows(prediction, half, evaluator.concat)))
            except MetricError:
                draws[name].append(float("nan"))
    return {name: np.array(values) for name, values in draws.items()}


def _agreed(evaluator: Evaluator, compute: Callable[[], Any]) -> Any:
    """What the first rank computes, on every rank: another call of the metric may answer something else."""
    outcome = [None]
    if evaluator.rank == 0:
        try:
            outcome = [compute()]
        except MetricError as error:
            outcome = [error]
    if evaluator.world_size > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], MetricError):
        raise outcome[0]
    return outcome[0]
