"""What a trainer keeps is as before behind a pass of the guidance; its data sets are not looked through for that."""

from types import SimpleNamespace

import torch

from metricopt_hf.training import subclasses


def test_numbers_tensors_and_nested_collections_are_put_back():
    losses, total = [{"loss": [1.0]}], torch.ones(2)
    trainer = SimpleNamespace(losses=losses, total=total, seen=3)
    with subclasses.bookkeeping_kept(trainer):
        losses[0]["loss"].append(2.0)
        losses.append("more")
        total += 1
        trainer.seen = 4
    assert trainer.losses is losses == [{"loss": [1.0]}] and trainer.seen == 3
    assert trainer.total is total and total.tolist() == [1, 1]


def test_data_sets_that_are_lists_are_not_copied(monkeypatch):
    """A copy of all rows for each batch that is predicted took two thirds of a run."""
    looked_through = []
    monkeypatch.setattr(subclasses, "undo_of", lambda collection: looked_through.append(collection) or (lambda: None))
    rows = [{"x": 1}]
    trainer = SimpleNamespace(train_dataset=rows, eval_dataset={"a": rows}, eval_examples=rows, losses=[1.0])
    with subclasses.bookkeeping_kept(trainer):
        pass
    assert looked_through == [[1.0]]
