"""What is cut from the evaluation set has its share of every class, where labels can be read."""

import datasets
import numpy as np
import pytest
import torch

from metricopt_hf.evaluation import data

LABELS = np.array([0] * 60 + [1] * 34 + [2] * 4 + [3] * 2)


def as_list(labels, name="labels"):
    return [{"input_ids": torch.tensor([i]), name: torch.tensor(int(label))} for i, label in enumerate(labels)]


def as_table(labels, name="labels"):
    return datasets.Dataset.from_dict({"input_ids": [[i] for i in range(len(labels))], name: labels.tolist()})


class Pictures(torch.utils.data.Dataset):
    """As torchvision's: the labels are known, and a row costs something."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return 100

    def __getitem__(self, i):
        raise AssertionError("a picture would be decoded")


def as_torchvision(labels):
    return Pictures(labels.tolist())


KINDS = {"list": as_list, "table": as_table, "torchvision": as_torchvision}


def rows_of(part, kind):
    return part.indices if kind != "table" else [row["input_ids"][0] for row in part]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_each_class_has_its_share_of_both_halves(kind, seed):
    order = np.random.default_rng(0).permutation(len(LABELS))
    parts = data.cut(KINDS[kind](LABELS[order]), None, seed)
    rows = [rows_of(part, kind) for part in parts]
    assert len(rows[0]) == len(rows[1]) == 50 and not set(rows[0]) & set(rows[1])
    for part in rows:
        assert np.bincount(LABELS[order][part]).tolist() == [30, 17, 2, 1]
        assert (np.diff(LABELS[order][part]) < 0).sum() > 5  # in random order, not class by class


@pytest.mark.parametrize("size", [4, 10, 30])
def test_a_small_cut_has_the_rare_classes_too(size):
    observed, selected = data.cut(as_list(LABELS), size, 0)
    for part in (observed, selected):
        assert len(part) == size and set(LABELS[part.indices]) == {0, 1, 2, 3}
    assert not set(observed.indices) & set(selected.indices)


def test_a_class_that_cannot_be_in_both_is_named(caplog):
    labels = np.array([0] * 20 + [1] * 20 + [7])
    data.cut(as_list(labels), None, 0)
    assert "Class 7 is missing in the" in caplog.text and "cut from eval_dataset" in caplog.text


def test_the_column_may_have_a_name_of_its_own():
    labels = np.array([0] * 30 + [1] * 2)
    observed, selected = data.cut(as_table(labels, "actions"), None, 0, "actions")
    assert sorted(observed["actions"])[-1] == sorted(selected["actions"])[-1] == 1


@pytest.mark.parametrize(
    "dataset",
    [
        Pictures(None),
        [{"labels": torch.tensor(i / 100)} for i in range(100)],
        [torch.tensor(i) for i in range(100)],
        as_list(np.arange(100)),
    ],
    ids=["rows are not read", "a regression", "no dicts", "an id per row"],
)
def test_where_there_are_no_classes_to_be_read_the_cut_is_the_random_one(dataset):
    order = np.random.default_rng(3).permutation(100)
    observed, selected = data.cut(dataset, 20, 3)
    assert observed.indices == order[:20].tolist() and selected.indices == order[20:40].tolist()
