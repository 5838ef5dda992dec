"""Outputs near phi as a function of the coordinates."""

import numpy as np
import pytest
from transformers import EvalPrediction

from metricopt_hf.evaluation.interpolator import Interpolator, NotInterpolable

ROWS, CLASSES, DIM = 6, 3, 4
RNG = np.random.default_rng(0)
CENTRE, SLOPES = RNG.normal(size=(ROWS, CLASSES)).astype(np.float32), RNG.normal(size=(DIM, ROWS, CLASSES))
DIRECTIONS = np.linalg.qr(RNG.normal(size=(DIM, DIM)))[0]
LABELS = (np.arange(ROWS) % CLASSES, np.arange(ROWS) % 2)


def linear(z, curvature=0.0):
    logits = CENTRE + np.tensordot(z, SLOPES, 1) + curvature * (z**2).sum()
    return EvalPrediction((logits.astype(np.float32), {"ids": np.arange(ROWS)}), LABELS)


def batches(z):
    logits = linear(z).predictions[0]
    return EvalPrediction(
        [(part,) for part in np.split(logits, [2, 3])],
        [[{"row": i} for i in part] for part in ([0, 1], [2], [3, 4, 5])],
    )


def made(outputs=linear, step=0.1, concat=True):
    ends = step * DIRECTIONS
    return Interpolator(outputs(np.zeros(DIM)), [(outputs(end), outputs(-end)) for end in ends], ends, concat)


POINTS = RNG.normal(size=(5, DIM))


def test_of_a_linear_model_it_is_exact():
    for z, prediction in zip(POINTS, made().at(POINTS), strict=True):
        assert np.allclose(prediction.predictions[0], linear(z).predictions[0], atol=1e-4)
        assert prediction.predictions[1]["ids"].tolist() == list(range(ROWS))
        assert prediction.label_ids[1] is LABELS[1]


def test_of_some_rows_it_is_the_same_on_these():
    rows = np.array([1, 4])
    for whole, part in zip(made().at(POINTS), made().take(rows).at(POINTS), strict=True):
        assert np.allclose(whole.predictions[0][rows], part.predictions[0], atol=1e-6)
        assert part.label_ids[0].tolist() == LABELS[0][rows].tolist()


def test_batches_that_are_not_joined():
    interpolator = made(batches, concat=False)
    for z, prediction in zip(POINTS, interpolator.at(POINTS), strict=True):
        joined = np.concatenate([batch[0] for batch in prediction.predictions])
        assert np.allclose(joined, linear(z).predictions[0], atol=1e-4)
    (part,) = interpolator.take(np.array([0, 4])).at(POINTS[:1])
    joined = np.concatenate([batch[0] for batch in part.predictions])
    assert np.allclose(joined, linear(POINTS[0]).predictions[0][[0, 4]], atol=1e-4)
    assert part.label_ids == [[{"row": 0}], [{"row": 4}]]


def test_points_in_chunks_are_the_points(monkeypatch):
    whole = [p.predictions[0] for p in made().at(POINTS)]
    monkeypatch.setattr("metricopt_hf.evaluation.interpolator.CHUNK_BYTES", 1)
    assert all(np.allclose(a, b.predictions[0], atol=1e-5) for a, b in zip(whole, made().at(POINTS), strict=True))


def test_its_error_is_the_share_of_the_movement_that_it_misses():
    z = POINTS[0]
    assert made().error(z, linear(z)) < 1e-5
    curved = linear(z, curvature=0.5)
    off = 0.5 * (z**2).sum() * ROWS * CLASSES / np.abs(curved.predictions[0] - CENTRE).sum()
    assert made().error(z, curved) == pytest.approx(off, rel=1e-4)
    assert made().error(np.zeros(DIM), linear(np.zeros(DIM))) == 0


def test_curvature_cancels_in_the_slopes():
    curved = made(lambda z: linear(z, curvature=3.0))
    (prediction,) = curved.at(POINTS[:1])
    assert np.allclose(prediction.predictions[0], linear(POINTS[0]).predictions[0], atol=1e-3)


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        (lambda z: EvalPrediction(np.arange(ROWS) + int(z.sum() > 0), LABELS[0]), "whole numbers that change"),
        (lambda z: EvalPrediction(np.zeros((ROWS, 2 + int(z.sum() > 0))), LABELS[0]), "shape .* changes"),
        (lambda z: EvalPrediction(np.arange(ROWS), LABELS[0]), "no floating-point"),
    ],
)
def test_what_cannot_be_interpolated_says_why(outputs, why):
    with pytest.raises(NotInterpolable, match=why):
        made(outputs)
