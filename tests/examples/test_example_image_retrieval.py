"""The retrieval script: disjoint groups, batches with pairs, its rivals, and what it refuses."""

import json
import re

import datasets
import evaluate
import numpy as np
import pytest
import torch
from helpers import DATA, TINY, example, save_dataset
from transformers import AutoModelForImageClassification, TimmWrapperConfig

from comparison.images import new_model
from metricopt_hf import ConfigurationError, PhiError
from metricopt_hf.metrics import path

pytestmark = pytest.mark.slow

for needed in ("tabulate", "matplotlib", "pytorch_metric_learning"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def script():
    return example("image_retrieval")


def save_images(folder, labels, **more) -> str:
    """Noisy squares: images of a class are alike."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 256, (max(labels) + 1, 16, 16))
    images = [(0.7 * patterns[label] + 0.3 * generator.integers(0, 256, (16, 16))).astype(np.uint8) for label in labels]
    features = {"photo": datasets.Image(), "label": datasets.Value("int64")}
    features.update({name: datasets.Value("int64") for name in more})
    return save_dataset(folder, {"train": {"photo": images, "label": labels, **more}}, features)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight classes of six images, in groups of two classes."""
    labels = np.repeat(np.arange(8), 6).tolist()
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3])[labels].tolist()
    return save_images(tmp_path_factory.mktemp("data") / "patterns", labels, family=groups)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "resnet"
    changes = {"channels": (16, 16, 16, 16), "stem_width": 16}
    new, processor = new_model("resnet10t", 16, changes, num_labels=5)
    new.save_pretrained(folder)
    return str(folder)


def test_help_tells_the_options(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in ("--group_column_name", "--loss", "--specialist", "--embedding_size", "--metric", "--seeds"):
        assert option in text
    assert "\n    python examples/image_retrieval.py\n" in text
    assert re.search(r"\n  specialist +the loss of --specialist", text)


def test_a_run_on_local_images(script, images, model, tmp_path):
    out = tmp_path / "out"
    options = f"{TINY} --dataset_name {images} --model_name_or_path {model} --group_column_name family --seeds 1 "
    options += "--embedding_size 8 --images_per_class 2 --per_device_train_batch_size 4 --phi_learning_rate 0.05 "
    runs = script.main([*options.split(), "--first_steps", "2", "--output_dir", str(out)])
    titles = ["pretrained", "loss only", "specialist: FastAPLoss", "control: shuffled", "MetricOpt"]
    assert [run.method for run in runs] == titles
    assert runs[1].scores != runs[2].scores  # another loss
    assert json.loads((out / "results.json").read_text())["metric"] == "map_at_r"
    # an ordinary model, whose logits are the embedding that was reported of
    kept = AutoModelForImageClassification.from_pretrained(out).eval()
    assert kept.config.num_labels == 8
    splits = script.cut(
        script.read(script.RetrievalArguments(images, group_column_name="family"), None),
        script.RetrievalArguments(),
        None,
        1,
    )
    report = script.with_pixels(splits.report, script.load_model(script.ModelArguments(model))[1])[:]
    with torch.no_grad():
        embedding = kept(pixel_values=report["pixel_values"]).logits
    map_at_r = evaluate.load(path("map_at_r"), keep_in_memory=True)
    score = map_at_r.compute(predictions=embedding.numpy(), references=report["labels"])["map_at_r"]
    assert score == pytest.approx(runs[-1].scores["report"], abs=1e-5)


def test_another_specialist_and_another_metric(script, images, model, tmp_path):
    out = tmp_path / "out"
    options = f"{TINY} --dataset_name {images} --model_name_or_path {model} --metric recall_at_k --seeds 1 "
    options += "--specialist SupConLoss --images_per_class 2 --methods specialist metricopt --first_steps 0"
    runs = script.main([*options.split(), "--output_dir", str(out)])
    assert [run.method for run in runs] == ["pretrained", "specialist: SupConLoss", "MetricOpt"]
    assert 0 < runs[2].calls["observe"] <= 120
    document = json.loads((out / "results.json").read_text())
    assert document["metric"] == "recall_at_k" and document["greater_is_better"]


@pytest.mark.parametrize("group", ["family", None])
def test_no_group_is_in_two_splits(script, images, group):
    arguments = script.RetrievalArguments(images, group_column_name=group)
    splits = script.cut(script.read(arguments, None), arguments, None, 0)
    parts = [set(dataset["group"]) for _, dataset in splits.items()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == (4 if group else 8)
    assert sum(len(dataset) for _, dataset in splits.items()) == 48
    labels = [set(dataset["label"]) for _, dataset in splits.items()]
    assert sum(map(len, labels)) == 8


def test_batches_hold_pairs(script):
    labels = np.array([3] * 5 + [7] * 4)
    dataset = datasets.Dataset.from_dict({"pixel_values": np.zeros((9, 3, 2, 2)), "labels": labels}).with_format(
        "torch"
    )
    items = script.SameClass(dataset, labels, 2, seed=0)
    assert len(items) == 10 * (3 + 2)
    together = [set(items.items[i].tolist()) for i in range(len(items))]
    for rows in together:
        assert len({labels[row] for row in rows}) == 1
    assert len({frozenset(rows) for rows in together}) > 10  # dealt out anew each round
    batch = script.collate([items[0], items[1], dataset[4]])
    assert batch["pixel_values"].shape == (5, 3, 2, 2) and batch["labels"].tolist() == [3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image_column_name picture", r"no column 'picture'; the columns are photo, label, family"),
        ("--image_column_name label", r"holds .*int64.*, not images"),
        ("--label_column_name fine", r"no column 'fine'.*--label_column_name"),
        ("--group_column_name kind", r"no column 'kind'.*--group_column_name"),
        ("--max_train_samples 0", r"train split is empty"),
        ("--loss TripletLoss", r"no loss 'TripletLoss'; it has .*TripletMarginLoss"),
        ("--specialist ArcFaceLoss", r"ArcFaceLoss does not work here: .*missing .* positional arguments"),
        ("--specialist SmoothAPLoss", r"SmoothAPLoss does not work here: All classes must have the same number"),
        ("--images_per_class 1", r"--images_per_class must be at least 2"),
    ],
)
def test_refusals(script, images, model, tmp_path, options, message):
    given = f"{TINY} --dataset_name {images} --model_name_or_path {model} --seeds 1 --output_dir {tmp_path / 'out'}"
    with pytest.raises(ConfigurationError, match=message):
        script.main(f"{given} {options}".split())
    assert not (tmp_path / "out" / "results.json").exists()


def test_refuses_too_few_groups_and_missing_labels(script, model, tmp_path):
    few = save_images(tmp_path / "few", [0, 0, 1, 1, 2, 2])
    options = f"{TINY} --model_name_or_path {model} --seeds 1 --output_dir {tmp_path / 'out'} --dataset_name"
    with pytest.raises(ConfigurationError, match="There are 3 groups of classes; four splits"):
        script.main([*options.split(), few])
    table = {"image": [], "label": []}
    empty = save_dataset(
        tmp_path / "empty", {"train": table}, {"image": datasets.Image(), "label": datasets.Value("int64")}
    )
    with pytest.raises(ConfigurationError, match="The split 'train' of .* is empty"):
        script.main([*options.split(), empty])
    held_back = save_images(tmp_path / "held_back", [0, 0, 1, 1, 2, 2, -1, -1])
    with pytest.raises(ConfigurationError, match="has the label -1"):
        script.main([*options.split(), held_back])


def test_refuses_a_model_without_norms(script, images, tmp_path):
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    config = TimmWrapperConfig(architecture="test_nfnet", num_labels=3, pretrained_cfg=cfg)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "nfnet")
    options = f"{TINY} --dataset_name {images} --model_name_or_path {tmp_path / 'nfnet'} --output_dir {tmp_path / 'o'}"
    with pytest.raises(PhiError, match=r"no norm layer.*phi="):
        script.main(options.split())


def test_omniglot(script, tmp_path):
    if not (DATA / "omniglot_small").is_dir():
        pytest.skip("needs omniglot_small in ../shared/data beside the project")
    options = f"{TINY} --seeds 1 --methods metricopt --observation_size 40 --max_report_samples 40"
    runs = script.main([*options.split(), "--output_dir", str(tmp_path / "out")])
    assert [run.method for run in runs] == ["pretrained", "MetricOpt"]
