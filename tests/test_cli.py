"""The command `metricopt`, as a process: on files, without a model; on a CSV and on images; on value functions."""

import csv
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

sys.path.insert(0, str(ROOT / "tests" / "docs"))

import given

pytestmark = pytest.mark.slow

METRIC = """
import numpy as np

def worst_region(prediction):
    labels, region = prediction.label_ids
    right = prediction.predictions.argmax(-1) == labels
    return min(right[region == r].mean() for r in np.unique(region))

def f1(prediction):
    said, true = prediction.predictions.argmax(-1), prediction.label_ids
    return {"f1": 2 * (said * true).sum() / max(1, (said + true).sum())}
"""
SMALL = "--output_dir out --max_steps 4 --metric_steps 2 --metric_call_budget 120 --phi_dim 2 --use_cpu"


def metricopt(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "metricopt_hf.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_metric.py").write_text(METRIC)
    return tmp_path


def save(path, shift, count=600):
    """Logits of a classifier that orders well and decides `shift` too high."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, count)
    logits = np.stack([np.zeros(count), 2.0 * (2 * labels - 1) + generator.normal(size=count) - shift], 1)
    np.savez(path, logits=logits.astype("float32"), labels=labels)


@pytest.mark.parametrize("shift, said", [(3.0, "a threshold suffices"), (0.0, "A bias does not pay")])
def test_predictions_in_a_file_say_whether_a_bias_pays(folder, shift, said):
    save(folder / "preds.npz", shift)
    done = metricopt(folder, "diagnose", "--predictions", "preds.npz", "--metric", "my_metric.py:f1")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "600 examples" in done.stdout and "a bias per logit" in done.stdout
    assert Image.open(folder / "diagnosis.png").size[0] > 500


def test_an_error_is_a_sentence_and_an_exit_status(folder):
    np.savez(folder / "preds.npz", labels=np.zeros(4))
    done = metricopt(folder, "diagnose", "--predictions", "preds.npz", "--metric", "my_metric.py:f1")
    assert done.returncode == 1 and "no file with an array called logits" in done.stderr
    assert "Traceback" not in done.stderr
    save(folder / "preds.npz", 0.0)
    done = metricopt(folder, "diagnose", "--predictions", "preds.npz", "--metric", "my_metric.py:recall")
    assert done.returncode == 1 and "no function 'recall'" in done.stderr


def test_a_csv_with_a_column_of_groups_becomes_a_model(folder):
    rows = given.reviews(160, 0)
    with open(folder / "reviews.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label", "region"])
        writer.writeheader()
        writer.writerows({**row, "region": "north south east".split()[row["region"]]} for row in rows)
    for part in (given.classifier(), given.tokenizer()):
        part.save_pretrained(folder / "start")
    words = "--data reviews.csv --model_name_or_path start --metric my_metric.py:worst_region --metric_columns region"
    done = metricopt(folder, "run", *words.split(), "--greater_is_better", "True", *SMALL.split())
    assert done.returncode == 0, done.stderr
    assert re.search(r"worst_region on 32 rows that nothing has touched: 0\.\d+", done.stdout)
    AutoModelForSequenceClassification.from_pretrained(folder / "out")
    shown = metricopt(folder, "value-function", "show", "out")
    assert "metric: worst_region (greater is better)" in shown.stdout, shown.stderr


def test_a_folder_of_images_with_metadata_becomes_a_model(folder):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    with open(folder / "images" / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "camera"])
        for i in range(80):
            pixels = generator.integers(0, 128, (16, 16, 3)) + 127 * (i % 2)
            Image.fromarray(pixels.astype("uint8")).save(folder / "images" / f"{i}.png")
            writer.writerow([f"{i}.png", ["dark", "bright"][i % 2], i % 3])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder / "start")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "start")
    words = "--data images --model_name_or_path start --metric worst_group_accuracy --metric_columns camera"
    done = metricopt(folder, "run", *words.split(), *SMALL.split())
    assert done.returncode == 0, done.stderr
    assert re.search(r"worst_group_accuracy on 16 rows that nothing has touched: [01]\.\d+", done.stdout)
    assert AutoModelForImageClassification.from_pretrained(folder / "out").config.id2label == {0: "bright", 1: "dark"}


@pytest.mark.parametrize("name", ["diagnose", "run", "value-function show", "value-function push"])
def test_help_of_a_command_lists_its_options(tmp_path, name):
    done = metricopt(tmp_path, *name.split(), "--help")
    assert done.returncode == 0 and f"usage: metricopt {name}" in done.stdout
    expected = {"diagnose": "--predictions", "run": "--metric_steps", "value-function push": "repo_id"}
    assert expected.get(name, "name_or_path") in done.stdout


def test_an_unknown_command_shows_the_known_ones(tmp_path):
    done = metricopt(tmp_path, "train")
    assert done.returncode == 2 and "metricopt diagnose" in done.stdout
