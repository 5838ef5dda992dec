"""The diagnosis before training: right where the answer is known, and without a trace."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_weights, tiny_bert, true_class_probability, weights
from runs import bert_trainer
from torch import nn

from metricopt_hf import ConfigurationError, Diagnosis, Ledger, MetricError, MetricOptConfig, MetricOptTrainer
from metricopt_hf.training.diagnosis import GUIDANCE, NOTHING, THRESHOLD, TOO_FEW, Gain


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


class Examples(torch.utils.data.Dataset):
    """Labels in two groups. The first feature says the label as well in each; the second says label and group.

    Args:
        agreement: share of the examples in which the group is the label.
        positive: share of the label 1.
    """

    def __init__(self, size, seed, agreement=0.5, positive=0.5):
        generator = np.random.default_rng(seed)
        self.labels = (generator.random(size) < positive).astype(int)
        self.group = np.where(generator.random(size) < agreement, self.labels, 1 - self.labels)
        sure, spurious = 2 * self.labels - 1, 2 * self.group - 1
        self.features = np.stack([sure, spurious], 1) + generator.normal(size=(size, 2))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        features = torch.tensor(self.features[i], dtype=torch.float32)
        return {"features": features, "labels": int(self.labels[i]), "group": int(self.group[i])}


def accuracies(prediction):
    """Of each label in each group."""
    labels, group = prediction.label_ids
    right = prediction.predictions.argmax(-1) == labels
    return [right[(labels == a) & (group == b)].mean() for a in (0, 1) for b in (0, 1)]


def accuracy(prediction):
    return float((prediction.predictions.argmax(-1) == prediction.label_ids[0]).mean())


def worst_group_error(prediction):
    """Smaller is better."""
    return 1 - min(accuracies(prediction))


def worst_recall(prediction):
    predicted, labels = prediction.predictions.argmax(-1), prediction.label_ids[0]
    return min(float((predicted[labels == c] == c).mean()) for c in (0, 1))


def trainer(folder, model, metric, size=1000, agreement=0.5, positive=0.5, greater_is_better=True, **numbers):
    args = MetricOptConfig(
        str(folder),
        metric_start_ratio=0,
        greater_is_better=greater_is_better,
        phi="linear",
        label_names=["labels", "group"],
        per_device_eval_batch_size=500,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 4, "save_strategy": "no", **numbers},
    )
    return MetricOptTrainer(
        model,
        args,
        train_dataset=Examples(500, 1, 0.95, positive),
        observation_dataset=Examples(size, 2, agreement, positive),
        selection_dataset=Examples(size, 3, agreement, positive),
        metric=metric,
    )


def test_where_the_model_is_best_already_there_is_nothing_to_gain(tmp_path):
    """The second feature says nothing where it is measured, and the model does not look at it."""
    found = trainer(tmp_path, Scores([1.0, 0.0]), accuracy).diagnose()
    assert found.recommendation == NOTHING and found.examples_needed is None
    assert abs(found.gain("phi").mean) < 0.02 > abs(found.gain("bias").mean)


def test_where_a_threshold_is_wrong_a_threshold_suffices(tmp_path):
    found = trainer(tmp_path, Scores([1.0, 0.0], (1.0, -1.0)), worst_recall).diagnose()
    assert found.recommendation == THRESHOLD
    assert found.gain("bias").mean > 0.15 and abs(found.gain("phi", "bias").mean) < 0.02


def test_where_the_model_looks_at_the_wrong_feature_guidance_pays(tmp_path, capsys):
    """In training the group is nearly the label; the groups in which it is not are one of each label."""
    asked = trainer(tmp_path, Scores([0.6, 0.8]), worst_group_error, greater_is_better=False)
    found = asked.diagnose()
    assert found.recommendation == GUIDANCE
    assert found.gain("phi", "bias").mean > 0.1 and found.scores["phi"] < found.scores["start"]
    assert found.interpolation_error < 0.05  # the outputs are linear in phi
    passes = sum(found.ledger.passes.values())
    assert passes <= 42 and asked.ledger.calls == Ledger().calls
    printed = capsys.readouterr().out
    assert f"Recommendation: {GUIDANCE}" in printed and "worst_group_error (smaller is better)" in printed
    assert f"{passes} forward passes" in printed

    found.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_few_examples_do_not_tell_and_more_of_them_would(tmp_path):
    """The same, with a model that is nearly right, on few examples; and with as many as were asked for."""
    few = trainer(tmp_path, Scores([0.9, 0.35]), worst_group_error, 60, greater_is_better=False).diagnose()
    assert few.recommendation == TOO_FEW
    assert 60 < few.examples_needed
    enough = trainer(tmp_path, Scores([0.9, 0.35]), worst_group_error, 4000, greater_is_better=False).diagnose()
    assert enough.recommendation == GUIDANCE


def test_nothing_is_left_behind(tmp_path):
    model = Scores([0.6, 0.8])
    model.train()
    before, asked = weights(model), trainer(tmp_path, model, worst_group_error, greater_is_better=False)
    asked.phi.parameters[0].requires_grad_(False)
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = asked.diagnose()
    assert random.getstate() == state[0] and np.array_equal(np.random.get_state()[1], state[1])
    assert torch.equal(torch.get_rng_state(), state[2])
    assert_equal_weights(before, weights(model))
    assert model.training and not asked.phi.parameters[0].requires_grad and asked.phi.parameters[1].requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert asked.phase is None and asked.optimizer is None and asked.state.global_step == 0
    assert not model._forward_hooks and "forward" not in model.linear.__dict__
    second = asked.diagnose()
    assert first.scores == second.scores and all(np.array_equal(first.draws[n], second.draws[n]) for n in first.draws)


def test_training_is_the_same_behind_a_diagnosis(tmp_path):
    made = []
    for diagnosed in (False, True):
        model = tiny_bert()
        run = bert_trainer(tmp_path, model)
        if diagnosed:
            run.diagnose()
        run.train()
        made.append((weights(model), run.ledger.calls))
        assert_equal_weights(*(m for m, _ in (made[0], made[-1])))
        assert made[0][1] == made[-1][1]
    merged = weights(model)  # and behind a run, phi is merged
    run.diagnose()
    assert_equal_weights(merged, weights(model))


def test_outputs_that_cannot_be_interpolated_are_passed_each_time(tmp_path):
    def decided(logits, labels):
        return logits.argmax(-1)

    def worst(prediction):
        labels, group = prediction.label_ids
        right = prediction.predictions == labels
        return 1 - min(right[(labels == a) & (group == b)].mean() for a in (0, 1) for b in (0, 1))

    asked = trainer(tmp_path, Scores([0.6, 0.8]), worst, greater_is_better=False)
    asked.preprocess_logits_for_metrics = decided
    found = asked.diagnose()
    assert found.interpolation_error is None and "bias" not in found.scores
    assert found.recommendation == GUIDANCE


def test_a_metric_of_all_rows_has_no_noise_estimate(tmp_path):
    sizes = set()

    def sized(prediction):
        sizes.add(len(prediction.label_ids))
        return true_class_probability(prediction)

    found = bert_trainer(tmp_path, metric=sized, observe="predictions_on_all_rows").diagnose()
    assert sizes == {60} and np.isnan(found.gain("phi").error)
    assert "±" not in str(found).split("Recommendation")[0]


def test_many_coordinates_do_not_take_many_passes(tmp_path):
    found = bert_trainer(tmp_path, phi="classifier", coordinates="identity").diagnose()
    assert sum(found.ledger.passes.values()) <= 42


def test_refusals(tmp_path):
    plain = bert_trainer(tmp_path, metric=None, compute_metrics=None)
    with pytest.raises(ConfigurationError, match="no metric to diagnose"):
        plain.diagnose()
    with pytest.raises(ConfigurationError, match="worthwhile=0 must be positive"):
        bert_trainer(tmp_path).diagnose(worthwhile=0)

    def broken(prediction):
        raise RuntimeError("no such column")

    model = tiny_bert()
    asked = bert_trainer(tmp_path, copy.deepcopy(model), metric=broken)
    before = weights(asked.model)
    with pytest.raises(MetricError, match="no such column"):
        asked.diagnose()
    assert_equal_weights(before, weights(asked.model))


# By hand


def diagnosis(**gains):
    """Of scores and of what the differences scatter by."""
    draws = {"start": np.zeros(2)}
    for name, (_, error) in gains.items():
        draws[name] = np.array([0.0, error * 2**0.5])
    scores = {"start": 0.5, **{name: 0.5 + gain for name, (gain, _) in gains.items()}}
    return Diagnosis("m", True, 100, 0.02, scores, draws, 0.0, Ledger(), 0.0)


def test_a_gain_by_hand():
    assert Gain(0.05, 0.02).is_real(0.02) is True
    assert Gain(0.03, 0.02).is_real(0.02) is None and Gain(0.0, 0.03).is_real(0.02) is None
    assert Gain(0.01, 0.01).is_real(0.02) is False
    assert Gain(0.03, float("nan")).is_real(0.02) and not Gain(0.01, float("nan")).is_real(0.02)
    assert diagnosis(phi=(0.1, 0.03)).gain("phi").error == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({"bias": (0.0, 0.01), "phi": (0.01, 0.01)}, NOTHING),
        ({"bias": (0.1, 0.01), "phi": (0.11, 0.02)}, THRESHOLD),
        ({"bias": (0.0, 0.01), "phi": (0.1, 0.015)}, GUIDANCE),
        ({"bias": (0.1, 0.01), "phi": (0.13, 0.05)}, TOO_FEW),
        ({"bias": (0.0, 0.05), "phi": (0.0, 0.01)}, TOO_FEW),
        ({"phi": (0.1, 0.01)}, GUIDANCE),
        ({"phi": (0.1, 0.08)}, TOO_FEW),
        ({"phi": (0.0, 0.001)}, NOTHING),
    ],
)
def test_recommendations_by_hand(gains, expected):
    found = diagnosis(**gains)
    assert found.recommendation == expected
    assert f"Recommendation: {expected}" in str(found)
    assert (found.examples_needed is not None) == (expected == TOO_FEW)


def test_the_examples_needed_by_hand():
    assert diagnosis(phi=(0.04, 0.04)).examples_needed == 400  # twice the error of the gain on a fourth of them
    assert diagnosis(phi=(0.0, 0.04)).examples_needed == 1600  # to tell a gain that is just worth having
