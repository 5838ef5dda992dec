"""The text script: classes and numbers, FiLM and LoRA, its tasks, and what it refuses."""

import json

import datasets
import numpy as np
import pytest
import torch
from helpers import DATA, TINY, example, load_without_norms, save_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from metricopt_hf import ConfigurationError, MetricError, PhiError

pytestmark = pytest.mark.slow

WORDS = ["red", "green", "blue", "big", "small"]

for needed in ("tabulate", "matplotlib"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def script():
    return example("text_classification")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A headless encoder of five words."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(folder)
    return str(folder)


def sentences(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(6, 14))) for _ in range(count)]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Is there more red than green? The class column has a name of its own."""
    tables = {}
    for seed, (split, size) in enumerate({"train": 48, "validation": 60, "test": 30}.items()):
        texts = sentences(size, seed)
        tables[split] = {"sentence": texts, "kind": [int(t.count("red") > t.count("green")) for t in texts]}
    features = {"sentence": datasets.Value("string"), "kind": datasets.ClassLabel(names=["less", "more"])}
    return save_dataset(tmp_path_factory.mktemp("data") / "classes", tables, features)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """How much more red is in the first text of a pair than in the second?"""
    first, second = sentences(120, 3), sentences(120, 4)
    label = [float(a.count("red") - b.count("red")) for a, b in zip(first, second, strict=True)]
    table = {"one": first, "two": second, "label": label}
    return save_dataset(tmp_path_factory.mktemp("data") / "numbers", {"train": table})


def test_help_tells_the_options(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in ("--task", "--text_column_names", "--model_name_or_path", "--metric_for_best_model", "--methods"):
        assert option in text


def test_classes_with_film(script, classes, encoder, tmp_path):
    out = tmp_path / "out"
    options = f"{TINY} --dataset_name {classes} --model_name_or_path {encoder} --metric_for_best_model f1 --seeds 1"
    runs = script.main([*options.split(), "--methods", "loss_only", "metricopt", "--output_dir", str(out)])
    names = ["pretrained", "loss only", "MetricOpt"]
    titles = [name + bias for name in names for bias in ("", " + class bias")]
    assert [run.method for run in runs] == titles
    document = json.loads((out / "results.json").read_text())
    assert document["metric"] == "f1" and document["arguments"]["methods"] == ["loss_only", "metricopt"]
    # what is saved is an ordinary model, and scores what was reported of it
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert model.config.id2label == {0: "less", 1: "more"}
    table = datasets.load_dataset(classes, split="test")
    batch = AutoTokenizer.from_pretrained(out)(table["sentence"][:], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits.numpy()
    mine = next(run for run in runs if run.method == "MetricOpt")
    scores = script.compute_metrics(script.EvalPrediction(logits, np.asarray(table["kind"])))
    assert scores["f1"] == pytest.approx(mine.scores["report"])


def test_numbers_with_lora(script, numbers, encoder, tmp_path):
    """A pair of columns, one output, all splits cut from one, no bias per class, a metric that shall be small."""
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    options = f"{TINY} --dataset_name {numbers} --model_name_or_path {encoder} --text_column_names one two --seeds 1 "
    options += f"--eval_split train --metric_for_best_model mse --phi adapter --lora_rank 2 --output_dir {out}"
    runs = script.main([*options.split(), "--methods", "loss_only", "metricopt"])
    assert [run.method for run in runs] == ["pretrained", "loss only", "MetricOpt"]
    assert json.loads((out / "results.json").read_text())["greater_is_better"] is False
    config = peft.PeftConfig.from_pretrained(out)
    assert (config.r, config.base_model_name_or_path) == (2, encoder)
    assert all("encoder.layer.1." in name for name in config.target_modules)


def test_repeated_texts_are_read_once(script):
    table = {"text": ["a", "b", "a", "c"], "other": ["x", "x", "x", "x"], "label": [0, 1, 1, 0]}
    dataset = datasets.Dataset.from_dict(table)
    assert script.read(dataset, script.TextArguments(text_column_names=["text"]))["text"][:] == ["a", "b", "c"]
    pairs = script.read(dataset, script.TextArguments(text_column_names=["text", "other"]))
    assert pairs[0] == {"text": "a", "text_pair": "x", "label": 0} and len(pairs) == 3


def test_metrics_where_they_are_not_defined(script):
    constant = script.compute_metrics(script.EvalPrediction(np.ones((4, 1)), np.arange(4.0)))
    assert constant["spearman"] == constant["pearson"] == 0 and constant["mse"] == pytest.approx(1.5)
    one_class = script.compute_metrics(script.EvalPrediction(np.eye(2)[[0, 0, 0]], np.array([0, 1, 0])))
    assert one_class["matthews_correlation"] == one_class["f1"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("--text_column_names text", ConfigurationError, r"no column 'text'; the columns are sentence, kind"),
        ("--label_column_name fine", ConfigurationError, r"no column 'fine'.*--label_column_name"),
        ("--text_column_names a b c", ConfigurationError, r"3 columns of texts"),
        ("--max_train_samples 0", ConfigurationError, r"train split is empty"),
        ("--metric_for_best_model spearman", MetricError, r"the keys \['matthews_correlation', .* none .* 'spearman'"),
        ("--phi nothing", PhiError, r"'nothing' matches no parameter"),
        ("--methods magic", ConfigurationError, r"no such method; there are loss_only,"),
    ],
)
def test_refusals(script, classes, encoder, tmp_path, options, error, message):
    given = f"{TINY} --dataset_name {classes} --model_name_or_path {encoder} --metric_for_best_model f1 --seeds 1"
    with pytest.raises(error, match=message):
        script.main(f"{given} --output_dir {tmp_path / 'out'} {options}".split())
    assert not (tmp_path / "out" / "results.json").exists()


def test_refuses_labels_that_are_held_back(script, encoder, tmp_path):
    table = {"text": sentences(40, 0), "label": [0, 1] * 20}
    data = save_dataset(
        tmp_path / "held_back", {"train": table, "validation": table, "test": {**table, "label": [-1] * 40}}
    )
    options = f"{TINY} --dataset_name {data} --model_name_or_path {encoder} --metric_for_best_model f1 --seeds 1"
    with pytest.raises(ConfigurationError, match="Example 0 of the report split has the label -1"):
        script.main([*options.split(), "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "The split 'test' of .* is empty"),
        ([-1.0] * 40, "All labels of the report split are -1.0, as where labels are held back"),
        ([0.5, float("nan")] * 20, "Example 1 of the report split has the label nan"),
    ],
)
def test_refuses_an_empty_split_and_numbers_that_are_none(script, encoder, tmp_path, labels, message):
    fine = {"text": sentences(40, 0), "label": [0.0, 1.0] * 20}
    wrong = {"text": sentences(len(labels), 1), "label": labels}
    features = {"text": datasets.Value("string"), "label": datasets.Value("float32")}
    data = save_dataset(tmp_path / "numbers", {"train": fine, "validation": fine, "test": wrong}, features)
    options = f"{TINY} --dataset_name {data} --model_name_or_path {encoder} --metric_for_best_model spearman"
    with pytest.raises(ConfigurationError, match=message):
        script.main([*options.split(), "--output_dir", str(tmp_path / "out")])


def test_refuses_a_model_without_norms(script, classes, encoder, tmp_path, monkeypatch):
    load_without_norms(script.AutoModelForSequenceClassification, monkeypatch)
    options = f"{TINY} --dataset_name {classes} --model_name_or_path {encoder} --metric_for_best_model f1"
    with pytest.raises(PhiError, match=r"no norm layer.*phi="):
        script.main([*options.split(), "--output_dir", str(tmp_path / "out")])


def test_own_data_need_a_metric(script, classes, encoder):
    with pytest.raises(ConfigurationError, match="--metric_for_best_model matthews_correlation or .* --metric"):
        script.main(["--dataset_name", classes, "--model_name_or_path", encoder])


@pytest.mark.parametrize(("task", "metric"), [("cola", "matthews_correlation"), ("stsb", "spearman")])
def test_tasks(script, encoder, tmp_path, task, metric):
    if not (DATA / f"glue_{task}").is_dir():
        pytest.skip(f"needs glue_{task} in ../shared/data beside the project")
    options = f"{TINY} --task {task} --model_name_or_path {encoder} --seeds 1 --methods metricopt"
    options += f" --observation_size 40 --max_train_samples 64 --output_dir {tmp_path / 'out'}"
    runs = script.main(options.split())
    assert [run.method for run in runs if "bias" not in run.method] == ["pretrained", "MetricOpt"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metric"] == metric


def test_without_the_default_data(script, monkeypatch, tmp_path):
    monkeypatch.setenv("METRICOPT_DATA", str(tmp_path))
    with pytest.raises(ConfigurationError, match="The default data set is not here.*glue_cola.*METRICOPT_DATA"):
        script.main([])
