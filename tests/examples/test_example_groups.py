"""Groups in the example scripts: the demo's scanners, and a column of one's own data."""

import json

import datasets
import numpy as np
import pytest
import torch
from helpers import TINY, example, save_dataset
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTForImageClassification, ViTImageProcessor

from metricopt_hf import ConfigurationError

pytestmark = pytest.mark.slow

for needed in ("tabulate", "matplotlib"):
    pytest.importorskip(needed)

PNG = b"\x89PNG"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = ["red", "green", "blue", "big", "small"]


@pytest.fixture(scope="module")
def images():
    return example("image_classification")


@pytest.fixture(scope="module")
def texts():
    return example("text_classification")


def pixels(dataset):
    return np.stack([np.asarray(image) for image in dataset["image"]])


def stripes(images, dataset):
    """[n] through which scanner each image went, by its stripe."""
    bright = np.stack(
        [(pixels(dataset)[:, rows, cols] == 255).all((1, 2)) for rows, cols in images.SCANNERS.values()], 1
    )
    assert (bright.sum(1) == 1).all()
    return bright.argmax(1)


def test_the_stripe_tells_the_label_in_training_alone_and_no_digit_is_in_two_splits(images):
    splits, first, clean = images.scanned(0)
    assert "group" not in splits.train.column_names and len(first) + len(splits.train) == len(clean) == 797
    assert set(clean["label"]) == set(range(10)) and splits.train.features["label"].names == ["0 to 4", "5 to 9"]
    for dataset in (splits.train, first):
        labels, scanner = np.asarray(dataset["label"]), stripes(images, dataset)
        for label in (0, 1):
            assert np.mean(scanner[labels == label] // 2 == label) == pytest.approx(images.AGREEMENT, abs=0.005)
    for dataset in (splits.observation, splits.selection, splits.report):
        labels, group = np.asarray(dataset["label"]), np.asarray(dataset["group"])
        assert np.array_equal(group, stripes(images, dataset))
        assert len(dataset) in (1332, 1336) and dataset.features["group"].names == list(images.SCANNERS)
        assert all(np.array_equal(labels[group == g], labels[group == 0]) for g in range(4))

    inner = (slice(None), slice(4, -4), slice(4, -4))
    parts = [pixels(dataset)[inner] for dataset in (first, splits.train, *splits.measured.values())]
    digits = [{image.tobytes() for image in part} for part in parts]
    assert [len(part) for part in digits] == [398, 399, 333, 333, 334]
    assert len(set.union(*digits)) == 1797
    assert {image.tobytes() for image in pixels(clean)[inner]} == digits[0] | digits[1]


def test_the_demo_on_a_small_scale(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images, "READING_STEPS", 20)
    out = tmp_path / "out"
    options = f"{TINY} --first_steps 20 --seeds 5 6 --methods loss_only metricopt --output_dir {out}"
    runs = images.main(options.split())
    printed = capsys.readouterr().out
    assert printed.index("Recommendation: ") < printed.index("inside noise")
    titles = ["pretrained", "pretrained + class bias", "loss only", "loss only + class bias", "MetricOpt"]
    assert [run.method for run in runs if run.seed == 5][:5] == titles
    for run in runs:
        assert set(run.by_group) == {0, 1, 2, 3} and min(run.by_group.values()) == run.scores["report"]
    for name in ("groups.png", "metric.png"):
        assert (out / name).read_bytes().startswith(PNG) and name in printed
    assert json.loads((out / "results.json").read_text())["metric"] == "worst_group_accuracy"


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Grey squares under two cameras."""
    tables = {}
    for split, size in {"train": 48, "test": 60}.items():
        labels, camera = np.arange(size) % 3, np.arange(size) // 3 % 2
        pixels = [np.full((8, 8), 40 + 60 * label - 30 * c, np.uint8) for label, c in zip(labels, camera, strict=True)]
        tables[split] = {"image": pixels, "label": labels, "camera": camera, "kind": ["a", "b"] * (size // 2)}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)}
    features |= {"camera": datasets.Value("int64"), "kind": datasets.Value("string")}
    return save_dataset(tmp_path_factory.mktemp("data") / "squares", tables, features)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "vit"
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def test_a_column_of_groups_of_images(images, squares, vit, tmp_path):
    options = f"{TINY} --dataset_name {squares} --model_name_or_path {vit} --seeds 1 --methods loss_only metricopt"
    options += " --first_steps 2"  # the plain Trainer of these would give the model the groups
    options += f" --metric equalized_odds_gap --group_column_name camera --output_dir {tmp_path / 'out'}"
    with pytest.raises(ConfigurationError, match="no column 'nothing'; .* camera, kind.* with --group_column_name"):
        images.main([*options.replace("--group_column_name camera", "--group_column_name nothing").split()])
    with pytest.raises(ConfigurationError, match="equalized_odds_gap compares groups of .* --group_column_name"):
        images.main([*options.replace("--group_column_name camera", "").split()])
    with pytest.raises(ConfigurationError, match=r"'kind', are .*, not whole numbers: encode them first"):
        images.main([*options.replace("--group_column_name camera", "--group_column_name kind").split()])
    runs = images.main(options.split())
    assert json.loads((tmp_path / "out" / "results.json").read_text())["greater_is_better"] is False
    assert all(0 <= run.scores["report"] <= 1 for run in runs)


def test_a_column_of_groups_of_texts(texts, tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=10, **SIZES)).save_pretrained(folder)
    sentences = [" ".join(generator.choice(WORDS, generator.integers(6, 14))) for _ in range(120)]
    table = {
        "sentence": sentences,
        "label": [int(s.count("red") > s.count("green")) for s in sentences],
        "dialect": [int("big" in s) for s in sentences],
    }
    data = save_dataset(tmp_path / "data", {"train": table})
    options = f"{TINY} --dataset_name {data} --model_name_or_path {folder} --eval_split train --seeds 1"
    options += " --metric worst_group_accuracy --group_column_name dialect --methods loss_only metricopt"
    runs = texts.main([*options.split(), "--output_dir", str(tmp_path / "out")])
    mine = next(run for run in runs if run.method == "MetricOpt")
    assert set(mine.by_group) == {0, 1} and min(mine.by_group.values()) == mine.scores["report"]
    assert (tmp_path / "out" / "groups.png").read_bytes().startswith(PNG)
