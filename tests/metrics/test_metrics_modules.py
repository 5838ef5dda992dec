"""The shipped `evaluate` modules: against scikit-learn, by hand, and at the edges."""

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, recall_score, zero_one_loss
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import label_binarize
from transformers import EvalPrediction

from metricopt_hf import MetricError
from metricopt_hf.evaluation.metric import resolve
from metricopt_hf.metrics import greater_is_better, path

PER_CLASS, OF_GROUPS = ["g_mean", "worst_class_recall"], ["equalized_odds_gap", "worst_group_accuracy"]
NAMES = sorted([*PER_CLASS, *OF_GROUPS, "macro_auprc", "map_at_r", "misclassification", "recall_at_k"])


def forget_loaded_modules():
    """`evaluate` imports its copies of scripts from a package that stays bound to the first cache it was used with."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """Every module by name, loaded from its path. The caches are this run's own, so that parallel runs are apart."""
    cache = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache / "modules")
        patch.setattr(sys, "path", [*sys.path])
        forget_loaded_modules()
        # In memory: a file's lock outlives an error in `_compute`, and the next call would wait a second for it.
        yield {name: evaluate.load(path(name), cache_dir=str(cache), keep_in_memory=True) for name in NAMES}
        forget_loaded_modules()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- all modules


def test_examples_run_in_a_fresh_process_without_the_hub(tmp_path):
    script = f"""
import doctest, evaluate
from metricopt_hf.metrics import path
for name in {NAMES}:
    examples = doctest.DocTestParser().get_doctest(evaluate.load(path(name)).inputs_description, {{}}, name, name, 0)
    failed, attempted = doctest.DocTestRunner().run(examples)
    assert attempted > 2 and not failed, name
"""
    # An endpoint where nothing listens: whoever asks the Hub anyway fails.
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | offline,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_path_lists_what_exists():
    assert Path(path("g_mean"), "g_mean.py").is_file()
    with pytest.raises(ValueError, match="'f1'; there are " + ", ".join(NAMES)):
        path("f1")


@pytest.mark.parametrize("name", NAMES)
def test_scripts_tell_what_they_are(metrics, name):
    info = metrics[name].info
    assert info.module_name == name
    assert info.description and info.citation and f"    {name} (`float`)" in info.inputs_description


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_memory", [False, True])
def test_no_examples_is_an_error(metrics, tmp_path, name, in_memory):
    metric = type(metrics[name])(cache_dir=str(tmp_path), keep_in_memory=in_memory)
    inputs = "prediction_scores" if name == "macro_auprc" else "predictions"
    more = {"groups": []} if name in OF_GROUPS else {}
    with pytest.raises(ValueError, match="got no "):
        metric.compute(**{inputs: [], "references": [], **more})


@pytest.mark.parametrize("name", NAMES)
def test_importable_as_a_class(metrics, tmp_path, name):
    module = __import__(f"metricopt_hf.metrics.{name}.{name}", fromlist=["*"])
    metric = getattr(module, type(metrics[name]).__name__)(cache_dir=str(tmp_path))
    if name in (*PER_CLASS, *OF_GROUPS, "misclassification"):
        best = 1.0 if greater_is_better(name) else 0.0
        more = {"groups": [0, 0, 1, 1]} if name in OF_GROUPS else {}
        assert metric.compute(predictions=[0, 1, 0, 1], references=[0, 1, 0, 1], **more) == {name: best}
    else:
        first = "prediction_scores" if name == "macro_auprc" else "predictions"
        rows = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]
        assert metric.compute(**{first: rows, "references": [0, 0, 1, 1]}) == {name: 1.0}


# ---- worst_class_recall and g_mean


@pytest.mark.parametrize("classes, examples", [(2, 30), (7, 400), (40, 200)])
def test_per_class_recall_matches_scikit_learn(metrics, rng, classes, examples):
    references = rng.integers(0, classes, examples)
    predictions = np.where(rng.random(examples) < 0.7, references, rng.integers(0, classes, examples))
    recalls = recall_score(references, predictions, labels=np.unique(references), average=None)
    worst = metrics["worst_class_recall"].compute(predictions=predictions, references=references)
    g_mean = metrics["g_mean"].compute(predictions=predictions, references=references)
    assert worst == {"worst_class_recall": pytest.approx(recalls.min())}
    assert g_mean == {"g_mean": pytest.approx(recalls.prod() ** (1 / len(recalls)))}


def test_per_class_recall_by_hand(metrics):
    # Recalls: class 0 3/4, class 1 1/2, class 2 1.
    batch = {"predictions": [0, 0, 0, 1, 1, 2, 2], "references": [0, 0, 0, 0, 1, 1, 2]}
    assert metrics["worst_class_recall"].compute(**batch) == {"worst_class_recall": 0.5}
    assert metrics["g_mean"].compute(**batch)["g_mean"] == pytest.approx(0.375 ** (1 / 3))


@pytest.mark.parametrize("name", PER_CLASS)
@pytest.mark.parametrize(
    "predictions, references, value",
    [
        ([0, 3, 3], [0, 3, 3], 1.0),  # classes 1 and 2 are absent
        ([0, 1], [0, 0], 0.5),  # class 1 is predicted but absent: a miss, not a class
        ([5], [5], 1.0),  # a single class, a single example
        ([0, 0, 0], [0, 0, 1], 0.0),  # one class missed altogether
    ],
)
def test_per_class_recall_at_the_edges(metrics, name, predictions, references, value):
    assert metrics[name].compute(predictions=predictions, references=references) == {name: pytest.approx(value)}


def test_g_mean_of_many_classes_does_not_underflow(metrics):
    references = np.repeat(np.arange(2000), 10)
    predictions = np.where(np.arange(20000) % 10 == 0, references, references + 1)  # recall 0.1, 2000 times
    g_mean = metrics["g_mean"].compute(predictions=predictions, references=references)
    assert g_mean == {"g_mean": pytest.approx(0.1)}


@pytest.mark.parametrize("name", PER_CLASS)
@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([0, 1], [0, -100], "references hold the label -100"),
        ([0, -100], [0, 1], "predictions hold the label -100"),
        ([0, None], [0, 1], "predictions hold missing"),
        ([0, 1], [None, 1], "references hold missing"),
        ([float("nan"), 1], [0, 1], "NaN"),
        ([0, 1, 1], [0, 1], "Mismatch"),
    ],
)
def test_per_class_recall_refuses(metrics, name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metrics[name].compute(predictions=predictions, references=references)
    assert metrics[name].compute(predictions=[0, 1], references=[0, 1]) == {name: 1.0}  # still usable


def test_batches_add_up(metrics):
    metrics["g_mean"].add_batch(predictions=[0, 0], references=[0, 1])
    metrics["g_mean"].add_batch(predictions=[1], references=[1])
    assert metrics["g_mean"].compute() == {"g_mean": pytest.approx(0.5**0.5)}


# ---- macro_auprc


@pytest.mark.parametrize("classes, examples", [(3, 50), (10, 500)])
@pytest.mark.parametrize("decimals", [1, 12])  # one decimal: many ties
def test_macro_auprc_matches_scikit_learn(metrics, rng, classes, examples, decimals):
    references = np.r_[np.arange(classes), rng.integers(0, classes, examples - classes)]
    scores = (rng.normal(size=(examples, classes)) + 1.5 * np.eye(classes)[references]).round(decimals)
    expected = average_precision_score(label_binarize(references, classes=range(classes)), scores, average="macro")
    result = metrics["macro_auprc"].compute(prediction_scores=scores, references=references)
    assert result == {"macro_auprc": pytest.approx(expected)}


def test_macro_auprc_of_binary_scores_is_that_of_class_1(metrics, rng):
    references = rng.integers(0, 2, 200)
    scores = rng.normal(size=200) + references
    one = metrics["macro_auprc"].compute(prediction_scores=scores, references=references)
    both = metrics["macro_auprc"].compute(prediction_scores=np.c_[-scores, scores], references=references)
    of_1, of_0 = average_precision_score(references, scores), average_precision_score(1 - references, -scores)
    assert one == {"macro_auprc": pytest.approx(of_1)}
    assert both == {"macro_auprc": pytest.approx((of_0 + of_1) / 2)}


def test_macro_auprc_by_hand(metrics):
    # In order of score: hit, miss, hit. Precision 1 at recall 1/2, then 2/3 at recall 1.
    result = metrics["macro_auprc"].compute(prediction_scores=[0.9, 0.5, 0.1], references=[1, 0, 1])
    assert result == {"macro_auprc": pytest.approx((1 + 2 / 3) / 2)}


def test_macro_auprc_leaves_absent_classes_out(metrics):
    scores = np.array([[0.9, 0.0, 0.3], [0.8, 0.0, 0.9], [0.7, 1.0, 0.2]])
    result = metrics["macro_auprc"].compute(prediction_scores=scores, references=[0, 2, 0])
    assert result == {"macro_auprc": pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)}


def test_macro_auprc_of_a_single_class_is_1(metrics):
    result = metrics["macro_auprc"].compute(prediction_scores=[[0.1, 0.9], [0.7, 0.3]], references=[0, 0])
    assert result == {"macro_auprc": 1.0}


@pytest.mark.parametrize(
    "scores, references, message",
    [
        ([0.1, 0.2], [0, 0], "no reference is of class 1"),
        ([0.1, 0.2], [0, 2], "run from 0 to 2"),
        ([[0.1, 0.2], [0.1, 0.2]], [0, -100], "run from -100 to 0"),
        ([[0.1, 0.2], [0.1, 0.2]], [0, None], "references hold missing"),
        ([[0.1, 0.2], [0.1, float("nan")]], [0, 1], r"scores of example 1 are \[0\.1 nan\]"),
        ([0.1, float("inf")], [0, 1], "scores of example 1 are inf"),
        ([[0.1, 0.2], [0.1, None]], [0, 1], "scores of example 1"),
        ([[0.1, 0.2], [0.1]], [0, 1], r"have \[1, 2\] scores"),
        ([[0.1], [0.2]], [0, 0], "row of 1 scores"),
    ],
)
def test_macro_auprc_refuses(metrics, scores, references, message):
    with pytest.raises(ValueError, match=message):
        metrics["macro_auprc"].compute(prediction_scores=scores, references=references)


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


def test_recall_at_k_of_a_collapsed_embedding_is_0(metrics):
    ones = np.ones((6, 4))
    assert metrics["recall_at_k"].compute(predictions=ones, references=[0, 0, 1, 1, 2, 2], k=3) == {"recall_at_k": 0}
    # A single label is found all the same.
    assert metrics["recall_at_k"].compute(predictions=ones, references=[0] * 6) == {"recall_at_k": 1.0}


@pytest.mark.parametrize(
    "embeddings, labels, k, message",
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0, 1], 1, "no two of the 2 items"),
        ([[1.0, 0.0], [0.0, 1.0]], [0, 0], 2, "k=2, but it must be an integer from 1 to 1"),
        ([[1.0, 0.0], [0.0, 1.0]], [0, 0], 0, "k=0"),
        ([[1.0], [1.0], [1.0]], [0, 0, 0], 1.5, "k=1.5"),
        ([[1.0, 0.0], [0.0, 0.0]], [0, 0], 1, "item 1 has length 0.0"),
        ([[1.0, 0.0], [0.0, float("nan")]], [0, 0], 1, "item 1 has length nan"),
        ([[1.0, None], [0.0, 1.0]], [0, 0], 1, "item 0 has length nan"),
        ([[1.0, 0.0], [float("inf"), 0.0]], [0, 0], 1, "item 1 has length inf"),
        ([[1.0, 0.0], [1.0]], [0, 0], 1, r"widths \[1, 2\]"),
        ([[1.0, 0.0], [0.0, 1.0]], [0, None], 1, "references hold missing"),
    ],
)
def test_recall_at_k_refuses(metrics, embeddings, labels, k, message):
    with pytest.raises(ValueError, match=message):
        metrics["recall_at_k"].compute(predictions=embeddings, references=labels, k=k)


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


def test_map_at_r_of_a_collapsed_embedding_is_0(metrics):
    ones = np.ones((6, 4))
    assert metrics["map_at_r"].compute(predictions=ones, references=[0, 0, 1, 1, 2, 2]) == {"map_at_r": 0}
    assert metrics["map_at_r"].compute(predictions=ones, references=[0] * 6) == {"map_at_r": 1.0}


@pytest.mark.parametrize(
    "embeddings, labels, message",
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0, 1], "no two of the 2 items"),
        ([[1.0, 0.0], [0.0, 0.0]], [0, 0], "item 1 has length 0.0"),
        ([[1.0, 0.0], [0.0, float("nan")]], [0, 0], "item 1 has length nan"),
        ([[1.0, 0.0], [1.0]], [0, 0], r"widths \[1, 2\]"),
        ([[1.0, 0.0], [0.0, 1.0]], [0, None], "references hold missing"),
    ],
)
def test_map_at_r_refuses(metrics, embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics["map_at_r"].compute(predictions=embeddings, references=labels)


# ---- misclassification


def test_misclassification(metrics, rng):
    references, predictions = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    result = metrics["misclassification"].compute(predictions=predictions, references=references)
    assert result == {"misclassification": pytest.approx(zero_one_loss(references, predictions))}
    with pytest.raises(ValueError, match="references hold missing"):
        metrics["misclassification"].compute(predictions=[0, 1], references=[None, 1])


@pytest.mark.parametrize("name", NAMES)
def test_a_script_says_which_way_is_better(metrics, name):
    description = " ".join(metrics[name].description.split())
    assert ("Higher is better" in description, "Lower is better" in description) == (
        greater_is_better(name),
        not greater_is_better(name),
    )


# ---- worst_group_accuracy and equalized_odds_gap


def grouped(rng, classes, groups, examples=300):
    references, of = rng.integers(0, classes, examples), rng.integers(0, groups, examples)
    right = rng.random(examples) < 0.9 - 0.15 * of  # some groups fare worse
    predictions = np.where(right, references, rng.integers(0, classes, examples))
    return {"predictions": predictions, "references": references, "groups": of}


@pytest.mark.parametrize("classes, groups", [(2, 2), (2, 4), (5, 3)])
def test_worst_group_accuracy_matches_fairlearn(metrics, rng, classes, groups):
    frames = pytest.importorskip("fairlearn.metrics")
    batch = grouped(rng, classes, groups)
    columns = [batch["groups"], np.c_[batch["groups"], batch["references"]]]
    for by_label, features in zip([False, True], columns, strict=True):
        frame = frames.MetricFrame(
            metrics=accuracy_score,
            y_true=batch["references"],
            y_pred=batch["predictions"],
            sensitive_features=features,
        )
        result = metrics["worst_group_accuracy"].compute(**batch, by_label=by_label)
        assert result == {"worst_group_accuracy": pytest.approx(frame.group_min())}


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_equalized_odds_gap_matches_fairlearn(metrics, rng, groups):
    fairlearn_metrics = pytest.importorskip("fairlearn.metrics")
    batch = grouped(rng, 2, groups)
    expected = fairlearn_metrics.equalized_odds_difference(
        batch["references"], batch["predictions"], sensitive_features=batch["groups"]
    )
    assert expected > 0.05
    assert metrics["equalized_odds_gap"].compute(**batch) == {"equalized_odds_gap": pytest.approx(expected)}


def test_group_metrics_by_hand(metrics):
    # Group 0: right, right, wrong. Group -7 (any integer will do): wrong, right.
    batch = {"predictions": [0, 2, 1, 2, 1], "references": [0, 2, 2, 0, 1], "groups": [0, 0, 0, -7, -7]}
    assert metrics["worst_group_accuracy"].compute(**batch) == {"worst_group_accuracy": 0.5}
    assert metrics["worst_group_accuracy"].compute(**batch, by_label=True) == {"worst_group_accuracy": 0.0}
    # Of class 0 both groups have an example: predicted 0 always in one, never in the other. Classes 1 and 2: one group.
    assert metrics["equalized_odds_gap"].compute(**batch) == {"equalized_odds_gap": 1.0}


@pytest.mark.parametrize("name", OF_GROUPS)
def test_group_metrics_refuse(metrics, name):
    with pytest.raises(ValueError, match="groups hold missing"):
        metrics[name].compute(predictions=[0, 1], references=[0, 1], groups=[0, None])
    with pytest.raises(ValueError, match="groups"):
        metrics[name].compute(predictions=[0, 1], references=[0, 1])


def test_equalized_odds_gap_needs_something_to_compare(metrics):
    with pytest.raises(ValueError, match="no true class has examples in two groups"):
        metrics["equalized_odds_gap"].compute(predictions=[0, 1], references=[0, 1], groups=[0, 1])


@pytest.mark.parametrize("name", OF_GROUPS)
def test_group_metrics_read_the_second_label_column(rng, name):
    batch = grouped(rng, 3, 2)
    logits = np.eye(3)[batch["predictions"]]
    metric = resolve(name, greater_is_better(name))
    value = metric(EvalPrediction(logits, (batch["references"], batch["groups"])))
    assert value == pytest.approx(evaluate.load(path(name)).compute(**batch)[name])
    with pytest.raises(MetricError, match=r"got 1 label column\(s\): say label_names=\["):
        metric(EvalPrediction(logits, batch["references"]))
    # a metric without groups looks at the first column
    accuracy = 1 - resolve("misclassification", False)(EvalPrediction(logits, (batch["references"], batch["groups"])))
    assert accuracy == pytest.approx((batch["predictions"] == batch["references"]).mean())
