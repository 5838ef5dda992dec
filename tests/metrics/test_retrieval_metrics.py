"""Metrics of embeddings: against scikit-learn and pytorch-metric-learning, by hand, and at the edges."""

import sys

import numpy as np
import pytest
import torch
from metric_names import OF_EMBEDDINGS
from sklearn.neighbors import NearestNeighbors

# ---- recall_at_k


def recall_by_neighbours(embeddings, labels, k):
    """By scikit-learn's neighbours, without ties."""
    neighbours = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(embeddings).kneighbors(embeddings)[1]
    hits = [
        any(labels[j] == labels[i] for j in nearest if j != i)
        for i, nearest in enumerate(neighbours)
        if (labels == labels[i]).sum() > 1
    ]
    return np.mean(hits)


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("chunk", [1, 1000, 2**22])  # similarities at a time: a row, 8 rows, all
def test_recall_at_k_matches_scikit_learn(metrics, rng, monkeypatch, k, chunk):
    labels = np.r_[rng.integers(0, 30, 119), 99]  # the last label is alone
    embeddings = (rng.normal(size=(120, 8)) + rng.normal(size=(100, 8))[labels]).astype(np.float32)
    monkeypatch.setattr(sys.modules[type(metrics["recall_at_k"]).__module__], "_SIMILARITIES", chunk)
    result = metrics["recall_at_k"].compute(predictions=embeddings, references=labels, k=k)
    assert result == {"recall_at_k": pytest.approx(recall_by_neighbours(embeddings, labels, k))}


def test_recall_at_k_by_hand(metrics):
    embeddings = [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 2.0], [-1.0, 0.0]]
    labels = [0, 1, 1, 0, 2]
    # Items 1 and 2 find each other. 3 finds 1 and 2 nearer than 0; 0 finds 3 first. 4 is alone: no query.
    assert metrics["recall_at_k"].compute(predictions=embeddings, references=labels) == {"recall_at_k": 0.75}
    assert metrics["recall_at_k"].compute(predictions=embeddings, references=labels, k=2) == {"recall_at_k": 0.75}
    assert metrics["recall_at_k"].compute(predictions=embeddings, references=labels, k=3) == {"recall_at_k": 1.0}


# ---- map_at_r


@pytest.mark.parametrize("chunk", [1, 1000, 2**22])
def test_map_at_r_matches_pytorch_metric_learning(metrics, rng, monkeypatch, chunk):
    accuracy_calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    labels = np.r_[rng.integers(0, 12, 119), 99]  # the last label is alone
    embeddings = (rng.normal(size=(120, 8)) + rng.normal(size=(100, 8))[labels]).astype(np.float32)
    calculator = accuracy_calculator.AccuracyCalculator(
        include=("mean_average_precision_at_r",),
        knn_func=inference.CustomKNN(distances.CosineSimilarity()),
        k="max_bin_count",
    )
    expected = calculator.get_accuracy(torch.as_tensor(embeddings), torch.as_tensor(labels))
    monkeypatch.setattr(sys.modules[type(metrics["map_at_r"]).__module__], "_SIMILARITIES", chunk)
    result = metrics["map_at_r"].compute(predictions=embeddings, references=labels)
    assert result == {"map_at_r": pytest.approx(expected["mean_average_precision_at_r"])}


def test_map_at_r_by_hand(metrics):
    # On a circle, by angle: 0, 10, 30, 60, 100 degrees; of label 0 are the first, third and fourth.
    angles = np.radians([0, 10, 30, 60, 100])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = [0, 1, 0, 0, 2]
    # 0 sees 1, 0: (1/2)/2. 30 sees 1, then 0 and 60 as near as can be told apart. 60 sees 30 (30), 100 (40): 1/2.
    queries = [(1 / 2) / 2, (1 / 2) / 2, 1 / 2]
    result = metrics["map_at_r"].compute(predictions=points, references=labels)
    assert result == {"map_at_r": pytest.approx(np.mean(queries))}


# ---- both


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_a_collapsed_embedding_scores_0(metrics, name):
    ones = np.ones((6, 4))
    assert metrics[name].compute(predictions=ones, references=[0, 0, 1, 1, 2, 2]) == {name: 0}
    # A single label is found all the same.
    assert metrics[name].compute(predictions=ones, references=[0] * 6) == {name: 1.0}


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
@pytest.mark.parametrize(
    "embeddings, labels, message",
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0, 1], "no two of the 2 items"),
        ([[1.0, 0.0], [0.0, 0.0]], [0, 0], "item 1 has length 0.0"),
        ([[1.0, 0.0], [0.0, float("nan")]], [0, 0], "item 1 has length nan"),
        ([[1.0, None], [0.0, 1.0]], [0, 0], "item 0 has length nan"),
        ([[1.0, 0.0], [float("inf"), 0.0]], [0, 0], "item 1 has length inf"),
        ([[1.0, 0.0], [1.0]], [0, 0], r"widths \[1, 2\]"),
        ([[1.0, 0.0], [0.0, 1.0]], [0, None], "references hold missing"),
    ],
)
def test_retrieval_metrics_refuse(metrics, name, embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics[name].compute(predictions=embeddings, references=labels)


@pytest.mark.parametrize("k, message", [(3, "k=3, but it must be an integer from 1 to 2"), (0, "k=0"), (1.5, "k=1.5")])
def test_recall_at_k_refuses_a_k_out_of_range(metrics, k, message):
    with pytest.raises(ValueError, match=message):
        metrics["recall_at_k"].compute(predictions=[[1.0], [1.0], [1.0]], references=[0, 0, 0], k=k)
