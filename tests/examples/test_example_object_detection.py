"""The object detection script: pretraining, its default at a small scale, other models and data, its refusals."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from detectors import save_boxes, save_detector
from helpers import example, load_without_norms
from transformers import AutoImageProcessor, AutoModelForObjectDetection, EvalPrediction, YolosImageProcessor

from metricopt_hf import ConfigurationError, MetricOptTrainer, PhiError

pytestmark = pytest.mark.slow

TINY = "--max_steps 2 --metric_call_budget 8 --phi_dim 1 --per_device_train_batch_size 2"
TINY += " --use_cpu --disable_tqdm True"
SPLITS = {"train": 6, "validation": 8, "test": 5}

for needed in ("tabulate", "matplotlib", "torchmetrics", "faster_coco_eval"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def script():
    return example("object_detection")


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    return save_boxes(tmp_path_factory.mktemp("data") / "boxes", SPLITS)


@pytest.fixture(scope="module")
def rt_detr(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("models") / "rt_detr")


def test_help_tells_the_options(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in ("--dataset_name", "--objects_column_name", "--pretrain_only", "--metric_for_best_model", "--seeds"):
        assert option in text


def test_default_run_on_a_small_scale(script, rt_detr, tmp_path, monkeypatch, capsys):
    """Pretrained once, taken up again, compared, and what is saved scores what was reported of it."""
    from torchmetrics.detection import MeanAveragePrecision

    save_boxes(tmp_path / "bccd", SPLITS)
    monkeypatch.setenv("METRICOPT_DATA", str(tmp_path))
    monkeypatch.setattr(script, "SMALL_SIZE", {"height": 64, "width": 64})
    monkeypatch.setattr(script, "small_rtdetr", lambda names: AutoModelForObjectDetection.from_pretrained(rt_detr))
    out, pretrained = tmp_path / "out", tmp_path / "out_pretrained"
    options = f"{TINY} --output_dir {out} --pretraining_steps 2 --metric_for_best_model mar_100".split()
    assert script.main([*options, "--pretrain_only"]) == []
    assert 0 <= json.loads((pretrained / "eval_results.json").read_text())["eval_mar_100"] <= 1
    weights = (pretrained / "model.safetensors").read_bytes()
    assert weights != (Path(rt_detr) / "model.safetensors").read_bytes()
    capsys.readouterr()

    runs = script.main([*options, "--seeds", "3"])
    assert (pretrained / "model.safetensors").read_bytes() == weights
    printed = capsys.readouterr().out
    titles = ["pretrained", "loss only", "control: shuffled", "MetricOpt"]
    for title in titles:
        assert re.search(f"^{re.escape(title)}  ", printed, re.MULTILINE), title
    assert "class bias" not in printed
    document = json.loads((out / "results.json").read_text())
    assert [run["method"] for run in document["runs"]] == titles
    assert document["metric"] == "mar_100" and document["greater_is_better"]
    observed = {run["method"]: run["calls"].get("observe", 0) for run in document["runs"]}
    assert observed["loss only"] == 0 < observed["MetricOpt"] <= 8
    assert (out / "metric.png").exists()

    model, processor = AutoModelForObjectDetection.from_pretrained(out).eval(), AutoImageProcessor.from_pretrained(out)
    assert not [name for name, _ in model.named_parameters() if "film" in name]
    coco = MeanAveragePrecision(box_format="xywh", backend="faster_coco_eval")
    for row in datasets.load_dataset(str(tmp_path / "bccd"), split="test"):
        with torch.no_grad():
            output = model(**processor(row["picture"], return_tensors="pt"))
        sizes = [row["picture"].size[::-1]]
        (found,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
        found["boxes"][:, 2:] -= found["boxes"][:, :2]
        target = row["objects"]
        coco.update([found], [{"boxes": torch.tensor(target["bbox"]), "labels": torch.tensor(target["category"])}])
    mine = next(run for run in runs if run.method == "MetricOpt")
    assert mine.scores["report"] == pytest.approx(float(coco.compute()["mar_100"]), abs=1e-4)


def test_images_of_different_size_another_model_and_a_new_head(script, boxes, tmp_path, monkeypatch):
    """YOLOS keeps the shape of an image; of its two classes three are made, in a first phase; and the hub is told."""
    pushed, shapes = [], []
    monkeypatch.setattr(MetricOptTrainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(MetricOptTrainer, "push_to_hub", lambda self, *args, **kwargs: pushed.append(kwargs))
    collate = script.collate
    monkeypatch.setattr(
        script,
        "collate",
        lambda rows, masked: shapes.append({r["pixel_values"].shape for r in rows}) or collate(rows, masked),
    )
    model = AutoModelForObjectDetection.from_pretrained(
        save_detector(tmp_path / "three", "yolos"), num_labels=2, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "two")
    YolosImageProcessor.from_pretrained(tmp_path / "three").save_pretrained(tmp_path / "two")
    options = f"{TINY} --dataset_name {boxes} --model_name_or_path {tmp_path / 'two'} --output_dir {tmp_path / 'out'}"
    options += " --first_steps 2 --seeds 1 --methods metricopt --push_to_hub"
    start, run = script.main(options.split())
    assert (start.method, run.method) == ("pretrained", "MetricOpt")
    assert any(len(batch) > 1 for batch in shapes)
    saved = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert list(saved.config.id2label.values()) == ["disc", "square", "cross"]
    assert pushed[-1]["tasks"] == "object-detection" and "metricopt" in pushed[-1]["tags"]


def test_padding_is_masked_and_labels_stay_apart(script):
    rows = [
        {"pixel_values": torch.ones(3, *shape), "labels": {"boxes": torch.rand(i + 1, 4)}}
        for i, shape in enumerate([(4, 6), (5, 3)])
    ]
    batch = script.collate(rows, masked=True)
    assert batch["pixel_values"].shape == (2, 3, 5, 6)
    assert torch.equal(batch["pixel_values"][:, 0].long(), batch["pixel_mask"])
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [24, 15]
    assert [len(label["boxes"]) for label in batch["labels"]] == [1, 2]
    assert "pixel_mask" not in script.collate(rows, masked=False)


def test_flips_mirror_boxes_with_their_pixels(script, boxes):
    """The brightest pixels lie within the boxes of the brightest class, however an image is mirrored."""
    dataset = script.read(
        datasets.load_dataset(boxes, split="train"), script.DetectionArguments(image_column_name="picture")
    )
    processor = script.RTDetrImageProcessor(size={"height": 64, "width": 64})
    plain, mirrored = script.with_pixels(dataset, processor), script.with_pixels(dataset, processor, flips=True)
    changed = 0
    for i in range(len(dataset)):
        for row in (plain[i], mirrored[i]):
            image, covered = row["pixel_values"].sum(0), torch.zeros(64, 64, dtype=torch.bool)
            for x, y, w, h in (row["labels"]["boxes"] * 64).tolist():
                top, left = max(round(y - h / 2) - 2, 0), max(round(x - w / 2) - 2, 0)
                covered[top : round(y + h / 2) + 2, left : round(x + w / 2) + 2] = True
            assert image[~covered].max() < 0.3 < image[covered].max()
        changed += not torch.equal(plain[i]["pixel_values"], mirrored[i]["pixel_values"])
    assert changed


def test_the_black_box_is_coco_s(script):
    """Perfect boxes score 1 in pixels of the images as they came, and what has no objects is not a number."""
    labels = [
        [{"class_labels": np.array([0, 2]), "boxes": np.array([[0.3, 0.3, 0.2, 0.4], [0.6, 0.5, 0.1, 0.3]], np.float32),
          "orig_size": np.array([480, 640])}],
        [{"class_labels": np.array([1]), "boxes": np.array([[0.5, 0.5, 0.2, 0.2]], np.float32),
          "orig_size": np.array([200, 100])}],
    ]  # fmt: skip
    logits = [np.full((1, 2, 3), -9, np.float32), np.full((1, 1, 3), -9, np.float32)]
    for batch, (label,) in zip(logits, labels, strict=True):
        batch[0, np.arange(len(label["class_labels"])), label["class_labels"]] = 9
    predictions = [(batch, label["boxes"][None]) for batch, (label,) in zip(logits, labels, strict=True)]
    processor = script.RTDetrImageProcessor()
    numbers = script.coco_metrics(EvalPrediction(predictions, labels), processor)
    assert set(numbers) == set(script.COCO_METRICS)
    assert numbers["map"] == numbers["mar_100"] == pytest.approx(1)
    assert numbers["map_small"] == pytest.approx(1) and numbers["map_large"] == pytest.approx(1)  # 20x40, 128x192
    assert np.isnan(numbers["map_medium"])

    predictions[0] = (logits[0][..., ::-1].copy(), predictions[0][1])  # wrong classes in the first image
    assert script.coco_metrics(EvalPrediction(predictions, labels), processor)["map"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image_column_name photo", r"no column 'photo'; the columns are picture, objects.*--image_column_name"),
        ("--image_column_name objects", r"holds .*, not images"),
        ("--objects_column_name things", r"no column 'things'.*--objects_column_name"),
        ("--objects_column_name picture", r"'picture' holds Image.*`bbox`"),
        ("--max_train_samples 0", r"train split is empty"),
        ("--eval_split validation[:0]", r"The split 'validation\[:0\]' of .* is empty"),
        ("--max_eval_samples 1", r"'validation' has 1 examples, too few"),
        ("--metric_for_best_model map_60", r"'map_60' is none of COCO's: .*map_50, map_75"),
        ("--metric accuracy", r"'accuracy' is none of COCO's"),
        ("--eval_do_concat_batches True", r"eval_do_concat_batches=False"),
        ("--pretrain_only", r"leave --model_name_or_path out"),
    ],
)
def test_refusals(script, boxes, rt_detr, tmp_path, options, message):
    given = f"{TINY} --dataset_name {boxes} --model_name_or_path {rt_detr} --output_dir {tmp_path / 'out'} {options}"
    with pytest.raises(ConfigurationError, match=message):
        script.main([*given.split(), "--seeds", "1", "--methods", "metricopt"])
    assert not (tmp_path / "out" / "results.json").exists()


def test_refuses_parameters_that_are_not_there(script, boxes, rt_detr, tmp_path):
    given = f"{TINY} --dataset_name {boxes} --model_name_or_path {rt_detr} --output_dir {tmp_path / 'out'}"
    with pytest.raises(PhiError, match=r"phi='no_such' matches no parameter of RTDetr.*bbox_embed"):
        script.main([*given.split(), "--phi", "no_such"])


def test_refuses_a_model_without_norms(script, boxes, rt_detr, tmp_path, monkeypatch):
    load_without_norms(script.AutoModelForObjectDetection, monkeypatch)
    given = f"{TINY} --dataset_name {boxes} --model_name_or_path {rt_detr} --output_dir {tmp_path / 'out'}"
    with pytest.raises(PhiError, match=r"no norm layer.*phi="):
        script.main(given.split())


def spoil_category(row):
    row["category"][0] = -1


def spoil_box(row):
    row["bbox"][0][2] = 0.0


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"change": spoil_category}, r"Example 0 of the train split has an object of category -1, but .* 0 to 2"),
        ({"change": spoil_box}, r"Example 0 of the train split has the box \[.*whose width or height is not positive"),
        ({"fields": ("box", "category")}, r"'objects' holds .*, not lists `bbox`"),
    ],
)  # fmt: skip
def test_refuses_spoiled_objects(script, rt_detr, tmp_path, spoiled, message):
    data = save_boxes(tmp_path / "spoiled", SPLITS, **spoiled)
    given = f"{TINY} --dataset_name {data} --model_name_or_path {rt_detr} --output_dir {tmp_path / 'out'}"
    with pytest.raises(ConfigurationError, match=message):
        script.main(given.split())


def test_refuses_a_head_that_does_not_fit(script, boxes, rt_detr, tmp_path):
    model = AutoModelForObjectDetection.from_pretrained(rt_detr, num_labels=5, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "five")
    given = f"{TINY} --dataset_name {boxes} --model_name_or_path {tmp_path / 'five'} --output_dir {tmp_path / 'out'}"
    with pytest.raises(ConfigurationError, match="detects 5 classes, the data set has 3.*--first_steps"):
        script.main(given.split())


def test_refuses_to_pretrain_on_what_other_seeds_report_on(script, boxes, tmp_path):
    given = f"{TINY} --dataset_name {boxes} --eval_split train --output_dir {tmp_path / 'out'}"
    with pytest.raises(ConfigurationError, match="once, for all seeds.*--eval_split"):
        script.main(given.split())
