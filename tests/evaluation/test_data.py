"""Splits and batches for the guidance."""

import datasets
import numpy as np
import pytest
import torch

from metricopt_hf import ConfigurationError
from metricopt_hf.evaluation import data

SIZE = 20


class Rows(torch.utils.data.Dataset):
    """A map-style data set without columns."""

    def __init__(self, size=SIZE, name="labels"):
        self.size, self.name = size, name

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if not 0 <= i < self.size:
            raise IndexError(i)
        return {"x": torch.tensor(float(i)), self.name: torch.tensor(i % 3)}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([{"x": torch.tensor(float(i))} for i in range(SIZE)])


def table(size=SIZE, name="label"):
    return datasets.Dataset.from_dict({"x": [float(i) for i in range(size)], name: [i % 3 for i in range(size)]})


MAKE = {"torch": Rows, "datasets": table}


def collate(rows):
    return [int(row["x"]) for row in rows]


def numbers(dataset):
    return [int(dataset[i]["x"]) for i in range(len(dataset))]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", MAKE)
def test_the_two_parts_are_disjoint_random_and_seeded(kind):
    dataset = MAKE[kind]()
    first, second = map(numbers, data.cut(dataset, 6, seed=0))
    assert len(first) == len(second) == 6
    assert len({*first, *second}) == 12 <= SIZE
    assert first != sorted(first)
    assert (first, second) == tuple(map(numbers, data.cut(dataset, 6, seed=0)))
    assert (first, second) != tuple(map(numbers, data.cut(dataset, 6, seed=1)))


@pytest.mark.parametrize(("size", "half"), [(20, 10), (21, 10), (2, 1)])
def test_by_default_each_part_is_half(size, half):
    first, second = data.cut(Rows(size), None, seed=0)
    assert len(first) == len(second) == half


@pytest.mark.parametrize(("size", "wanted"), [(20, 11), (1, None), (0, None), (20, 0)])
def test_too_small_a_set_is_refused_with_its_size(size, wanted):
    with pytest.raises(ConfigurationError, match=f"eval_dataset has {size} examples.*observation_dataset"):
        data.cut(Rows(size), wanted, seed=0)


def test_a_set_without_length_cannot_be_cut():
    with pytest.raises(ConfigurationError, match="no length.*observation_dataset"):
        data.cut(Stream(), 4, seed=0)


@pytest.mark.parametrize("kind", MAKE)
def test_examples_are_taken_in_the_order_asked_for(kind):
    assert numbers(data.take(MAKE[kind](), np.array([7, 2, 2, 19]))) == [7, 2, 2, 19]


@pytest.mark.parametrize("kind", MAKE)
def test_in_order_means_everything_every_time(kind):
    batches = data.InOrder(MAKE[kind](), 8, collate)
    for _ in range(2):
        assert [len(batch) for batch in batches()] == [8, 8, 4]
        assert sum(batches(), []) == list(range(SIZE))
    assert batches.batch_sizes == (8, 8, 4)


def test_of_a_stream_nobody_knows_how_many_examples_there_are():
    assert data.InOrder(Stream(), 8, collate).batch_sizes is None


@pytest.mark.parametrize("kind", MAKE)
def test_random_batches_are_as_many_as_asked_for_and_seeded(kind):
    def drawn(seed):
        return list(data.random_batches(MAKE[kind](), 4, 5, collate, generator(seed)))

    assert [len(batch) for batch in drawn(0)] == [4] * 5
    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(sum(drawn(0), []))) > 10


def test_a_batch_is_no_larger_than_its_set():
    assert [len(batch) for batch in data.random_batches(Rows(3), 8, 2, collate, generator())] == [3, 3]
