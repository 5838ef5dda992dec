"""The script for generated texts, with a tiny T5."""

import json
import sys

import pytest
from helpers import ROOT, example, save_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

sys.path.insert(0, str(ROOT / "tests" / "docs"))

import given

pytest.importorskip("tabulate")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script():
    return example("translation_chrf")


def test_a_run_leaves_a_table_and_an_ordinary_model(script, tmp_path, capsys):
    texts = [row["text"] for row in given.reviews(60, 0)]
    translation = [{"en": text, "fr": " ".join(text.split()[:3])} for text in texts]
    splits = {"train": {"translation": translation[:30]}, "test": {"translation": translation}}
    data = save_dataset(tmp_path / "data", splits)
    model = given.hub(tmp_path / "hub")["google-t5/t5-small"]
    options = (
        "--max_steps 4 --metric_call_budget 4 --observation_size 12 --max_report_samples 8 --generation_max_length 8 "
        "--methods loss_only metricopt --seeds 0 --use_cpu --disable_tqdm True"
    )
    where = f"--dataset_name {data} --model_name_or_path {model} --output_dir {tmp_path / 'out'}"
    runs = script.main(f"{options} {where}".split())
    assert [run.method for run in runs] == ["loss only", "MetricOpt"]
    assert "observe" in runs[1].calls and 0 < runs[1].calls["observe"] <= 4
    table = capsys.readouterr().out
    assert "MetricOpt" in table and "report - loss only" in table
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["metric"] == "chrf" and len(document["runs"]) == 2

    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("good value", return_tensors="pt").input_ids
    assert saved.generate(ids, max_length=4).shape[1] <= 4


def test_chrf_by_hand(script):
    # orders 1 and 2: "ab" against "abc" shares 2 of 2 and 3, then 1 of 1 and 2; order 3: nothing is written
    scores = [5 * 2 / (4 * 3 + 2), 5 * 1 / (4 * 2 + 1)]
    assert script.chrf(["ab"], ["abc"]) == pytest.approx(100 * sum(scores) / 2)
    assert script.chrf(["ab c"], ["a bc"]) == 100.0 and script.chrf([""], ["abc"]) == 0.0


def test_without_data_it_says_what_to_name(script, capsys):
    with pytest.raises(SystemExit):
        script.main([])
    assert "--dataset_name" in capsys.readouterr().err
