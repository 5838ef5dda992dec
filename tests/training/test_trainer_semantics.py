"""The guidance gives a metric what Trainer gives it: losses, batches, rows by place."""

import datasets
import numpy as np
import pytest
import torch
from helpers import Texts, tiny_bert
from torch import nn
from transformers.trainer_pt_utils import EvalLoopContainer

from metricopt_hf import MetricOptConfig, MetricOptTrainer
from metricopt_hf.evaluation import data

ROWS = 83  # no multiple of the batch size


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make(folder, compute_metrics=accuracy, model=None, evaluation=None, cls=MetricOptTrainer, train=None, **kwargs):
    names = (
        "post_process_function", "eval_examples", "observation_dataset", "selection_dataset", "data_collator"
    )
    given = {name: kwargs.pop(name) for name in names if name in kwargs}
    arguments = {
        "max_steps": 4,
        "metric_steps": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "metric_call_budget": 40,
        "phi_dim": 4,
        "guide": "pairs",
        "metric_for_best_model": "accuracy",
        "greater_is_better": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(
        tiny_bert() if model is None else model,
        MetricOptConfig(str(folder), **{**arguments, **kwargs}),
        train_dataset=Texts(160, seed=1) if train is None else train,
        eval_dataset=Texts(ROWS, seed=2) if evaluation is None else evaluation,
        compute_metrics=compute_metrics,
        **given,
    )


# ---- losses


class Points(nn.Module):
    """Its input is called neither input_ids nor anything else that Trainer knows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, points, labels=None):
        logits = self.body(points)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def points(size, seed):
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
    return [{"points": row, "labels": (row.sum() > 0).long()} for row in x]


@pytest.mark.parametrize(("observe", "seen"), [("scores", {41, 20}), ("predictions", {41, 20})])
def test_losses_come_for_every_row_whatever_the_inputs_are_called(tmp_path, observe, seen):
    sizes = set()

    def with_losses(prediction):
        sizes.add((len(prediction.label_ids), len(prediction.losses)))
        return {**accuracy(prediction), "nll": float(prediction.losses.mean())}

    model, sets = Points(), {"train": points(160, 0), "evaluation": points(ROWS, 1)}
    trainer = make(tmp_path, with_losses, model, include_for_metrics=["loss"], observe=observe, **sets)
    trainer.train()
    assert trainer.result.failed_calls == 0 and trainer.result.observed == observe
    assert sizes == {(rows, rows) for rows in seen}


# ---- batches


@pytest.mark.parametrize("steps", [None, 2])
def test_predictions_go_to_the_cpu_as_often_as_asked(tmp_path, steps, monkeypatch):
    held, moved = [], []
    add, move = EvalLoopContainer.add, EvalLoopContainer.to_cpu_and_numpy

    def counted(self, tensors):
        add(self, tensors)
        held.append(len(self.tensors))

    monkeypatch.setattr(EvalLoopContainer, "add", counted)
    monkeypatch.setattr(EvalLoopContainer, "to_cpu_and_numpy", lambda self: (moved.append(self), move(self))[1])
    trainer = make(tmp_path, eval_accumulation_steps=steps)
    trainer.train()
    assert max(held) == (41 if steps is None else 16)
    assert trainer.result.failed_calls == 0


# ---- iterables


class Stream(torch.utils.data.IterableDataset):
    """Can be iterated and has a length, and that is all."""

    def __init__(self, size, seed):
        self.rows = Texts(size, seed)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return (self.rows[i] for i in range(len(self.rows)))


def test_an_iterable_with_a_length_is_cut_too(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((len(prediction.label_ids), tuple(prediction.label_ids.tolist())))
        return accuracy(prediction)

    stream = Stream(ROWS, 2)
    trainer = make(tmp_path, compute_metrics, evaluation=stream)
    trainer.train()
    assert trainer.result.failed_calls == 0 and {rows for rows, _ in seen} == {41, 20}
    parts = [trainer.selection_dataset, trainer.observation_dataset]
    where = [data.places(part).tolist() for part in parts]
    assert len(set(sum(where, []))) == 82 and all(w == sorted(w) for w in where)
    for part, rows in zip(parts, where, strict=True):
        assert [int(row["labels"]) for row in part] == stream.rows.labels[rows].tolist()
    assert len(trainer.evaluate()) > 1


# ---- rows by their place


def as_dataset(texts):
    return datasets.Dataset.from_dict({"input_ids": texts.ids.tolist(), "labels": texts.labels.tolist()})


@pytest.mark.parametrize("kind", [lambda texts: texts, as_dataset, lambda texts: Stream(len(texts), 2)])
def test_the_metric_is_given_the_rows_places_on_request(tmp_path, kind, caplog):
    texts = Texts(ROWS, seed=2)
    seen = []

    def compute_metrics(prediction):
        seen.append(set(prediction.indices.tolist()))
        assert texts.labels[prediction.indices].tolist() == prediction.label_ids.tolist()
        return accuracy(prediction)

    trainer = make(tmp_path, compute_metrics, evaluation=kind(texts), include_for_metrics=["indices"])
    trainer.train()
    assert trainer.result.failed_calls == 0 and len(trainer.result.trajectory) > 0
    assert len({frozenset(rows) for rows in seen}) == 2  # and the selection set; never a part of either
    del seen[:]
    trainer.evaluate()
    assert seen == [set(range(ROWS))] and "look rows up by their place" not in caplog.text


def test_of_sets_given_the_places_are_those_in_them(tmp_path):
    sets = {17: Texts(17, seed=3), 18: Texts(18, seed=4)}

    def compute_metrics(prediction):
        rows = len(prediction.label_ids)
        given = sets.get(rows, sets[17])
        assert given.labels[prediction.indices].tolist() == prediction.label_ids.tolist()
        return accuracy(prediction)

    trainer = make(
        tmp_path, compute_metrics, include_for_metrics=["indices"],
        observation_dataset=sets[17], selection_dataset=sets[18],
    )  # fmt: skip
    trainer.train()
    assert trainer.result.failed_calls == 0


WEIGHTS = 1 + 4 * (np.arange(ROWS) % 3 == 0)


def by_place(prediction):
    hits = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float((WEIGHTS[: len(hits)] * hits).sum() / WEIGHTS[: len(hits)].sum())}


def first_of_each_class(prediction):
    """Is the same with the rows sorted by their labels."""
    labels = prediction.label_ids
    first = [np.flatnonzero(labels == label)[0] for label in np.unique(labels)]
    return {"accuracy": float(np.abs(prediction.predictions[first]).mean())}


@pytest.mark.parametrize("metric", [by_place, first_of_each_class])
def test_a_metric_that_looks_rows_up_by_place_without_asking_is_warned_of(tmp_path, caplog, metric):
    make(tmp_path, metric, max_steps=2, metric_steps=1).train()
    assert "look rows up by their place in eval_dataset" in caplog.text
    assert 'include_for_metrics=["indices"]' in caplog.text


def test_nobody_else_is_warned(tmp_path, caplog):
    rng = np.random.default_rng(0)
    make(tmp_path, max_steps=2, metric_steps=1).train()
    noisy = lambda p: {"accuracy": accuracy(p)["accuracy"] + 0.1 * rng.random()}  # noqa: E731
    make(tmp_path, noisy, max_steps=2, metric_steps=1).train()
    sets = {"observation_dataset": Texts(17, seed=3), "selection_dataset": Texts(18, seed=4)}
    make(tmp_path, by_place, max_steps=2, metric_steps=1, **sets).train()
    assert "look rows up" not in caplog.text


def test_in_evaluate_too_where_trainer_groups_rows_by_length(tmp_path):
    """The report e5."""
    rows = [{"input_ids": torch.randint(2, 8, (3 + 7 * i % 11,)), "labels": i % 3} for i in range(ROWS)]
    truth = np.array([row["labels"] for row in rows])

    def collate(batch):
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
        return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in batch])}

    seen = []

    def compute_metrics(prediction):
        seen.append(bool((truth[prediction.indices] == prediction.label_ids).all()))
        return accuracy(prediction)

    trainer = make(
        tmp_path, compute_metrics, evaluation=rows, train=rows, train_sampling_strategy="group_by_length",
        include_for_metrics=["indices"], data_collator=collate,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert all(seen) and trainer.args.train_sampling_strategy == "group_by_length"


# ---- rows that are not the first axis of every array


class Joined(nn.Module):
    """Tokens of all rows in one, as of graphs or packed texts: outputs by row, by token, and a number of no row."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, tokens, owner, labels):
        hidden = self.norm(self.table(tokens))
        sums = torch.zeros(len(labels), 16).index_add(0, owner, hidden)
        logits = self.head(sums)
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "router": hidden[:, 0], "balance": hidden.mean(), "logits": logits}


def joined(rows):
    ids = [row["input_ids"] for row in rows]
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(x) for x in ids]))
    return {"tokens": torch.cat(ids), "owner": owner, "labels": torch.tensor([int(row["labels"]) % 2 for row in rows])}


@pytest.mark.parametrize("concat", [True, False])
def test_a_collator_that_joins_rows_and_outputs_that_are_no_rows(tmp_path, concat):
    """Rows are what the data set has (the reports e2 and e6)."""
    seen = set()

    def compute_metrics(prediction):
        labels = prediction.label_ids if concat else np.concatenate(prediction.label_ids)
        parts = [prediction.predictions] if concat else prediction.predictions
        logits = np.concatenate([part[-1] for part in parts])
        seen.add(len(labels))
        return {"accuracy": float((logits.argmax(-1) == labels).mean())}

    trainer = make(
        tmp_path, compute_metrics, Joined(), data_collator=joined, eval_do_concat_batches=concat, max_steps=2,
        metric_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.result.failed_calls == 0 and 41 in seen <= {41, 20}
