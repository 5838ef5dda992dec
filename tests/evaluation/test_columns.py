"""Which label column is of texts, missing, dropped or of floats, and what to type; nothing is said of what is right."""

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import default_data_collator

from metricopt_hf.evaluation.columns import FLOATS, NOTHING, OTHER, TEXTS, WHOLE, explain_labels, kinds

NAMES = ["labels", "group"]


def rows(**columns):
    added = [{name: values[i] for name, values in columns.items()} for i in range(4)]
    return [{"x": [0.0, float(i)], "labels": i % 2, **added[i]} for i in range(4)]


def explained(data, names=NAMES, forward=None, collate=default_data_collator, **options):
    return explain_labels(names, collate([data[i] for i in range(len(data))]), data, forward, **options)


def test_nothing_is_said_of_labels_that_are_there_as_numbers():
    data = rows(group=[0, 1, 1, 0])
    for dataset in (data, datasets.Dataset.from_list(data)):
        assert explained(dataset, whole=["group"]) is None
        assert explained(dataset, ["labels"], lambda x, labels=None: None) is None
        assert explained(dataset, NAMES, lambda **inputs: None) is None
    one = datasets.Dataset.from_list([{"x": [0.0], "label": 1}])  # collators take it as "labels"
    assert explained(one, ["labels"]) is None


def test_groups_as_texts_are_named_with_how_to_encode_them():
    data = rows(group=list("abab"))
    said = explained(data)
    assert "The column 'group' holds texts" in said and 'names.index(row["group"])' in said
    assert "not even labels" in said
    frame = datasets.Dataset.from_list(data)
    assert "dataset.class_encode_column('group')" in explained(frame)
    encoded = frame.class_encode_column("group")
    assert explained(encoded, whole=["group"]) is None


def test_texts_that_a_collator_keeps_are_texts():
    batch = {"x": torch.zeros(2, 2), "labels": torch.zeros(2), "group": ["a", "b"]}
    assert "'group' holds texts" in explain_labels(NAMES, batch)


def test_a_column_that_is_nowhere_is_missing():
    said = explained(rows(), ["labels", "nope"])
    assert "no column 'nope'" in said and "the columns are x, labels" in said and "texts" not in said
    assert "label_names=[...]" in said


@pytest.mark.parametrize(
    ("names", "columns", "forward", "meant"),
    [
        (["labels", "groups"], {"group": [0, 1, 1, 0]}, None, "['labels', 'group']"),
        (["target"], {"y": [0, 1, 1, 0]}, lambda x, labels=None: None, "['y']"),
    ],
)
def test_the_column_that_may_be_meant_is_suggested(names, columns, forward, meant):
    assert f"say label_names={meant}" in explained(rows(**columns), names, forward)


def test_a_column_that_the_collator_drops_is_said_to_be_dropped():
    def collate(items):
        batch = default_data_collator(items)
        del batch["group"]
        return batch

    said = explained(rows(group=[0, 1, 1, 0]), collate=collate)
    assert "'group' holds whole numbers in the data set, and batches are without 'group'" in said
    assert "data_collator" in said


def test_floats_are_named_where_whole_numbers_are_wanted():
    data = rows(group=[0.0, 1.0, 1.0, 0.0])
    assert explained(data) is None
    assert "'group' holds floats" in explained(data, whole=["group"])
    frame = datasets.Dataset.from_list(data)
    assert "cast_column('group', datasets.Value(" in explained(frame, whole=["group"])


def test_labels_of_none_are_named():
    assert "'group' holds None" in explained(rows(group=[None] * 4))


def test_no_label_names_are_named():
    assert "label_names is empty" in explained(rows(), [])


def test_what_a_column_holds():
    class Own(Dataset):
        def __getitem__(self, i):
            raise RuntimeError

    batch = {
        "a": torch.zeros(2), "b": np.zeros(2, np.int8), "c": ["x"], "d": [[1, 2], [3]], "e": [None, 1], "f": {"k": 1},
        "g": [[0.5]], "h": np.array(["x"], object), "i": b"x", "j": torch.zeros(2, dtype=torch.bool), "k": 1,
    }  # fmt: skip
    expected = [FLOATS, WHOLE, TEXTS, WHOLE, NOTHING, OTHER, FLOATS, TEXTS, TEXTS, WHOLE, WHOLE]
    assert kinds(batch) == dict(zip(batch, expected, strict=True))
    features = {
        "a": datasets.Value("large_string"), "b": datasets.List(datasets.Value("int64")), "c": datasets.Value("null"),
        "d": datasets.ClassLabel(names=["no", "yes"]), "e": datasets.Value("float16"), "f": datasets.Image(),
    }  # fmt: skip
    empty = datasets.Dataset.from_dict({name: [] for name in features}, features=datasets.Features(features))
    assert list(kinds(empty).values()) == [TEXTS, WHOLE, NOTHING, WHOLE, FLOATS, OTHER]
    assert kinds(Own()) == kinds(None) == kinds([(1, 2)]) == {}
