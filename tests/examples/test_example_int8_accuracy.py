"""The example on a metric behind an export: int8 weights in ONNX Runtime."""

import re

import numpy as np
import pytest
import torch
from helpers import Texts, example, tiny_bert

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")


def test_the_export_computes_about_what_the_model_does():
    ids = Texts(20, seed=5).ids
    model = tiny_bert().eval().requires_grad_(False)
    made = example("int8_accuracy").int8_predictions(model, {"input_ids": ids.numpy()})
    expected = model(input_ids=ids).logits.numpy()
    assert made.shape == expected.shape and not np.array_equal(made, expected)
    np.testing.assert_allclose(made, expected, atol=0.05)


def test_a_run_observes_selects_and_reports_the_accuracy_of_the_export(tmp_path, capsys):
    int8 = example("int8_accuracy")
    steps = ["--max_steps", "2", "--metric_steps", "2", "--metric_call_budget", "8"]
    scores = int8.main(["--output_dir", str(tmp_path), "--disable_tqdm", "True", *steps])
    assert re.search(r"[1-9]\d* calls to observe, [1-9]\d* to select", capsys.readouterr().out)
    assert all(0.1 < score <= 1 for score in scores.values())
    with torch.no_grad():
        rows = int8.Digits(np.arange(50))
        assert 0 <= int8.int8_accuracy(int8.MLP(), rows) <= 1
