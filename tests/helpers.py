"""Small models and data for the tests of the trainer."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

NUM_LABELS = 3
ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("METRICOPT_DATA", ROOT.parent / "shared" / "data"))
# Options of an example script that make a run of seconds.
TINY = "--max_steps 4 --metric_call_budget 120 --phi_dim 2 --use_cpu --disable_tqdm True"


def example(name: str) -> ModuleType:
    """A script of `examples/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def save_dataset(folder: Path, splits: dict[str, dict[str, list]], features: dict | None = None) -> str:
    """A local data set: columns by split."""
    folder.mkdir()
    for split, columns in splits.items():
        table = datasets.Dataset.from_dict(columns, features=features and datasets.Features(features))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def config(folder: Path, **changes) -> None:
    """Edit the config.json in `folder`; a name such as a__b is the entry b of the entry a."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    for name, value in changes.items():
        node, *keys = document, *name.split("__")
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
    path.write_text(json.dumps(document))


class Texts(torch.utils.data.Dataset):
    """Random token ids whose label is the most frequent of three tokens: learnable, and metrics differ over phi."""

    def __init__(self, size: int, seed: int = 0, length: int = 8):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(2, 5, (size, length), generator=generator)
        counts = torch.stack([(self.ids == token).sum(1) for token in (2, 3, 4)], dim=1)
        noisy = torch.rand(size, generator=generator) < 0.1
        random_labels = torch.randint(3, (size,), generator=generator)
        self.labels = torch.where(noisy, random_labels, counts.argmax(1))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def tiny_bert(seed: int = 0, **kwargs) -> BertForSequenceClassification:
    """Two layers with dropout, so that a disturbed RNG shows."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=NUM_LABELS,
        **kwargs,
    )
    return BertForSequenceClassification(config)


def load_without_norms(auto_class, monkeypatch) -> None:
    """From here on, what `auto_class` loads has its norm layers taken out."""
    load = auto_class.from_pretrained

    def without_norms(*args, **kwargs):
        model = load(*args, **kwargs)
        for name, module in list(model.named_modules()):
            if "norm" in type(module).__name__.lower():
                model.set_submodule(name, nn.Identity())
        return model

    monkeypatch.setattr(auto_class, "from_pretrained", without_norms)


def worst_class_recall(prediction) -> dict[str, float]:
    predicted, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return {"worst_class_recall": min(float((predicted[labels == c] == c).mean()) for c in np.unique(labels))}


def true_class_probability(prediction) -> float:
    """Mean probability of the right class: moves with every change of phi, as an untrained net's hits do not."""
    probabilities = torch.softmax(torch.as_tensor(prediction.predictions), -1).numpy()
    return float(probabilities[np.arange(len(probabilities)), prediction.label_ids].mean())


class Quadratic(nn.Module):
    """loss = |w - a|^2 / 2 over the batch's targets a; the metric, |w - b|^2, is another one."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dim))
        self.frozen = nn.Parameter(torch.ones(3))

    def forward(self, target: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        loss = ((self.w - target) ** 2).sum(1).mean() / 2 + 0 * self.frozen.sum()
        return {"loss": loss, "logits": self.w.expand(len(target), -1)}


class Targets(torch.utils.data.Dataset):
    def __init__(self, size: int = 64, dim: int = 6, seed: int = 0):
        self.targets = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)) + 1.0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"target": self.targets[i], "labels": torch.zeros(())}


OPTIMUM = np.array([-1.0, 2.0, 0.5, 0.0, -2.0, 1.0])


def distance_to_optimum(prediction) -> float:
    """Smaller is better; smallest at OPTIMUM."""
    return float(((prediction.predictions[0] - OPTIMUM) ** 2).sum())


def without_times(log_history: list[dict]) -> list[dict]:
    """Log entries without wall-clock figures and without the guidance's own scalars."""
    clock = ("runtime", "per_second", "preparation_time", "total_flos")
    return [
        {k: v for k, v in entry.items() if not k.startswith("metricopt/") and not k.endswith(clock)}
        for entry in log_history
    ]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
