"""The scripts that measure what sharing gives, on a few images made up here: they run, and tell all of it."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from benchmarks import cards, cifar, warm_start, worst_class
from comparison.methods import METHODS

pytestmark = pytest.mark.slow


def images(split):
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.arange(200) % 10
    return cifar.Images(torch.randn(200, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1) / 5, labels)


def net(depth):
    """Untrained, but it does not say the same of all images."""
    torch.manual_seed(0)
    made = cifar.CifarResNet(depth).eval()
    with torch.no_grad():
        made.linear.bias -= made(images("test").pixel_values)["logits"].mean(0)
    return made


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    monkeypatch.setenv("METRICOPT_DATA", str(tmp_path))
    monkeypatch.setattr(cifar, "load", images)
    monkeypatch.setattr(cifar, "pretrained", net)
    monkeypatch.setattr(cards, "SIZES", replace(cards.SIZES, observation=50))
    monkeypatch.setattr(worst_class, "METRIC", "misclassification")  # of an untrained net no class is always missed
    for script in (cards, warm_start):
        monkeypatch.setattr(script, "make_trainer", functools.partial(worst_class.make_trainer, phi_dim=2))
    monkeypatch.setattr(warm_start, "OBSERVED", 50)
    monkeypatch.setattr(warm_start, "FIRST_SELECTED", 30)


def test_cards_are_filled(tmp_path):
    assert cards.main(["--seeds", "0", "1", "--max_steps", "11", "--folder", str(tmp_path)]) == 0
    model, learned = (ModelCard.load(tmp_path / f"{cards.NAME}{end}.md") for end in ("", "-value-function"))
    for card in (model, learned):
        assert all(f"| {method.title} " in card.text for method in METHODS.values())
        assert f"- {METHODS['metricopt'].title} - {METHODS['loss_only'].title}: " in card.text
        assert card.data.eval_results and f"user/{cards.NAME}" in card.text


def test_warm_is_compared_with_cold(capsys, tmp_path):
    results = tmp_path / "results.json"
    assert warm_start.main(["--seeds", "0", "1", "--max_steps", "11", "--results", str(results)]) == 0
    printed = capsys.readouterr().out
    calls = [line.split()[0] for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert calls == ["0", "16", "32", "48", "64", "80"]
    assert "report split, at end" in printed and "2 seeds" in printed
    runs = json.loads(results.read_text())["runs"]
    assert [run["method"] for run in runs] == ["cold", "warm"] * 2
    assert all([row["calls"] for row in run["details"]["curve"][:2]] == [8, 16] for run in runs)
    # whether what it predicts in its first round has been learned before
    assert [run["details"]["curve"][0]["rank_correlation"] is not None for run in runs] == [False, True] * 2


def test_two_users_share_no_image(monkeypatch):
    monkeypatch.setattr(warm_start, "OBSERVED", 40)
    first, second = warm_start.two_users(net(20), images("train"), images("test"), seed=0)
    theirs, ours = ([part for _, part in problem.items()] for problem in (first, second))
    seen = {tuple(item["pixel_values"].flatten()[:4].tolist()) for part in theirs for item in part}
    assert not seen & {tuple(item["pixel_values"].flatten()[:4].tolist()) for part in ours for item in part}
    assert all(len(part) for part in (*theirs, *ours))
