"""a9a and bank marketing as tensors, and the small MLP that is trained on them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.compose import make_column_transformer
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor, nn

from metricopt_hf import FiLM, PhiSpace, Subset

from .problem import Problem, Rows, Sizes, data_root

LEAK = "duration"  # of the call: known only when its outcome is known
HIDDEN, EPOCHS, BATCH, LEARNING_RATE = 64, 5, 256, 1e-3


class MLP(nn.Module):
    """Two hidden layers with layer norms. forward: features [b, d], labels [b] -> dict of loss and logits [b, 2].

    `group` is not looked at: it is the metric's.
    """

    def __init__(self, inputs: int, hidden: int = HIDDEN):
        super().__init__()
        self.linear1, self.norm1 = nn.Linear(inputs, hidden), nn.LayerNorm(hidden)
        self.linear2, self.norm2 = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, 2)

    def forward(self, features: Tensor, labels: Tensor | None = None, group: Tensor | None = None) -> dict[str, Tensor]:
        x = F.relu(self.norm1(self.linear1(features)))
        logits = self.classifier(F.relu(self.norm2(self.linear2(x))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Linear(nn.Module):
    """Nothing but a linear layer; as `MLP` otherwise."""

    def __init__(self, inputs: int):
        super().__init__()
        self.classifier = nn.Linear(inputs, 2)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(features)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@functools.cache
def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train and test split of "a9a" or "bank_marketing": features [n, d] float32, labels [n]."""
    splits = datasets.load_dataset(str(data_root() / name))
    tables = [splits[split].to_pandas() for split in ("train", "test")]
    if name == "a9a":
        features = [torch.from_numpy(np.stack(table["features"])) for table in tables]
    else:
        tables = [table.drop(columns=LEAK) for table in tables]
        texts = [c for c in tables[0].columns if tables[0][c].dtype.kind not in "iu"]
        numbers = [c for c in tables[0].columns if c not in texts and c != "label"]
        encode = make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore", sparse_output=False), texts), (StandardScaler(), numbers)
        ).fit(tables[0])
        features = [torch.from_numpy(encode.transform(table)).float() for table in tables]
    return tuple(
        {"features": x, "labels": torch.tensor(table["label"].to_numpy())}
        for x, table in zip(features, tables, strict=True)
    )


def pretrain(data: dict[str, Tensor], seed: int, build: Callable[[int], nn.Module] = MLP) -> nn.Module:
    """A model trained by cross-entropy."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = build(data["features"].shape[1])
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(data["labels"])).split(BATCH):
                optimizer.zero_grad()
                model(data["features"][rows], data["labels"][rows])["loss"].backward()
                optimizer.step()
    return model.eval()


def whole(model: nn.Module) -> Subset:
    """All parameters as phi."""
    return Subset(model, "")


@functools.lru_cache(maxsize=1)
def problem(
    name: str,
    sizes: Sizes,
    flipped: float,
    seed: int,
    build: Callable[[int], nn.Module] = MLP,
    phi: Callable[[nn.Module], PhiSpace] = FiLM,
) -> Problem:
    """Observation and selection are cut from the official train split, the report split is the official test split.

    Args:
        flipped: share of the positive training labels that is turned to negative, before the model is trained.
    """
    train, test = thinned(load(name), sizes)
    return cut(name, train, test, sizes.observation, flipped, seed, build, phi)


def thinned(splits: tuple[dict[str, Tensor], ...], sizes: Sizes) -> tuple[dict[str, Tensor], ...]:
    """Train and test split, evenly thinned to the sizes of their pools."""
    return tuple(
        {column: values[:: 1 if size is None else len(values) // size][:size] for column, values in split.items()}
        for split, size in zip(splits, (sizes.train_pool, sizes.test_pool), strict=True)
    )


def cut(
    name: str,
    train: dict[str, Tensor],
    test: dict[str, Tensor],
    observation: int,
    flipped: float,
    seed: int,
    build: Callable[[int], nn.Module] = MLP,
    phi: Callable[[nn.Module], PhiSpace] = FiLM,
    of: np.ndarray | None = None,
) -> Problem:
    """See `problem`.

    Args:
        of: the rows of `train` that there are; None: all of them.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(train["labels"]) if of is None else of)
    observed, selected, rest = np.split(order, [observation, 2 * observation])
    noisy = train["labels"].clone()
    positive = rest[train["labels"][torch.as_tensor(rest)].numpy() == 1]
    noisy[generator.permutation(positive)[: round(flipped * len(positive))]] = 0
    trained = Rows({**train, "labels": noisy}, rest, f"{name} train")
    return Problem(
        trained,
        Rows(train, observed, f"{name} train"),
        Rows(train, selected, f"{name} train"),
        Rows(test, np.arange(len(test["labels"])), f"{name} test"),
        pretrain(next(trained.batches()), seed, build),
        eval_batch=2000,
        phi=phi,
    )
