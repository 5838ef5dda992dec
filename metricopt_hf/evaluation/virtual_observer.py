"""VirtualObserver: many observations from few forward passes, by calling the metric on interpolated predictions.

A pass over thousands of examples gives as many rows of outputs, and an observation of the score keeps one number of
them. Here the outputs are kept: a few passes round phi make an `Interpolator`, and the metric is called on what that
says of other phi, on a random half of the rows each round, so that what holds for some rows only averages away.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import EvalPrediction

from ..errors import MetricError
from ..phi import Coordinates
from .answer import values_of
from .evaluator import Evaluator
from .interpolator import InterpolatedPredictions, Interpolator
from .observation import Observation
from .observer import Observed
from .rows import num_rows


class VirtualObserver:
    """Expands the outputs round phi, and observes on what is interpolated.

    An expansion takes passes at both ends of as many orthogonal directions as there are coordinates, drawn at random
    and as long as an ordinary perturbation: so the real scores that come with them say what the guide is worth.

    Args:
        evaluator: predicts, and gives the metric on the observation set.
        perturbation_std: standard deviation of the perturbation on each coordinate.
        on_all_rows: whether the metric makes sense on all rows only.
        seed: of the private generator, the same on every rank.
    """

    def __init__(self, evaluator: Evaluator, perturbation_std: float, on_all_rows: bool, seed: int):
        self.evaluator, self.perturbation_std = evaluator, perturbation_std
        # what completes predictions knows all rows by their place
        self.on_all_rows = on_all_rows or evaluator.complete is not None
        self.generator = torch.Generator().manual_seed(seed)
        self.interpolator: Interpolator | None = None
        self.centre: Tensor | None = None  # phi round which was expanded: [d]
        self.directions: Tensor | None = None  # along which: [k, k], a step each
        self.error: float | None = None  # of the last interpolator, where the next one was made
        # of the last expansion, a forward pass and a metric call: medians, in seconds, the same on every rank
        self.pass_seconds, self.call_seconds = float("nan"), float("nan")

    @staticmethod
    def passes(dim: int) -> int:
        """Forward passes of an expansion in `dim` coordinates."""
        return 2 * dim + 1

    def expand(self, coordinates: Coordinates, step: int) -> Observed:
        """Take the passes round the present phi, and measure how far the last interpolator was off there.

        Returns:
            The real observations that come with it: the metric at phi, and at both ends of each direction.

        Raises:
            NotInterpolable: the outputs are no smooth function of phi.
        """
        phi = self.evaluator.phi.read()
        draws = torch.randn(coordinates.dim, coordinates.dim, generator=self.generator, dtype=torch.float64)
        directions = torch.linalg.qr(draws).Q.float() * self.perturbation_std * coordinates.dim**0.5
        offsets, points = self._points(coordinates, phi, directions)
        scores = self.evaluator.evaluate_many(points, "observe", predictions=True)
        self.call_seconds = float(np.median(scores.call_seconds))
        self.pass_seconds = float(np.median(scores.seconds - scores.call_seconds))
        if self.interpolator is not None:
            self.error = self.interpolator.error(self._relative(coordinates), scores.predictions[0])
        self._interpolate(scores.predictions, directions)
        self.centre = phi
        z = coordinates.encode(phi).cpu()
        fine = [i for i, error in enumerate(scores.errors) if error is None]
        return Observed(
            [
                Observation(
                    (z + offsets[i]).numpy(),
                    float(scores.values[i]),
                    float("nan"),
                    step,
                    float(scores.seconds[i]),
                    raw=tuple(scores.raw[i]),
                )
                for i in fine
            ],
            [error for error in scores.errors if error is not None],
            [scores.predictions[i] for i in fine],
        )

    def observe(self, coordinates: Coordinates, step: int, pairs: int, predictions: bool = False) -> Observed:
        """The metric at antithetic pairs round the present phi, on interpolated predictions: 2 `pairs` + 1 calls.

        One half of the rows may be harder than another. So scores are moved by what the metric at phi itself is better
        on all rows than the pairs are on average.

        Args:
            predictions: whether to return them too, with the scores as they were before that.
        """
        phi = self.evaluator.phi.read()
        here, z = self._relative(coordinates), coordinates.encode(phi).cpu()
        draws = torch.randn(pairs, coordinates.dim, generator=self.generator) * self.perturbation_std
        offsets = torch.stack([draws, -draws], dim=1).reshape(-1, coordinates.dim)
        part = self.interpolator
        if not self.on_all_rows:
            count = num_rows(part.centre, part.concat)
            rows = torch.randperm(count, generator=self.generator)[: max(1, count // 2)]
            part = part.take(np.sort(rows.numpy()))
        start = perf_counter()
        (whole,), errors = self._scores(self.interpolator, here[None])
        scores, more = self._scores(part, here + offsets.numpy())
        seconds = (perf_counter() - start) / (len(scores) + 1)
        own, fine = scores[:, 0], np.isfinite(scores[:, 0])
        complete = scores.reshape(pairs, -1)
        complete = complete[np.isfinite(complete).all(1)].reshape(-1, scores.shape[1])
        if len(complete) and np.isfinite(whole).all():
            scores = scores + (whole - complete.mean(0))
        observations = [
            Observation((z + offset).numpy(), float(score), float("nan"), step, seconds, raw=tuple(raw))
            for offset, (score, *raw) in zip(offsets, scores, strict=True)
            if np.isfinite(score)
        ]
        if not predictions:
            return Observed(observations, errors + more, None)
        interpolated = InterpolatedPredictions(part, (here + offsets.numpy())[fine])
        return Observed(observations, errors + more, interpolated, own[fine])

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            "centre": self.centre,
            "directions": self.directions,
            "error": self.error,
        }

    def load_state_dict(self, state: dict[str, Any], coordinates: Coordinates) -> None:
        """Predict round the same centre again: that takes a few passes, and the outputs take up no checkpoint."""
        self.generator.set_state(state["generator"].to(torch.uint8))
        self.error = state["error"]
        if state["centre"] is not None:
            self.centre = state["centre"].to(self.evaluator.phi.read().device)
            _, points = self._points(coordinates, self.centre, state["directions"])
            self._interpolate(self.evaluator.predict_many(points), state["directions"])

    @staticmethod
    def _points(coordinates: Coordinates, phi: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """[2k + 1, k] offsets in the coordinates and [2k + 1, d] points: phi, and both ends of each direction."""
        ends = torch.stack([directions, -directions], 1).flatten(0, 1)
        offsets = torch.cat([torch.zeros(1, coordinates.dim), ends])
        return offsets, torch.stack([phi + coordinates.lift(offset.to(phi.device)) for offset in offsets])

    def _interpolate(self, predictions: Sequence[EvalPrediction], directions: Tensor) -> None:
        centre, *ends = predictions
        pairs = list(zip(ends[::2], ends[1::2], strict=True))
        self.interpolator = Interpolator(centre, pairs, directions.numpy(), self.evaluator.concat)
        self.directions = directions

    def _scores(self, interpolator: Interpolator, z: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The metric at z, [n, k] relative to the centre, and why it failed; the same on every rank.

        [n, 1 + m]: its score, and the numbers of its `keys`; nan where it failed.
        """
        evaluator = self.evaluator
        mine = np.arange(evaluator.rank, len(z), evaluator.world_size)
        taken: list[tuple[int, list[float], str | None]] = []
        start = perf_counter()
        for i, prediction in zip(mine, interpolator.at(z[mine]), strict=True):
            try:
                score = evaluator.metric(prediction, evaluator.complete)
                taken.append((int(i), [score, *values_of(score)], None))
            except MetricError as error:
                taken.append((int(i), [np.nan] * (1 + len(evaluator.metric.keys)), str(error)))
        if evaluator.world_size > 1:
            taken = sorted(gather_object(taken))
        evaluator.ledger.add("observe", len(z), perf_counter() - start)
        return np.array([score for _, score, _ in taken]), [error for *_, error in taken if error is not None]

    def _relative(self, coordinates: Coordinates) -> np.ndarray:
        """[k] where phi is, relative to where it was expanded."""
        phi = self.evaluator.phi.read()
        return (coordinates.encode(phi) - coordinates.encode(self.centre.to(phi.device))).cpu().numpy()
