"""The command that writes the cards: a small run, and the records of its rivals."""

import pytest
from huggingface_hub import ModelCard
from made_up import made_up

from benchmarks import cards, records
from benchmarks.bench_report import ROOT
from benchmarks.problem import data_root
from benchmarks.tasks import tasks
from metricopt_hf import ConfigurationError

needs_data = pytest.mark.skipif(not (data_root() / "bank_marketing").is_dir(), reason="needs its data")


@pytest.mark.slow
@needs_data
def test_cards_are_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "tasks", lambda: tasks(smoke=True))
    for method, score in (("loss_only", 0.5), ("metricopt", 0.7)):
        for seed in range(3):
            line = {**made_up(method, seed, {"plain": score, "post-hoc": score}), "task": "money"}
            records.write(line, tmp_path / "records")
    options = ["--tasks", "money", "--results", str(tmp_path / "records"), "--folder", str(tmp_path)]
    assert cards.main(options) == 0
    name, about = cards.CARDS["money"]
    model, learned = (ModelCard.load(tmp_path / f"{name}{end}.md") for end in ("", "-value-function"))
    for card in (model, learned):
        row = next(line for line in card.text.splitlines() if line.startswith("| MetricOpt "))
        assert "0.7000" in row and "+0.2000" in row and f"user/{name}" in card.text
    (result,) = model.data.eval_results
    assert result.dataset_name == about["dataset"]
    assert f"| report split, held out | {result.metric_value:.4f} |" in model.text


@pytest.mark.parametrize("task", cards.CARDS)
def test_the_published_cards_say_what_was_measured(task):
    name, about = cards.CARDS[task]
    model, learned = (ModelCard.load(ROOT / "model_cards" / f"{name}{end}.md") for end in ("", "-value-function"))
    assert model.data.eval_results[0].dataset_name == about["dataset"]
    for card in (model, learned):
        assert "| MetricOpt " in card.text and "Made by `python -m benchmarks.cards`" in card.text


def test_unknown_tasks_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="--tasks bank_f1: there are dominoes, money"):
        cards.main(["--tasks", "bank_f1", "--folder", str(tmp_path)])
