"""The image classification script: its default at a small scale, a local data set, and what it refuses."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers import DATA, TINY, example, save_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from comparison import images as images_room
from comparison.study import ModelArguments
from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptTrainer, PhiError, ValueFunction

pytestmark = pytest.mark.slow

CIFAR = DATA / "cifar10"

for needed in ("tabulate", "matplotlib"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def script():
    return example("image_classification")


def save_vit(folder: Path, num_labels: int = 3) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=8, patch_size=4, num_labels=num_labels, **sizes)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def save_images(folder: Path, sizes: dict[str, int], labels=None, names=("image", "label"), feature=None) -> str:
    """A local data set of grey squares, the brighter the higher the label."""
    types = {names[0]: datasets.Image(), names[1]: feature or datasets.Value("int64")}
    tables = {}
    for split, size in sizes.items():
        mine = [int(i) for i in (np.arange(size) % 3 if labels is None else np.resize(labels, size))]
        tables[split] = {names[0]: [np.full((8, 8), 40 + 60 * max(i, 0), np.uint8) for i in mine], names[1]: mine}
    return save_dataset(folder, tables, types)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("data") / "squares", {"train": 48, "test": 60}, names=("img", "label"))


def test_help_tells_the_options(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in ("--dataset_name", "--model_name_or_path", "--metric ", "--methods", "--seeds", "--value_weight"):
        assert option in text


def test_worst_class_recall_of_the_digits_on_a_small_scale(script, tmp_path, capsys):
    out = tmp_path / "out"
    options = f"{TINY} --first_steps 30 --seeds 5 6 --methods loss_only random metricopt --output_dir {out}"
    runs = script.main([*options.split(), "--metric", "worst_class_recall", "--diagnose", "False"])
    titles = ["pretrained", "pretrained + class bias", "loss only", "loss only + class bias", "control: random"]
    titles += ["MetricOpt", "MetricOpt + class bias"]

    printed = capsys.readouterr().out
    for title in titles:
        assert re.search(f"^{re.escape(title)}  ", printed, re.MULTILINE), title
    assert "2 seeds" in printed and "inside noise" in printed and "Recommendation" not in printed
    assert not (out / "groups.png").exists()

    document = json.loads((out / "results.json").read_text())
    stored = document["runs"]
    assert [(run["method"], run["seed"]) for run in stored] == [(t, s) for t in titles for s in (5, 6)]
    assert document["metric"] == "worst_class_recall" and document["greater_is_better"]
    for run in stored:
        assert set(run["scores"]) == {"observation", "selection", "report"}
        guided = run["method"].startswith(("MetricOpt", "control"))
        assert (0 < run["calls"].get("observe", 0) <= 120) == guided
    ours = next(run for run in stored if (run["method"], run["seed"]) == ("MetricOpt", 5))
    assert [row["step"] for row in ours["details"]["curve"]] == [2, 3]  # the last half of so short a run
    assert (out / "metric.png").read_bytes().startswith(b"\x89PNG")

    # what is saved is an ordinary model: it loads without this package, and scores what was reported of it
    assert ValueFunction.from_pretrained(out / "value_function").num_coordinates == 2
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    assert not [name for name, _ in model.named_parameters() if "film" in name]
    report = script.long_tailed(5)[0].report
    pixels = AutoImageProcessor.from_pretrained(out)([i.convert("RGB") for i in report["image"]], return_tensors="pt")
    with torch.no_grad():
        predicted = model(**pixels).logits.argmax(-1).numpy()
    labels = np.asarray(report["label"])
    recall = min((predicted[labels == c] == c).mean() for c in range(10))
    mine = next(run for run in runs if run.method == "MetricOpt" and run.seed == 5)
    assert recall == pytest.approx(mine.scores["report"])


def test_digit_splits_are_disjoint_and_long_tailed(script):
    splits, pretraining = script.long_tailed(0)
    counts = np.bincount(splits.train["label"], minlength=10)
    assert counts.min() >= 1 and counts.max() >= 8 * counts.min()
    assert len(splits.observation) + len(splits.selection) + len(splits.report) + len(pretraining) == 1797
    (again, _), (other, _) = script.long_tailed(0), script.long_tailed(1)
    assert again.report["label"][:] == splits.report["label"][:] != other.report["label"][:]


def test_local_data_and_model(script, images, vit, tmp_path):
    """Columns found by themselves, report cut from the test split, another metric, pushed as Trainer's examples do."""
    options = f"{TINY} --dataset_name {images} --model_name_or_path {vit} --metric g_mean --seeds 1 --methods metricopt"
    (start, _, run, _) = script.main([*options.split(), "--output_dir", str(tmp_path / "out")])
    assert (start.method, run.method) == ("pretrained", "MetricOpt")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "metricopt" in card
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_a_vit_of_timm_and_an_error_to_be_small(script, images, tmp_path):
    torch.manual_seed(0)
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    script.new_model("vit_tiny_patch16_224", 8, small, num_labels=3)[0].save_pretrained(tmp_path / "vit")
    options = f"{TINY} --dataset_name {images} --model_name_or_path {tmp_path / 'vit'} --seeds 1 --methods metricopt"
    runs = script.main([*options.split(), "--metric", "misclassification", "--output_dir", str(tmp_path / "out")])
    assert runs[2].method == "MetricOpt" and runs[2].calls["observe"] > 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["greater_is_better"] is False


def test_a_metric_of_scores(script, images, vit, tmp_path):
    options = f"{TINY} --dataset_name {images} --model_name_or_path {vit} --metric macro_auprc --seeds 1"
    runs = script.main([*options.split(), "--methods", "metricopt", "--output_dir", str(tmp_path / "out")])
    assert 0 < runs[2].calls["observe"] <= 120
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["metric"] == "macro_auprc" and document["greater_is_better"]


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("google/vit-base-patch16-224", "google/vit-base-patch16-224"),
    ],
)
def test_a_model_by_its_name(script, monkeypatch, name, repository):
    asked = []
    for loader in ("AutoModelForImageClassification", "AutoImageProcessor"):
        fake = SimpleNamespace(from_pretrained=lambda name, **kwargs: asked.append((name, kwargs["revision"])))
        monkeypatch.setattr(images_room, loader, fake)
    script.load_model(ModelArguments(name, model_revision="v2"))
    assert asked == [(repository, "v2")] * 2


def test_options_as_json_and_a_first_phase(script, images, vit, tmp_path):
    """A new head is trained first, once per seed, for all methods alike."""
    (tmp_path / "two").mkdir()
    options = {
        "dataset_name": images,
        "model_name_or_path": save_vit(tmp_path / "two" / "labels", num_labels=2),
        "metric_name_or_path": "worst_class_recall",
        "first_steps": 3,
        "max_steps": 3,
        "observation_size": 12,
        "max_train_samples": 24,
        "metric_call_budget": 8,
        "methods": ["loss_only", "metricopt"],
        "seeds": [3],
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "options.json").write_text(json.dumps(options))
    runs = script.main([str(tmp_path / "options.json")])
    guided = next(run for run in runs if run.method == "MetricOpt")
    assert guided.details["curve"][-1]["step"] == 2 and runs[0].seconds > 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.num_labels == 3


def test_push_to_hub_goes_through_trainer(script, images, vit, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(MetricOptTrainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(MetricOptTrainer, "push_to_hub", lambda self, *args, **kwargs: pushed.append((self, kwargs)))
    options = f"{TINY} --dataset_name {images} --model_name_or_path {vit} --seeds 1 2 --methods loss_only metricopt"
    script.main([*options.split(), "--push_to_hub", "--output_dir", str(tmp_path / "out")])
    assert {trainer.args.seed for trainer, _ in pushed} == {1}
    assert {trainer.args.value_weight for trainer, _ in pushed} == {MetricOptConfig.value_weight}
    assert pushed[-1][1]["tasks"] == "image-classification" and pushed[-1][1]["finetuned_from"] == vit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image_column_name picture", r"no column 'picture'; the columns are img, label.*--image_column_name"),
        ("--label_column_name fine", r"no column 'fine'.*--label_column_name"),
        ("--image_column_name label", r"holds .*int64.*, not images"),
        ("--max_train_samples 0", r"train split is empty"),
        ("--max_eval_samples 2", r"'test' has 2 examples, too few"),
        ("--eval_split dev", r"no split 'dev'; it has train, test"),
        ("--report_split test", r"--report_split test is .* selected on"),
        ("--metric no_such_metric", r"'no_such_metric' could not be loaded.*worst_class_recall"),
        ("--resume_from_checkpoint somewhere --seeds 1 2", r"continues one run"),
    ],
)
def test_refusals(script, images, vit, tmp_path, options, message):
    given = f"{TINY} --dataset_name {images} --model_name_or_path {vit} --output_dir {tmp_path / 'out'} {options}"
    with pytest.raises(ConfigurationError, match=message):
        script.main(given.split())
    assert not (tmp_path / "out" / "results.json").exists()


def test_refuses_an_empty_split(script, images, vit, tmp_path):
    given = f"{TINY} --model_name_or_path {vit} --output_dir {tmp_path / 'out'} --dataset_name"
    with pytest.raises(ConfigurationError, match="The split 'test' of .* is empty"):
        script.main([*given.split(), save_images(tmp_path / "empty", {"train": 30, "test": 0})])


def test_refuses_labels_out_of_range(script, vit, tmp_path):
    data = save_images(tmp_path / "held_back", {"train": 30, "test": 30}, labels=[0, 1, -1])
    with pytest.raises(ConfigurationError, match=r"Example 2 of the train split has the label -1, .* 0 to 1"):
        script.main(f"{TINY} --dataset_name {data} --model_name_or_path {vit} --output_dir {tmp_path / 'o'}".split())


def test_refuses_a_head_that_does_not_fit(script, images, tmp_path):
    model = save_vit(tmp_path / "five", num_labels=5)
    with pytest.raises(ConfigurationError, match="tells 5 classes apart, the data set has 3.*--first_steps"):
        script.main(f"{TINY} --dataset_name {images} --model_name_or_path {model} --output_dir {tmp_path}/o".split())


def test_refuses_a_model_without_norms_and_names_another_phi(script, images, tmp_path):
    config = TimmWrapperConfig(
        architecture="test_nfnet",
        num_labels=3,
        pretrained_cfg={"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "nfnet")
    options = f"{TINY} --dataset_name {images} --model_name_or_path {tmp_path / 'nfnet'} --output_dir {tmp_path / 'o'}"
    with pytest.raises(PhiError, match=r"no norm layer.*phi="):
        script.main(options.split())


def test_digits_need_no_options_of_others(script):
    with pytest.raises(ConfigurationError, match="go together"):
        script.main(["--model_name_or_path", "somewhere"])


@pytest.mark.skipif(not CIFAR.is_dir(), reason="needs the CIFAR-10 folder in ../shared/data beside the project")
def test_cifar(script, tmp_path):
    model = save_vit(tmp_path / "vit", num_labels=10)
    options = f"{TINY} --dataset_name {CIFAR} --model_name_or_path {model} --seeds 1 --methods metricopt"
    options += f" --max_train_samples 64 --max_eval_samples 300 --output_dir {tmp_path / 'out'}"
    runs = script.main(options.split())
    assert [run.method for run in runs][:3] == ["pretrained", "pretrained + class bias", "MetricOpt"]


def test_a_command_may_judge_it_by_one_of_its_numbers(script, vit, images, tmp_path):
    score = tmp_path / "score.py"
    score.write_text(
        "import json, sys\n"
        "from safetensors.numpy import load_file\n"
        "bias = load_file(sys.argv[1] + '/model.safetensors')['classifier.bias']\n"
        "assert open(sys.argv[1] + '/preprocessor_config.json') and sys.argv[2] in sys.argv[3:]\n"
        "print(json.dumps({'mean': float(bias.mean()), 'last': float(bias[-1])}))\n"
    )
    splits = "observation selection report"
    options = [
        *f"{TINY} --dataset_name {images} --model_name_or_path {vit} --seeds 5 --methods metricopt".split(),
        *f"--observation_size 20 --eval_split test --max_steps 2 --output_dir {tmp_path / 'out'}".split(),
        *("--metric_command", f"{sys.executable} {score} {{model}} {{split}} {splits}"),
        *"--metric_for_best_model mean --greater_is_better True".split(),
    ]
    runs = script.main(options)
    assert [run.method for run in runs] == ["pretrained", "MetricOpt"]
    assert runs[0].scores["report"] == 0.0 and runs[1].scores.keys() == {"observation", "selection", "report"}
