"""The script that fills the cards, on a few images made up here: it runs, and tells all of it."""

import functools
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from benchmarks import cards, cifar, worst_class
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
    monkeypatch.setattr(cards, "make_trainer", functools.partial(worst_class.make_trainer, phi_dim=2))


def test_cards_are_filled(tmp_path):
    assert cards.main(["--seeds", "0", "1", "--max_steps", "2", "--folder", str(tmp_path)]) == 0
    model, learned = (ModelCard.load(tmp_path / f"{cards.NAME}{end}.md") for end in ("", "-value-function"))
    for card in (model, learned):
        assert all(f"| {method.title} " in card.text for method in METHODS.values())
        assert f"- {METHODS['metricopt'].title} - {METHODS['loss_only'].title}: " in card.text
        assert f"user/{cards.NAME}" in card.text
    assert model.data.eval_results
