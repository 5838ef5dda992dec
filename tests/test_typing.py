"""The package is clean by mypy, and a script that uses it knows the types of what it gets."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

pytest.importorskip("mypy")
SCRIPT = """
import numpy as np
from transformers import AutoModelForSequenceClassification, EvalPrediction

from metricopt_hf import Metric, MetricOptConfig, MetricOptTrainer
from metricopt_hf.posthoc import add_bias, tune_bias


def worst_group(prediction: EvalPrediction) -> float:
    labels, group = prediction.label_ids
    right = prediction.predictions.argmax(-1) == labels
    return float(min(right[group == g].mean() for g in np.unique(group)))


model = AutoModelForSequenceClassification.from_pretrained("model")
args = MetricOptConfig("out", max_steps=10, metric_steps=10, label_names=["labels", "group"], greater_is_better=True)
trainer = MetricOptTrainer(model, args, metric=Metric(worst_group, "worst_group"))
reveal_type(trainer.diagnose())
trainer.train()
trainer.save_model()
print(trainer.evaluate())
assert trainer.result is not None  # it was guided
reveal_type(trainer.result)
reveal_type(trainer.result.best_score)
reveal_type(trainer.ledger)
reveal_type(tune_bias(Metric(worst_group, "worst_group"), trainer.predict([])))
"""


def mypy(*words):
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_package_is_clean(tmp_path):
    done = mypy("--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout


def test_a_script_knows_what_it_gets(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = mypy("--cache-dir", str(tmp_path / "cache"), "--strict", str(tmp_path / "script.py"))
    revealed = re.findall(r'Revealed type is "([^"]+)"', done.stdout)
    assert [re.split(r"[\[ ]", name)[0].rsplit(".")[-1] for name in revealed] == [
        "Diagnosis", "RunResult", "float", "Ledger", "ndarray",
    ], done.stdout
    assert not re.search(r"script\.py:\d+: error", done.stdout), done.stdout
