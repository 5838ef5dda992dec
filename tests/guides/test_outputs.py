"""Outputs and labels as rows: what can be read, what cannot, and how long a term's gradient is made."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from teaching import batch
from transformers import EvalPrediction
from transformers.modeling_outputs import SequenceClassifierOutput

from metricopt_hf.guides.outputs import CLASSES, IDENTITIES, NUMBERS, Unreadable, matched, of_batch, of_prediction


def prediction(outputs, labels):
    return EvalPrediction(np.asarray(outputs), np.asarray(labels))


def test_what_labels_stand_for_is_seen_by_their_type_and_size():
    logits = np.zeros((4, 3), np.float16)
    for labels, kind in (
        (np.array([0, 2, 1, 1]), CLASSES),
        (np.array([0, 7, 7, 1]), IDENTITIES),
        (np.array([0.5, 1, 2, 3]), NUMBERS),
        (np.ones((4, 3), np.float32), NUMBERS),
    ):
        rows = of_prediction(prediction(logits, labels))
        assert rows.kind == kind and len(rows) == 4 and rows.outputs.dtype == torch.float32
        assert rows.labels.shape == ((4,) if kind != NUMBERS else (4, labels.size // 4))
    assert of_prediction(prediction(np.zeros(4, np.float32), np.array([0, 1, 1, 0]))).kind == NUMBERS


def test_of_tokens_those_without_a_label_are_left_out():
    labels = np.array([[1, -100, 2], [0, 0, -100]])
    rows = of_prediction(prediction(np.arange(18.0).reshape(2, 3, 3), labels))
    assert rows.labels.tolist() == [1, 2, 0, 0] and rows.outputs[1].tolist() == [6, 7, 8]


def test_of_several_arrays_the_first_counts_as_with_groups_beside_labels():
    several = EvalPrediction((np.zeros((4, 2), np.float32), np.zeros((4, 9))), (np.array([0, 1, 1, 0]), np.arange(4)))
    rows = of_prediction(several)
    assert rows.outputs.shape == (4, 2) and rows.labels.tolist() == [0, 1, 1, 0]


def test_batches_that_are_not_joined_are_joined():
    logits, labels = np.arange(12.0, dtype=np.float32).reshape(6, 2), np.array([0, 1, 1, 0, 0, 1])
    rows = of_prediction(EvalPrediction([(logits[:4], logits[:4]), (logits[4:], logits[4:])], [labels[:4], labels[4:]]))
    assert rows.outputs.tolist() == logits.tolist() and rows.labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    "given",
    [
        prediction(np.zeros((4, 3), int), np.zeros(4, int)),
        prediction(np.zeros((4, 3)), np.zeros(3)),
        EvalPrediction(np.zeros((4, 3)), None),
        EvalPrediction([np.zeros((2, 5, 3), np.float32)] * 2, [[{"boxes": np.zeros(4)}] * 2] * 2),
        EvalPrediction([np.zeros((2, 5, 3), np.float32), np.zeros((2, 4, 3), np.float32)], [np.zeros(2)] * 2),
    ],
    ids=["generated tokens", "other rows", "no labels", "detection", "batches of other shapes"],
)
def test_what_is_no_rows_is_told(given):
    with pytest.raises(Unreadable):
        of_prediction(given)


def test_a_batch_is_read_in_each_form_of_outputs():
    inputs, outputs, task_loss = batch()
    logits = outputs["logits"]
    for form in (outputs, (task_loss, logits), SequenceClassifierOutput(loss=task_loss, logits=logits)):
        rows, at = of_batch({"x": torch.zeros(1), **inputs}, form, CLASSES)
        assert at is logits and torch.equal(rows.outputs, logits) and torch.equal(rows.labels, inputs["labels"])
    with pytest.raises(Unreadable):
        of_batch({"x": torch.zeros(1)}, outputs, CLASSES)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_term_is_made_as_long_as_it_is_to_be_at_the_outputs(scale):
    inputs, outputs, task_loss = batch()
    rows, at = of_batch(inputs, outputs, CLASSES)
    term = matched(scale * rows.outputs.square().sum(), rows, at, task_loss, 3.0)
    (ours,), (task,) = (torch.autograd.grad(loss, at, retain_graph=True) for loss in (term, task_loss))
    assert float(ours.norm()) == pytest.approx(3 * float(task.norm()), rel=1e-5)
    assert torch.allclose(F.normalize(ours, dim=(0, 1)), F.normalize(at.detach(), dim=(0, 1)), atol=1e-6)


def test_in_mixed_precision_the_loss_is_of_a_copy_of_the_outputs():
    inputs, outputs, _ = batch()
    half = outputs["logits"].detach().bfloat16().requires_grad_()
    loss, given = F.cross_entropy(half.float(), inputs["labels"]), half.float()
    rows, at = of_batch(inputs, {"logits": given}, CLASSES)
    term = matched(rows.outputs.square().sum(), rows, at, loss, 1.0)
    (ours,) = torch.autograd.grad(term, at, retain_graph=True)
    (task,) = torch.autograd.grad(F.cross_entropy(given, inputs["labels"]), given)
    assert float(ours.norm()) == pytest.approx(float(task.norm()), rel=1e-4)


def test_a_term_without_a_gradient_adds_nothing():
    inputs, outputs, task_loss = batch()
    rows, at = of_batch(inputs, outputs, CLASSES)
    assert matched(rows.outputs.sum() * 0, rows, at, task_loss, 1.0) == 0


