"""Cards: filled with what was measured, in the Hub's form, and all that Trainer's own card tells is still told."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import Texts, tiny_bert, true_class_probability
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from runs import quadratic_trainer
from transformers import Trainer

from metricopt_hf import MetricOptConfig, MetricOptTrainer, __version__
from metricopt_hf.hub import cards
from metricopt_hf.phase.selection import MEAN

ROOT = Path(__file__).resolve().parents[2]

GIVEN = {
    "language": "en",
    "license": "apache-2.0",
    "tags": "mine",
    "model_name": "a-name",
    "finetuned_from": "someone/bert",
    "tasks": "text-classification",
    "dataset_tags": "tester/texts",
    "dataset": "Texts",
    "dataset_args": "small",
}


def trainer(folder, model=None, cls=MetricOptTrainer, **kwargs):
    args = {"max_steps": 4, "metric_steps": 4, "metric_call_budget": 300, "phi_dim": 6, "greater_is_better": True}
    args |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "eval_strategy": "steps", "eval_steps": 2}
    args |= {"save_strategy": "no", "per_device_train_batch_size": 8}
    guided = {"observation_dataset": Texts(40, seed=3), "selection_dataset": Texts(40, seed=4)}
    guided["metric"] = true_class_probability

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return cls(
        tiny_bert() if model is None else model,
        MetricOptConfig(str(folder), **{**args, **kwargs}),
        train_dataset=Texts(40, seed=1),
        eval_dataset=Texts(16, seed=2),
        compute_metrics=accuracy,
        **(guided if cls is MetricOptTrainer else {}),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("run"))
    made.train()
    return made


def text(run, *path):
    return Path(run.args.output_dir, *path, "README.md").read_text()


def test_what_trainer_s_card_tells_is_still_told(run, tmp_path):
    run.create_model_card(**GIVEN)
    made = ModelCard.load(Path(run.args.output_dir) / "README.md")
    plain = trainer(tmp_path, cls=Trainer)
    plain.train()
    plain.create_model_card(**GIVEN)
    expected = ModelCard.load(tmp_path / "README.md").data.to_dict()
    (theirs,), told = expected.pop("model-index"), made.data.to_dict()
    (ours,) = told.pop("model-index")
    for index in (theirs, ours):  # two runs: other figures of the same form
        for metric in index["results"][0]["metrics"]:
            assert metric.pop("value") is not None
    assert ours == theirs and ours["results"][0]["metrics"] == [{"type": "accuracy", "name": "Accuracy"}]
    assert told["tags"] == [*expected.pop("tags"), cards.TAG]
    assert told["metrics"] == [*expected.pop("metrics"), "true_class_probability"]
    assert {name: told[name] for name in expected} == expected
    assert "someone/bert" in made.text and "Texts" in made.text and "learning_rate" in made.text


def test_given_by_position_they_are_the_same(run):
    run.create_model_card(**GIVEN)
    first = text(run)
    names = ["language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset"]
    run.create_model_card(*(GIVEN[name] for name in names), dataset_args="small")
    assert text(run) == first


def test_figures_are_those_of_the_run(run):
    run.create_model_card(**GIVEN, scores={"report": 0.4321}, comparison="| loss only | 0.4 |")
    told = "**true_class_probability** (greater is better) in text-classification on Texts"
    assert told in text(run) and "| task | text-classification, Texts |" in text(run, "value_function")
    made = ModelCard.load(Path(run.args.output_dir) / "README.md")
    (result,) = [r for r in made.data.eval_results if r.metric_type == "true_class_probability"]
    assert (result.metric_value, result.dataset_type, result.task_type) == (
        0.4321,
        "tester/texts",
        "text-classification",
    )
    index = eval_results_to_model_index(made.data.model_name, made.data.eval_results)
    assert model_index_to_eval_results(index) == (made.data.model_name, made.data.eval_results)
    for figure in (
        "report split, held out | 0.4321",
        "| loss only | 0.4 |",
        f"(optimistic: chosen by it) | {run.result.best_score:.4f}",
        f"| metric calls, observe | {run.ledger.calls['observe']} in",
        f"| why that was chosen | {cards.plain(run.result.why)} |",
        "whose calls on linearised predictions said which way" if run.result.chosen.kind == MEAN else "were not kept",
        f"transformers {transformers.__version__}, torch {torch.__version__}, metricopt_hf {__version__}",
        f"FiLM, {run.result.coordinates.origin.numel()} numbers",
    ):
        assert figure in made.text
    theirs = text(run, "value_function")
    for card in (made.text, theirs):
        assert "## Limits" in card and "bibtex" in card
        for left in ("{{", "{%", "None", "nan"):
            assert left not in card
    for figure in (
        "| metric | true_class_probability (greater is better) |",
        f"| coordinates | {run.result.coordinates.dim}, ",
        "to all that it observed: metric calls on its linearised predictions",
        f"| observations, a metric call each | {len(run.result.trajectory)} |",
    ):
        assert figure in theirs
    assert json.loads(Path(run.args.output_dir, "value_function", "config.json").read_text())["signature"]


def test_without_task_and_data_set_there_is_no_index(run):
    (Path(run.args.output_dir) / "README.md").unlink()
    run.create_model_card(scores={"report": 0.4321}, finetuned_from="someone/bert")
    made = ModelCard.load(Path(run.args.output_dir) / "README.md")
    assert "0.4321" in made.text and not made.data.eval_results


def test_a_model_that_is_not_of_transformers_has_a_card_too(tmp_path):
    run = quadratic_trainer(tmp_path)
    run.train()
    run.create_model_card()
    assert "library_name: pytorch" in text(run) and "Quadratic(...)" in text(run) and "base_model" not in text(run)


def test_an_adapter_s_card_stays_peft_s(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    run = trainer(tmp_path, peft.get_peft_model(tiny_bert(), config), phi="adapter", eval_strategy="no")
    run.train()
    run.save_model()
    run.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"
    assert "PeftModel.from_pretrained" in text(run) and "value_function = ValueFunction" in text(run)


def test_of_observed_scores_the_cards_say_so(tmp_path):
    run = trainer(tmp_path, observe="scores", metric_call_budget=24, eval_strategy="no")
    run.train()
    run.create_model_card()
    assert ("whose calls said which way" if run.result.chosen.kind == MEAN else "were not kept") in text(run)
    assert "metric calls behind a forward pass each" in text(run, "value_function")


def test_without_a_metric_it_is_trainer_s(tmp_path):
    made = []
    for cls, folder in ((Trainer, "a"), (MetricOptTrainer, "b")):
        args = MetricOptConfig(str(tmp_path / folder), report_to=[], use_cpu=True)
        cls(tiny_bert(), args, train_dataset=Texts(8)).create_model_card(**GIVEN)
        made.append((tmp_path / folder / "README.md").read_text())
    assert made[0] == made[1]


def test_templates_are_installed_and_shown():
    import re

    patterns = re.search(r"package_data=\{.*?\}", (ROOT / "setup.py").read_text()).group()
    assert "hub/templates/*.md" in patterns and cards.TEMPLATES == ROOT / "metricopt_hf" / "hub" / "templates"
    shown = {path.name for path in (ROOT / "model_cards" / "templates").glob("*.md")}
    assert shown == {"value_function.md", "model.md", "citation.md"}
