"""All shipped `evaluate` modules: what they tell of themselves, and how they are loaded."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from metric_names import NAMES, OF_EMBEDDINGS, OF_GROUPS, PER_CLASS

from metricopt_hf.metrics import greater_is_better, path


@pytest.mark.slow
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


@pytest.mark.parametrize("name", NAMES)
def test_a_script_says_which_way_is_better(metrics, name):
    description = " ".join(metrics[name].description.split())
    assert ("Higher is better" in description, "Lower is better" in description) == (
        greater_is_better(name),
        not greater_is_better(name),
    )


@pytest.mark.parametrize("same", [PER_CLASS, [*OF_GROUPS, "misclassification"], OF_EMBEDDINGS])
def test_scripts_check_their_inputs_by_the_same_function(same):
    """`evaluate` loads each script by itself, so the function is copied, and a change of one copy is one of all."""
    copies = set()
    for name in same:
        tree = ast.parse(Path(path(name), f"{name}.py").read_text())
        (check,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
        copies.add(ast.unparse(check))
    assert len(copies) == 1
