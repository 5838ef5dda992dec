"""Rows that belong together stay together: in random halves, and in what is cut from `eval_dataset`."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import Texts, tiny_bert
from runs import TEXT_RUN

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptTrainer
from metricopt_hf.evaluation import data
from metricopt_hf.linear.rows import groups_of, half_of


def pairs(size=48):
    texts, order = Texts(size, 2), np.random.default_rng(0).permutation(size)
    columns = {"input_ids": texts.ids.tolist(), "labels": texts.labels.tolist(), "pair": (order // 2).tolist()}
    return Dataset.from_dict(columns)


def trainer_of(folder, seen, **kwargs):
    def metric(prediction):
        labels, pair = prediction.label_ids
        seen.append(np.unique(pair, return_counts=True)[1])
        probabilities = torch.softmax(torch.as_tensor(prediction.predictions), -1).numpy()
        return float(probabilities[np.arange(len(labels)), labels].mean())

    settings = {**TEXT_RUN, "metric_for_best_model": None, "label_names": ["labels", "pair"], "max_steps": 2}
    args = MetricOptConfig(str(folder), **{**settings, "metric_steps": 2})
    data = {"train_dataset": Texts(32), "eval_dataset": pairs()}
    return MetricOptTrainer(tiny_bert(), args, metric=metric, **data, **kwargs)


def test_no_call_of_a_run_or_a_diagnosis_sees_half_of_a_pair(tmp_path):
    seen = []
    trainer = trainer_of(tmp_path, seen, row_groups="pair")
    trainer.diagnose()
    trainer.train()
    assert len({len(counts) for counts in seen}) > 1  # halves, and all rows
    assert all((counts == 2).all() for counts in seen)


def test_without_it_they_are_torn_apart(tmp_path):
    seen = []
    trainer_of(tmp_path, seen).train()
    assert any((counts == 1).any() for counts in seen)


def test_a_column_that_is_no_label_is_refused(tmp_path):
    for name in ("document", "labels"):
        with pytest.raises(ConfigurationError, match=f"row_groups='{name}' must be a label column behind"):
            trainer_of(tmp_path, [], row_groups=name).train()


def test_groups_of_different_sizes_are_cut_into_two_parts_that_share_none():
    document = np.repeat(np.arange(9), [1, 5, 2, 8, 3, 3, 4, 6, 9])
    first, second = data.cut(Dataset.from_dict({"document": document}), None, 0, row_groups="document")
    assert not set(first["document"]) & set(second["document"]) and len(first) + len(second) == len(document)
    assert min(len(first), len(second)) > 10
    with pytest.raises(ConfigurationError, match="too few groups"):
        data.cut(Dataset.from_dict({"document": [0] * 8}), None, 0, row_groups="document")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        data.cut(Texts(8), None, 0, row_groups="document")


def test_a_half_without_groups_is_the_one_that_it_was():
    prediction = type("P", (), {"predictions": np.zeros((9, 2)), "label_ids": None, "inputs": None, "losses": None})
    half = half_of(groups_of(prediction, None, True, None), torch.Generator().manual_seed(3))
    drawn = torch.randperm(9, generator=torch.Generator().manual_seed(3))[:4]
    np.testing.assert_array_equal(half, np.sort(drawn.numpy()))
