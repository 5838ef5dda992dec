"""The four data sets of a comparison: given, cut, or refused."""

import datasets
import numpy as np
import pytest
from helpers import save_dataset

from comparison.splits import (
    DataArguments,
    Splits,
    class_names,
    default_dataset,
    find_column,
    load_splits,
    parts_of,
)
from metricopt_hf import ConfigurationError


def rows(start: int, count: int) -> dict[str, list]:
    return {"row": list(range(start, start + count)), "label": [i % 2 for i in range(count)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows that are told apart: train 0-79, validation 100-139, test 200-229."""
    tables = {"train": rows(0, 80), "validation": rows(100, 40), "test": rows(200, 30)}
    return save_dataset(tmp_path_factory.mktemp("data") / "rows", tables)


def load(folder, seed=0, size=None, **arguments):
    splits = load_splits(DataArguments(dataset_name=folder, **arguments), lambda dataset: dataset, seed, size)
    return {name: set(dataset["row"]) for name, dataset in splits.items()}


def assert_disjoint(splits: dict[str, set]) -> None:
    assert sum(map(len, splits.values())) == len(set().union(*splits.values()))


def test_given_splits_and_two_cut_of_validation(folder):
    splits = load(folder)
    assert splits["train"] == set(range(80)) and splits["report"] == set(range(200, 230))
    assert splits["observation"] | splits["selection"] == set(range(100, 140))
    assert len(splits["observation"]) == len(splits["selection"]) == 20
    assert_disjoint(splits)


def test_report_is_cut_where_there_is_no_other(folder):
    splits = load(folder, eval_split="test", size=8)
    assert [len(rows) for rows in splits.values()] == [80, 8, 8, 14]
    assert splits["observation"] | splits["selection"] | splits["report"] == set(range(200, 230))
    assert_disjoint(splits)


def test_train_is_cut_where_the_report_is_given(folder):
    splits = load(folder, eval_split="train", report_split="test")
    assert splits["train"] | splits["observation"] | splits["selection"] == set(range(80))
    assert [len(rows) for rows in splits.values()] == [40, 20, 20, 30]
    assert_disjoint(splits)


@pytest.mark.parametrize(("size", "sizes"), [(None, [60, 15, 15, 30]), (30, [30, 30, 30, 30]), (10, [80, 10, 10, 20])])
def test_all_four_are_cut_from_one(folder, size, sizes):
    splits = load(folder, size=size, train_split="train+validation", eval_split="train+validation")
    assert [len(rows) for rows in splits.values()] == sizes
    assert set().union(*splits.values()) == {*range(80), *range(100, 140)}
    assert_disjoint(splits)


def test_the_seed_cuts(folder):
    assert load(folder, seed=1) == load(folder, seed=1) != load(folder, seed=2)


def test_fewer_examples(folder):
    splits = load(folder, max_train_samples=10, max_eval_samples=12, max_report_samples=5)
    assert [len(rows) for rows in splits.values()] == [10, 6, 6, 5]
    assert splits["train"] != set(range(10))  # at random


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_split": "training"}, "has no split 'training'; it has train, validation, test"),
        ({"eval_split": "dev[:10]+test"}, "has no split 'dev'"),
        ({"report_split": "validation"}, "--report_split validation is trained, observed or selected on"),
        ({"max_train_samples": 0}, "The train split is empty"),
        ({"max_report_samples": 0}, "The report split is empty"),
        ({"size": 21}, r"'validation' has 40 examples, too few for observation and selection \(21 each\):"),
        ({"size": 15, "eval_split": "test"}, r"too few .* \(15 each\) and report"),
        ({"size": 40, "eval_split": "train"}, r"too few .* \(40 each\) and report and train"),
    ],
)
def test_refusals(folder, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        load(folder, **arguments)


def test_a_single_split_is_not_shared_unasked(tmp_path):
    folder = save_dataset(tmp_path / "one", {"train": rows(0, 32)})
    with pytest.raises(ConfigurationError, match="no split to observe and select on.*--eval_split train cuts all"):
        load(folder)
    assert [len(rows) for rows in load(folder, eval_split="train").values()] == [16, 4, 4, 8]


def test_parts_of_an_expression():
    assert parts_of("train[:80%]+validation + test[5:]") == ["train", "validation", "test"]


def test_columns():
    features = {"sentence": datasets.Value("string"), "kind": datasets.ClassLabel(names=["a", "b"])}
    dataset = datasets.Dataset.from_dict({"sentence": ["x"], "kind": [1]}, features=datasets.Features(features))
    assert find_column(dataset, None, ("text", "sentence"), "text") == "sentence"
    assert find_column(dataset, None, ("label",), "label", datasets.ClassLabel) == "kind"
    assert class_names(dataset, "kind") == ["a", "b"]
    for given in ("no", None):
        with pytest.raises(
            ConfigurationError, match=r"no column '(no|text)'; the columns are sentence, kind.*--option"
        ):
            find_column(dataset, given, ("text",), "option")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2, 1], "Example 1 of the selection split has the label 2, but there are 2 classes, 0 to 1"),
        ([0, 1, -1], "Example 2 of the selection split has the label -1"),
        ([0.5, 1.0, 0.0], "labels of the selection split are float32, not class indices"),
    ],
)
def test_labels_are_checked(labels, message):
    fine, wrong = (datasets.Dataset.from_dict({"label": values}) for values in ([0, 1, 1], labels))
    Splits(fine, fine, fine, fine).check_classes(2)
    with pytest.raises(ConfigurationError, match=message):
        Splits(fine, fine, wrong, fine).check_classes(2)
    assert class_names(fine) == ["0", "1"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([2.0, float("nan")], "Example 1 of the selection split has the label nan"),
        ([2.0, 2.0], "All labels of the selection split are 2.0, as where labels are held back"),
    ],
)
def test_numbers_are_checked(labels, message):
    fine, wrong = (datasets.Dataset.from_dict({"label": values}) for values in ([0.5, 1.0], labels))
    Splits(fine, fine, fine, fine).check_numbers()
    with pytest.raises(ConfigurationError, match=message):
        Splits(fine, fine, wrong, fine).check_numbers()


def test_an_empty_split_is_named(tmp_path):
    features = {name: datasets.Value("int64") for name in rows(0, 1)}
    folder = save_dataset(tmp_path / "empty", {"train": rows(0, 32), "test": rows(0, 0)}, features)
    with pytest.raises(ConfigurationError, match="The split 'test' of .* is empty"):
        load(folder)


def test_default_data(monkeypatch, tmp_path):
    monkeypatch.setenv("METRICOPT_DATA", str(tmp_path))
    (tmp_path / "here").mkdir()
    assert default_dataset("here", tmp_path / "elsewhere") == str(tmp_path / "here")
    with pytest.raises(ConfigurationError, match="not here.*METRICOPT_DATA.*--dataset_name"):
        default_dataset("there", tmp_path)
    monkeypatch.delenv("METRICOPT_DATA")
    assert default_dataset("here", tmp_path) == str(tmp_path / "here")


def test_map_keeps_the_names():
    splits = Splits(*(datasets.Dataset.from_dict({"label": [i]}) for i in range(4)))
    assert np.concatenate([d["label"] for _, d in splits.map(lambda d: d).items()]).tolist() == [0, 1, 2, 3]
    assert list(splits.measured) == ["observation", "selection", "report"]
