"""Runs judged by the model itself: by a function of it, by a command, and after it is rounded or exported."""

import copy
import logging
import sys

import pytest
import torch
from helpers import Texts, tiny_bert
from runs import bert_trainer

from metricopt_hf import ConfigurationError, MetricError, MetricOptTrainer, ModelMetric

MODEL_RUN = {"max_steps": 2, "metric_steps": 2, "metric_call_budget": 8, "guide": "pairs", "phi_dim": 2}
ROWS = Texts(40, seed=5)


def accuracy(model, rows=ROWS):
    with torch.no_grad():
        return float((model(input_ids=rows.ids).logits.argmax(-1) == rows.labels).float().mean())


def log_likelihood(model, dataset):
    with torch.no_grad():
        return -float(torch.nn.functional.cross_entropy(model(input_ids=dataset.ids).logits, dataset.labels))


def rounded(model, bits=4):
    """Weights of the linear layers on 2^bits - 1 equally spaced levels, by output channel."""
    largest = 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / largest
            module.weight.copy_((module.weight / scale).round() * scale)
    return model


def test_observed_and_selected_is_what_the_function_says_of_the_merged_model(tmp_path, caplog):
    split_of = {}

    def metric(model, dataset):
        assert not [name for name, _ in model.named_parameters() if "film" in name]
        return split_of.setdefault(id(dataset), []).append(0) or log_likelihood(model, dataset)

    trainer = bert_trainer(tmp_path, metric=ModelMetric(metric, "log_likelihood"), observe="predictions", **MODEL_RUN)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.result.observed == "scores"
    assert {id(trainer.observation_dataset), id(trainer.selection_dataset)} == set(split_of)
    result = trainer.result
    assert 0 < len(result.trajectory) <= 8
    selected = log_likelihood(trainer.model.eval(), trainer.selection_dataset)
    assert result.best_score == pytest.approx(selected, abs=1e-5)
    assert trainer.evaluate(Texts(30, seed=6))["eval_log_likelihood"] == pytest.approx(
        log_likelihood(trainer.model, Texts(30, seed=6)), abs=1e-6
    )


def test_without_data_of_its_own_it_needs_no_eval_set(tmp_path):
    trainer = bert_trainer(
        tmp_path,
        metric=ModelMetric(accuracy, "accuracy"),
        observation_dataset=None,
        selection_dataset=None,
        **MODEL_RUN,
    )
    trainer.train()
    assert trainer.result.best_score == accuracy(trainer.model.eval())
    with pytest.raises(ConfigurationError, match="nothing to diagnose"):
        trainer.diagnose()


def test_a_metric_that_fails_on_the_model_ends_the_run_before_training_and_not_later(tmp_path):
    with pytest.raises(MetricError, match="copy of the model"):
        bert_trainer(tmp_path, metric=ModelMetric(lambda model: 1 / 0, "broken"), **MODEL_RUN).train()
    calls = []

    def failing(model):
        calls.append(0)
        return 1 / 0 if len(calls) > 1 else 0.5

    trainer = bert_trainer(tmp_path, metric=ModelMetric(failing, "broken"), **MODEL_RUN)
    trainer.train()
    assert trainer.result.ended == "the metric failed 3 times at its start" and trainer.state.global_step == 2


@pytest.mark.slow
def test_a_command_judges_the_run(tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "import sys\nfrom safetensors.numpy import load_file\n"
        "weights = load_file(sys.argv[1] + '/model.safetensors')\n"
        "print('loaded', len(weights))\n"
        "print(-float(((weights['classifier.bias'] - 1) ** 2).sum()) - (sys.argv[2] == 'selection'))\n"
    )
    trainer = bert_trainer(
        tmp_path,
        metric=None,
        metric_command=f"{sys.executable} {script} {{model}} {{split}}",
        metric_for_best_model="closeness",
        observation_dataset=None,
        selection_dataset=None,
        **{**MODEL_RUN, "metric_call_budget": 4},
    )
    trainer.train()
    result = trainer.result
    assert result.metric == "closeness" and result.failed_calls == 0 and len(result.trajectory) > 0
    bias = trainer.model.classifier.bias.detach()
    assert result.best_score == pytest.approx(-float((bias - 1).square().sum()) - 1, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_command": "python score.py"}, "where the folder of the model goes"),
        ({"metric_command": 5}, "a command line"),
        ({"metric_command": "no_such_program {model}"}, "no program 'no_such_program'"),
        ({"metric_command": "python score.py {model}", "metric_name_or_path": "g_mean"}, "leave one of them out"),
    ],
)
def test_a_command_that_cannot_work_is_refused_before_training(tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        bert_trainer(tmp_path, metric=None, **options).train()


def test_accuracy_after_rounding_to_four_bits(tmp_path):
    metric = ModelMetric(lambda model: accuracy(rounded(model)), "accuracy_4bit")
    model = tiny_bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = bert_trainer(tmp_path, model=model, metric=metric, **MODEL_RUN)
    trainer.train()
    selected = trainer.result.best_score
    assert selected == metric(copy.deepcopy(trainer.model).eval().requires_grad_(False))
    # what was rounded were copies: what phi does not touch is bit for bit what it was
    for name, tensor in trainer.model.state_dict().items():
        if "encoder" in name and "LayerNorm" not in name:
            assert torch.equal(tensor, before[name])


def test_a_fault_in_evaluate_in_the_midst_of_a_run_does_not_end_it(tmp_path):
    """The report evaluate_ends_run: Trainer's evaluate calls the metric too."""
    fails = []

    def metric(model):
        if fails:
            raise RuntimeError(fails.pop())
        return accuracy(model)

    class Failing(MetricOptTrainer):
        def evaluate(self, *args, **kwargs):
            fails.append("the service is down")
            return super().evaluate(*args, **kwargs)

    trainer = bert_trainer(
        tmp_path, Failing, metric=ModelMetric(metric, "accuracy"), eval_dataset=Texts(8), eval_strategy="steps",
        eval_steps=1, **MODEL_RUN,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
    scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(scores) == 2 and all(score != score for score in scores)  # nan
    with pytest.raises(MetricError, match="the service is down"):
        trainer.evaluate()
