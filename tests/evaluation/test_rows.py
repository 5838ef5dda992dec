"""Some of the rows of predictions, in every form that Trainer makes."""

import numpy as np
import pytest
from transformers import EvalPrediction

from metricopt_hf.evaluation.rows import SizedPrediction, divisible, num_rows, take_rows

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


def test_rows_are_counted_as_the_data_set_says_and_half_of_what_is_no_rows_is_not_taken():
    """Outputs by token before those by row; a number of no row at all."""
    tokens, logits, balance = np.zeros((11, 2)), np.arange(10.0).reshape(5, 2), np.array(0.5)
    known = SizedPrediction((tokens, logits, balance), np.arange(5), sizes=[5])
    assert num_rows(known) == 5 and not divisible(known)
    known = SizedPrediction((balance, logits), np.arange(5), sizes=[5])
    part = take_rows(known, ROWS)
    assert divisible(known) and num_rows(part) == 3 and part.predictions[0] == 0.5 and part.label_ids.tolist() == [0, 3, 4]


def test_columns_of_labels_are_no_rows_though_a_batch_has_as_many():
    """The report e6: masks and classes of two images."""
    masks, classes = [np.ones((1, 4, 4)), np.ones((2, 4, 4))], [np.array([0]), np.array([1, 0])]
    batch = EvalPrediction([(np.zeros((2, 4, 3)), np.zeros((2, 4, 4, 4)))], [(masks, classes)])
    labels = take_rows(batch, np.array([1]), concat=False).label_ids[0]
    assert [[array.shape for array in column] for column in labels] == [[(2, 4, 4)], [(2,)]]
