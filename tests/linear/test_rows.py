"""Some of the rows of predictions, in every form that Trainer makes."""

import numpy as np
import pytest
from transformers import EvalPrediction

from metricopt_hf.linear.rows import num_rows, sizes_of, take_rows, unsplittable

ROWS = np.array([0, 3, 4])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, x + 1), lambda x: {"logits": x}, lambda x: ((x, x), x)])
def test_joined_predictions(wrap):
    logits, labels = np.arange(10.0).reshape(5, 2), np.arange(5)
    whole = EvalPrediction(wrap(logits), (labels, labels % 2), inputs=labels, losses=labels.astype(float))
    part = take_rows(whole, ROWS)
    expected = EvalPrediction(wrap(logits[ROWS]), (labels[ROWS], labels[ROWS] % 2))
    assert num_rows(whole) == 5 and num_rows(part) == 3
    assert repr(part.predictions) == repr(expected.predictions) and repr(part.label_ids) == repr(expected.label_ids)
    assert part.inputs.tolist() == ROWS.tolist() == part.losses.tolist()


def test_what_has_no_row_per_example_stays():
    whole = EvalPrediction((np.zeros((5, 2)), np.arange(3)), np.arange(5))
    assert take_rows(whole, ROWS).predictions[1].tolist() == [0, 1, 2]


def test_batches_that_are_not_joined_with_a_dict_per_image():
    sizes = (2, 1, 3)
    boxes = [(np.full((size, 4), float(i)), np.full((size, 1), float(i))) for i, size in enumerate(sizes)]
    labels = [[{"boxes": np.ones((i + 1, 4)), "image": (i, j)} for j in range(size)] for i, size in enumerate(sizes)]
    whole = EvalPrediction(boxes, labels)
    part = take_rows(whole, ROWS, concat=False)
    assert num_rows(whole, concat=False) == 6 and num_rows(part, concat=False) == 3
    assert [len(batch[0]) for batch in part.predictions] == [1, 2]  # the second batch has no row left
    assert [[image["image"] for image in batch] for batch in part.label_ids] == [[(0, 0)], [(2, 0), (2, 1)]]
    assert part.predictions[1][1].tolist() == [[2.0], [2.0]]


def test_the_original_is_left_as_it_is():
    whole = EvalPrediction(np.arange(10.0).reshape(5, 2), np.arange(5))
    part = take_rows(whole, ROWS)
    part.predictions[:] = -1
    assert whole.predictions.min() == 0


def whole_of(predictions, labels=None, **others):
    return EvalPrediction(predictions, np.arange(5) if labels is None else labels, **others)


LOGITS, PIXELS = np.zeros((5, 3)), np.zeros((40, 3))


@pytest.mark.parametrize(
    ("prediction", "named"),
    [
        (whole_of(LOGITS), None),
        (whole_of((LOGITS, PIXELS)), None),  # router logits beside them
        (whole_of((PIXELS, LOGITS)), None),  # and in front
        (whole_of(({"loss_ce": np.zeros(2)}, LOGITS)), None),
        (whole_of({"logits": LOGITS}, losses=np.zeros(5)), None),
        (whole_of(PIXELS), "predictions hold 40 rows"),  # patches, joined
        (whole_of(PIXELS, np.zeros(40)), "predictions hold 40 rows"),
        (whole_of(LOGITS, np.zeros(40)), "label_ids hold 40 rows"),
        (whole_of(LOGITS, inputs=PIXELS), "inputs hold 40 rows"),
        (whole_of(np.float64(0.5)), "predictions hold no rows"),
    ],
)
def test_rows_are_those_of_examples_or_it_is_said_that_they_are_not(prediction, named):
    found = unsplittable(prediction, batch_sizes=[2, 3])
    assert (found is None) == (named is None) and (found is None or named in found and "5 examples" in found)
    assert num_rows(prediction, batch_sizes=[2, 3]) == 5
    if found is None:
        part = take_rows(prediction, ROWS, batch_sizes=[2, 3])
        assert unsplittable(part, batch_sizes=[3]) is None and part.label_ids.tolist() == [0, 3, 4]


def test_of_batches_that_are_not_joined_each_is_looked_at():
    sizes = (2, 3)
    logits, labels = [np.zeros((9, 2)), np.zeros((3, 2))], [np.arange(2), np.arange(3)]
    assert "of 2 examples the predictions hold 9" in unsplittable(EvalPrediction(logits, labels), False, sizes)
    assert "1 batches" in unsplittable(EvalPrediction(logits[:1], labels), False, sizes)
    fine = EvalPrediction([({"loss": np.float32(1)}, np.zeros((n, 2))) for n in sizes], labels)
    assert unsplittable(fine, False, sizes) is None
    part = take_rows(fine, ROWS, False, sizes)
    assert [len(batch[1]) for batch in part.predictions] == [1, 2] == list(sizes_of(fine, ROWS, sizes))


def test_of_a_batch_with_two_rows_two_outputs_are_no_rows():
    whole = EvalPrediction((np.zeros((2, 3)), np.zeros(7)), np.arange(2))
    part = take_rows(whole, np.array([1]))
    assert isinstance(part.predictions, tuple) and [len(p) for p in part.predictions] == [1, 7]


def test_of_a_batch_with_as_many_images_as_columns_both_columns_stay():
    """Of instance segmentation, in which a column of labels is a list of an array per image."""
    for size in (2, 3):
        masks, classes = ([np.full((i + 1, 4, 4), i) for i in range(size)], [np.arange(i + 1) for i in range(size)])
        whole = EvalPrediction([(np.zeros((size, 4)), np.zeros((size, 3)))], [(masks, classes)])
        ((some_masks, some_classes),) = take_rows(whole, np.array([1]), concat=False).label_ids
        assert [x.shape for x in some_masks] == [(2, 4, 4)] and [x.tolist() for x in some_classes] == [[0, 1]]
