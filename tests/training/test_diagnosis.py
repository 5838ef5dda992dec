"""The diagnosis before training: right where the answer is known, and without a trace."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_weights, tiny_bert, weights
from runs import bert_trainer
from torch import nn
from transformers import Trainer, TrainingArguments

from metricopt_hf import ConfigurationError, Diagnosis, Ledger, Metric, MetricError, MetricOptConfig, MetricOptTrainer
from metricopt_hf.training.diagnosis import GUIDANCE, NO, NOTHING, OPEN, THRESHOLD, TOO_FEW, YES, Gain


class Scores(nn.Module):
    """logits = weight x + bias; what it is given as `group` it would not take."""

    def __init__(self, weight, bias=(0.0, 0.0)):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[-w for w in weight], list(weight)]))
            self.linear.bias.copy_(torch.tensor(bias))

    def forward(self, features, labels=None):
        logits = self.linear(features)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def examples(size, seed):
    """Labels in two groups: the first feature says the label as well in each, the second says the group."""
    generator = np.random.default_rng(seed)
    labels, group = generator.integers(2, size=(2, size))
    features = np.stack([2 * labels - 1, 2 * group - 1], 1) + generator.normal(size=(size, 2))
    rows = zip(torch.tensor(features, dtype=torch.float32), labels.tolist(), group.tolist(), strict=True)
    return [{"features": x, "labels": y, "group": g} for x, y, g in rows]


def right(prediction):
    return prediction.predictions.argmax(-1) == prediction.label_ids[0]


def accuracy(prediction):
    return float(right(prediction).mean())


def worst_recall(prediction):
    return min(float(right(prediction)[prediction.label_ids[0] == c].mean()) for c in (0, 1))


def worst_group_error(prediction):
    """Smaller is better."""
    labels, group = prediction.label_ids
    return 1 - min(right(prediction)[(labels == a) & (group == b)].mean() for a in (0, 1) for b in (0, 1))


def mean_money(prediction):
    return float((right(prediction) * (1000 + 1000 * prediction.label_ids[1])).mean())


def total_money(prediction):
    return len(right(prediction)) * mean_money(prediction)


def scores_trainer(folder, metric, weight=(0.6, 0.8), bias=(0.0, 0.0), size=400, **config):
    numbers = {"greater_is_better": True, "max_steps": 4, "disable_tqdm": True, "metric_call_budget": 800, **config}
    args = MetricOptConfig(
        str(folder), phi="linear", label_names=["labels", "group"], use_cpu=True, report_to=[], **numbers
    )
    sets = {"observation_dataset": examples(size, 2), "selection_dataset": examples(size, 3)}
    return MetricOptTrainer(Scores(weight, bias), args, train_dataset=examples(64, 1), metric=metric, **sets)


# Runs


def test_where_the_model_is_best_already_there_is_nothing_to_gain(tmp_path):
    found = scores_trainer(tmp_path, accuracy, (1.0, 0.0)).diagnose()
    assert found.recommendation == NOTHING and found.examples_needed is None and found.examples == 800
    assert all(abs(gain.mean) < 0.03 for gain in found.gains.values())


def test_where_a_threshold_is_wrong_a_threshold_suffices(tmp_path):
    found = scores_trainer(tmp_path, worst_recall, (1.0, 0.0), (1.0, -1.0)).diagnose()
    assert found.recommendation == THRESHOLD and found.verdict("bias") == YES != found.verdict("phi")
    assert found.gains["bias", "start"].mean > 0.15 and found.scores["bias"] > found.scores["start"]


def test_where_the_model_looks_at_the_group_guidance_pays(tmp_path, capsys):
    trainer = scores_trainer(tmp_path, worst_group_error, greater_is_better=False, disable_tqdm=False)
    found = trainer.diagnose()
    assert found.recommendation == GUIDANCE and found.verdict("bias") != YES
    assert found.beyond.mean > 0.1 and found.scores["phi"] < found.scores["start"]
    assert sum(found.ledger.passes.values()) == 2 * (1 + 3)  # predictions; forward and a backward pass per logit
    assert trainer.ledger.calls == Ledger().calls and found.seconds > sum(found.ledger.seconds.values()) * 0.5
    printed = capsys.readouterr()
    assert printed.out == "" and "6/6" in printed.err  # a bar, and no table until it is printed


def test_money_has_the_same_verdicts_and_a_sum_the_error_of_a_sum(tmp_path):
    mean, total = (scores_trainer(tmp_path, metric).diagnose() for metric in (mean_money, total_money))
    assert mean.recommendation == total.recommendation == GUIDANCE
    assert 5 < mean.worthwhile < 100 and total.worthwhile == pytest.approx(400 * mean.worthwhile, rel=0.5)
    gain, of_sum = mean.gains["phi", "start"], total.gains["phi", "start"]
    assert 2 < of_sum.error / (400 * gain.error) * 2 < 4 and gain.mean > 50  # not half of it


@pytest.mark.parametrize(("size", "config"), [(1, {}), (12, {}), (40, {"observe": "predictions_on_all_rows"})])
def test_without_an_error_nothing_is_told(tmp_path, size, config):
    found = scores_trainer(tmp_path, accuracy, size=size, **config).diagnose()
    assert found.recommendation == TOO_FEW and found.verdict("bias") == found.verdict("phi") == OPEN
    assert found.examples_needed == float("inf") and " ± " not in str(found).split("\n±")[0]
    assert "An error takes 16 examples in each set" in found.advice
    found.plot(tmp_path / "diagnosis.png")  # without bars


# Without a trace


def test_nothing_is_left_behind(tmp_path):
    model = tiny_bert().train()
    model.bert.eval()
    next(model.parameters()).requires_grad_(False)
    trainer = bert_trainer(tmp_path, model=model)
    model, modes = trainer.model, [module.training for module in trainer.model.modules()]
    before, grads = weights(model), [p.requires_grad for p in model.parameters()]
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = trainer.diagnose()
    assert random.getstate() == state[0] and np.array_equal(np.random.get_state()[1], state[1])
    assert torch.equal(torch.get_rng_state(), state[2])
    assert_equal_weights(before, weights(model))
    assert modes == [module.training for module in model.modules()]
    assert grads == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert trainer.phase is None and trainer.optimizer is None and trainer.state.global_step == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    second = trainer.diagnose()
    assert (first.scores, first.gains) == (second.scores, second.gains)


@pytest.mark.parametrize("guided", [False, True])
def test_training_is_the_same_behind_a_diagnosis(tmp_path, guided):
    ends = []
    for diagnosed in (False, True):
        trainer = bert_trainer(tmp_path)
        if diagnosed:
            trainer.diagnose()
        if not guided:
            args = TrainingArguments(
                str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, weight_decay=0.1
            )
            trainer = Trainer(trainer.model, args, train_dataset=trainer.train_dataset)
        trainer.train()
        ends.append(weights(trainer.model))
    assert_equal_weights(*ends)


# Refusals


def test_refusals(tmp_path):
    with pytest.raises(ConfigurationError, match="no metric to diagnose"):
        bert_trainer(tmp_path, metric=None, compute_metrics=None).diagnose()
    with pytest.raises(ConfigurationError, match="worthwhile=0 must be positive"):
        bert_trainer(tmp_path).diagnose(worthwhile=0)
    of_model = Metric(lambda model: 0.0, "size", of_predictions=False)
    with pytest.raises(ConfigurationError, match="'size' is one of the model.*nothing to diagnose"):
        bert_trainer(tmp_path, metric=of_model).diagnose()
    decided = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}  # as texts are generated
    with pytest.raises(ConfigurationError, match="Nothing can be told before training: .* no floating-point numbers"):
        bert_trainer(tmp_path, metric=lambda p: float((p.predictions == p.label_ids).mean()), **decided).diagnose()


def test_a_metric_that_fails_at_the_start_says_so(tmp_path):
    trainer = bert_trainer(tmp_path, metric=lambda prediction: prediction.no_such_column)
    before = weights(trainer.model)
    with pytest.raises(MetricError, match="no_such_column"):
        trainer.diagnose()
    assert_equal_weights(before, weights(trainer.model))


# By hand


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [(0.05, 0.02, YES), (0.05, 0.03, OPEN), (0.0, 0.01, NO), (-0.05, 0.04, NO), (0.0, 0.0, NO), (0.5, np.inf, OPEN),
     (float("nan"), 0.01, OPEN)],
)  # fmt: skip
def test_verdicts_by_hand(mean, error, verdict):
    assert Gain(mean, error).verdict(0.02) == verdict
    assert Gain(1e3 * mean, 1e3 * error).verdict(20) == verdict  # in another unit


def diagnosis(phi, bias=None, beyond=None, **fields):
    gains = {("phi", "start"): Gain(*phi)}
    if bias is not None:
        gains |= {("bias", "start"): Gain(*bias), ("phi", "bias"): Gain(*(beyond or (phi[0] - bias[0], phi[1])))}
    scores = {"start": 0.5} | ({} if bias is None else {"bias": 0.5 + bias[0]}) | {"phi": 0.5 + phi[0]}
    values = {"metric": "m", "greater_is_better": True, "examples": 100, "worthwhile": 0.02, **fields}
    return Diagnosis(scores=scores, gains=gains, ledger=Ledger(), seconds=0.0, **values)


@pytest.mark.parametrize(
    ("phi", "bias", "beyond", "expected"),
    [
        ((0.01, 0.01), (0.0, 0.01), None, NOTHING),
        ((0.11, 0.01), (0.1, 0.01), None, THRESHOLD),
        ((0.224, 0.028), (0.197, 0.028), (0.027, 0.02), THRESHOLD),  # what phi gives beyond it is open
        ((0.1, 0.015), (0.0, 0.01), None, GUIDANCE),
        ((0.0, 0.01), (-0.1, 0.01), None, NOTHING),  # better than a bad bias, not than the start
        ((0.03, 0.05), (0.0, 0.01), None, TOO_FEW),
        ((0.0, 0.01), (0.0, 0.05), None, TOO_FEW),
        ((0.1, 0.01), None, None, GUIDANCE),
        ((0.1, 0.08), None, None, TOO_FEW),
        ((0.0, 0.001), None, None, NOTHING),
    ],
)
def test_recommendations_by_hand(phi, bias, beyond, expected):
    found = diagnosis(phi, bias, beyond)
    assert found.recommendation == expected and f"Recommendation: {expected}." in str(found)
    assert (found.examples_needed is not None) == (OPEN in (found.verdict("bias"), found.verdict("phi")))


def test_the_examples_needed_are_rounded_and_capped():
    assert diagnosis((0.04, 0.04)).examples_needed == 400  # twice the error of the gain on a fourth of them
    assert diagnosis((0.0, 0.04)).examples_needed == 1600  # to tell a gain that is just worth having
    assert diagnosis((0.039, 0.04)).examples_needed == 430  # 420.8
    never = diagnosis((0.0, 40.0))
    assert never.examples_needed == float("inf") and "would take more examples than you will get." in str(never)


def test_it_is_printed_as_one_table_and_drawn(tmp_path):
    found = diagnosis((0.224, 0.028), (0.197, 0.028), (0.027, 0.02), greater_is_better=False)
    lines = str(found).splitlines()
    assert lines[0].startswith("Diagnosis before training: m (smaller is better), 100 examples")
    assert [line.split("  ")[0] for line in lines[4:7]] == ["start", "a bias per logit", "phi, near where it is"]
    assert lines[6].split()[5:] == "0.724 +0.224 ± 0.028 +0.027 ± 0.02".split() and lines[7] == ""
    assert "A bias pays (+0.197 ± 0.028); whether phi beyond a bias pays cannot be told (+0.027 ± 0.02)." in lines[8]
    assert "would take about 220 examples" in lines[8] and lines[9].startswith("± is one standard error")
    assert str(Gain(0.0, 0.0)) == "no difference" and str(Gain(0.1, float("inf"))) == "+0.1, error unknown"
    found.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
