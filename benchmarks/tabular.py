"""a9a and bank marketing as tensors, and the small MLP that is trained on them."""

from __future__ import annotations

import functools

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.compose import make_column_transformer
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor, nn

from metricopt_hf.comparison.splits import data_root

LEAK = "duration"  # of the call: known only when its outcome is known
HIDDEN, EPOCHS, BATCH, LEARNING_RATE = 64, 5, 256, 1e-3


class MLP(nn.Module):
    """Two hidden layers with layer norms. forward: features [b, d], labels [b] -> dict of loss and logits [b, 2]."""

    def __init__(self, inputs: int):
        super().__init__()
        self.linear1, self.norm1 = nn.Linear(inputs, HIDDEN), nn.LayerNorm(HIDDEN)
        self.linear2, self.norm2 = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.classifier = nn.Linear(HIDDEN, 2)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = F.relu(self.norm1(self.linear1(features)))
        logits = self.classifier(F.relu(self.norm2(self.linear2(x))))
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


def pretrain(data: dict[str, Tensor], seed: int) -> MLP:
    """An MLP trained by cross-entropy."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = MLP(data["features"].shape[1])
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(data["labels"])).split(BATCH):
                optimizer.zero_grad()
                model(data["features"][rows], data["labels"][rows])["loss"].backward()
                optimizer.step()
    return model.eval()
