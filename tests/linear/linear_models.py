"""Models of every kind that can or cannot be linearised, and evaluators of them."""

import numpy as np
import peft
import timm
import torch
from helpers import tiny_bert
from torch import nn
from transformers import BertForTokenClassification

from metricopt_hf.evaluation.data import InOrder
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator
from metricopt_hf.evaluation.ledger import Ledger
from metricopt_hf.evaluation.metric import Metric
from metricopt_hf.linear.cost import DIFFERENCES, ROW_BY_ROW
from metricopt_hf.linear.linearization import arrays
from metricopt_hf.linear.linearizer import Linearizer
from metricopt_hf.phi import FiLM, Subset, adapter

ROWS, BATCH = 22, 8


class MLP(nn.Module):
    def __init__(self, outputs=3, hidden=8):
        super().__init__()
        self.stem, self.norm1, self.mid = nn.Linear(6, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, hidden)
        self.norm2, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, outputs)

    def hidden(self, x):
        return self.norm2(self.mid(torch.relu(self.norm1(self.stem(x)))))

    def forward(self, x):
        return self.head(self.hidden(x))


class Regression(MLP):
    def forward(self, x):
        return super().forward(x)[:, 0]


class Tokens(MLP):
    def forward(self, x):
        return super().forward(x[:, None] + torch.arange(5.0)[:, None])


class Attending(Tokens):
    """Each token attends to all tokens of its row."""

    def forward(self, x):
        h = self.hidden(x[:, None] + torch.arange(5.0)[:, None])
        return self.head(h + 0.1 * torch.softmax(h @ h.mT, -1) @ h)


class InBatch(MLP):
    """Normalises over the batch: a row's outputs depend on the other rows."""

    def forward(self, x):
        h = self.norm1(self.stem(x)) ** 2
        return self.head((h - h.mean(0)) / h.std(0))


class Softly(MLP):
    """Each row attends to all rows of its batch."""

    def forward(self, x):
        h = self.hidden(x)
        return self.head(torch.softmax(h @ h.T, -1) @ h)


class WithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x[:, None].expand(-1, 4, -1))[0][:, -1])


class WithoutGradients(MLP):
    forward = torch.no_grad()(MLP.forward)


class Inference(MLP):
    forward = torch.inference_mode()(MLP.forward)


class Reentrant(MLP):
    """Gradients do not find their way to the norms, and no error says so."""

    def forward(self, x):
        return self.head(torch.utils.checkpoint.checkpoint(self.hidden, x, use_reentrant=True))


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 3)
        )

    def forward(self, x):
        return super().forward(torch.cat([x, x[:, :3]], 1).reshape(-1, 1, 3, 3))


def lora():
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(tiny_bert(), config)


def vectors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 6, generator=generator)
    return [{"x": x[i], "labels": torch.tensor(i % 3)} for i in range(ROWS)]


def texts():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(ROWS):
        ids, mask = torch.randint(2, 8, (9,), generator=generator), torch.ones(9, dtype=torch.long)
        mask[4 + i % 6 :] = 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 3)})
    return rows


def tagged():
    """Texts whose batches differ in length."""
    rows = texts()
    for i, row in enumerate(rows):
        for name in ("input_ids", "attention_mask"):
            row[name] = row[name][: (9, 6, 8)[i // BATCH]]
    return rows


def pictures():
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, 32, 32, generator=generator), "labels": torch.tensor(i % 3)} for i in range(ROWS)]


def accuracy(prediction):
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def evaluator(phi, data=None, predict=None, concat=True, metric=accuracy, max_bytes=1e9, **kwargs):
    model = phi.model

    def plainly(batch):
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
        return BatchOutput(getattr(output, "logits", output), batch["labels"])

    data = vectors() if data is None else data
    return Evaluator(
        phi, predict or plainly, InOrder(data, BATCH, torch.utils.data.default_collate), Metric(metric, "metric"),
        Ledger(), max_bytes, concat, **kwargs,
    )  # fmt: skip


def linearizer(taken, dim=6, seed=0, loss_gradients=None):
    return Linearizer(taken, dim, loss_gradients, torch.Generator().manual_seed(seed))


def leaves(prediction):
    return [leaf for leaf in arrays(prediction) if leaf is not None]


def off(taken, linear, coordinates, size=0.02, columns=None):
    """By how much, relatively, predictions in a random direction differ from what was said of them."""
    z = size * torch.randn(coordinates.dim)
    here, there = linear.centre, linear.at(z)
    with taken.phi.restored():
        taken.phi.write(taken.phi.read() + coordinates.lift(z))
        true = taken.predictions()
    moved = [np.asarray(t, float) - h for t, h in zip(leaves(true), leaves(here), strict=True)]
    said = [np.asarray(t, float) - h for t, h in zip(leaves(there), leaves(here), strict=True)]
    if columns is not None:
        moved, said = ([np.take_along_axis(m[0], columns, 1)] for m in (moved, said))
    norm = np.sqrt(sum((m**2).sum() for m in moved))
    assert norm > 0
    return np.sqrt(sum(((m - s) ** 2).sum() for m, s in zip(moved, said, strict=True))) / norm


def scattered(phi, size=0.1):
    phi.write(phi.read() + size * torch.randn(phi.dim))
    return phi


CASES = {
    "mlp": (MLP, vectors, FiLM, ROW_BY_ROW),
    "one logit": (lambda: MLP(1), vectors, FiLM, ROW_BY_ROW),
    "regression": (Regression, vectors, FiLM, ROW_BY_ROW),
    "all logits": (lambda: MLP(5), vectors, FiLM, ROW_BY_ROW),
    "bert": (tiny_bert, texts, FiLM, ROW_BY_ROW),
    "timm": (lambda: timm.create_model("test_vit", num_classes=3, img_size=32), pictures, FiLM, ROW_BY_ROW),
    "lora": (lora, texts, adapter, ROW_BY_ROW),
    "linear layers": (MLP, vectors, lambda model: Subset(model, "mid|head"), ROW_BY_ROW),
    "convolutions": (Convolutions, vectors, lambda model: Subset(model, r"^0\."), DIFFERENCES),
    "rnn": (WithState, vectors, lambda model: Subset(model, "rnn"), DIFFERENCES),
    "behind an rnn": (WithState, vectors, lambda model: Subset(model, "head"), ROW_BY_ROW),
    "batch-wise": (InBatch, vectors, lambda model: FiLM(model, layers="norm1"), DIFFERENCES),
    "rows attend to rows": (Softly, vectors, FiLM, DIFFERENCES),
    "reentrant": (Reentrant, vectors, FiLM, DIFFERENCES),
    "without gradients": (WithoutGradients, vectors, FiLM, DIFFERENCES),
    "inference": (Inference, vectors, FiLM, DIFFERENCES),
    "tokens": (Tokens, vectors, FiLM, ROW_BY_ROW),
    "tokens, linear layers": (Tokens, vectors, lambda model: Subset(model, "mid|head"), ROW_BY_ROW),
    "tokens of a bert": (lambda: BertForTokenClassification(tiny_bert().config), tagged, FiLM, ROW_BY_ROW),
    "tokens attend to tokens": (Attending, vectors, FiLM, DIFFERENCES),
}


def case(name):
    make, data, space, way = CASES[name]
    torch.manual_seed(0)
    phi = scattered(space(make().eval()))
    return evaluator(phi, data()), way
