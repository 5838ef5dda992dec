"""What a linearisation of a model of ordinary size takes, against an epoch of its training; see `benchmarks.cost`.

Weights and data are random, which changes no time. A few rows are measured, and scaled to the rows of a run; the memory
for batches and for the frozen prefix is scaled down with them, so that as large a share of them finds room.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import process_time

import numpy as np
import timm
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    EvalPrediction,
)

from metricopt_hf import FiLM, Ledger, Metric, MetricOptConfig
from metricopt_hf.evaluation.data import InOrder
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator
from metricopt_hf.linear.linearizer import Linearizer
from metricopt_hf.phase.plan import DEFAULT_STEPS

from .looks import CACHE_BYTES, moved

OBSERVED, TRAINED = 2000, 10_000  # rows of a run's observation set, and of its training set
MEASURED, BATCH = 8, 2  # rows
DIM, LINEARISATIONS = MetricOptConfig.phi_dim, DEFAULT_STEPS  # coordinates and steps of a run, as they are by default
MOST_OF_AN_EPOCH = 0.5  # that all of these should take
PIXELS, TOKENS, VOCABULARY = 224, 128, 30522
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
HEADERS = ["model", "outputs of a row", "phi", "way", "passes", "MiB", "one, s", "an epoch, s", "ten, of an epoch"]


@dataclass(frozen=True)
class Model:
    """A model that is measured.

    Attributes:
        make: -> the model.
        images: whether it takes images, else tokens.
        metric: of its outputs and labels.
    """

    make: Callable[[], nn.Module]
    images: bool
    metric: Callable[[EvalPrediction], float]


def accuracy(prediction: EvalPrediction) -> float:
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def nearest(prediction: EvalPrediction) -> float:
    """The mean distance to the nearest other row: it reads all of an embedding."""
    outputs = np.asarray(prediction.predictions, float)
    distances = np.square(outputs[:, None] - outputs).sum(-1)
    return float(np.sort(distances, 1)[:, 1].mean())


MODELS = {
    **{
        f"{title}, {count:,} classes": Model(partial(timm.create_model, name, num_classes=count), True, accuracy)
        for title, name in (("ResNet-50", "resnet50"), ("ViT-B/16", "vit_base_patch16_224"))
        for count in (10, 100, 1000)
    },
    "a text encoder like MiniLM": Model(lambda: BertForSequenceClassification(BertConfig(**MINILM)), False, accuracy),
    "that, for tokens": Model(lambda: BertForTokenClassification(BertConfig(**MINILM, num_labels=9)), False, accuracy),
    "an embedder like CLIP's ViT-B/32": Model(
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=768, intermediate_size=3072)), True, nearest
    ),
}  # fmt: skip


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    output = model(inputs)
    return output if isinstance(output, Tensor) else output[0]


def seconds_of_an_epoch(model: nn.Module, inputs: Tensor) -> float:
    """Of training steps by AdamW on some inputs, scaled to `TRAINED` rows; the first step is not counted."""
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()
    for _ in range(2):
        start = process_time()
        logits = outputs(model, inputs)
        nn.functional.cross_entropy(logits.flatten(0, -2), logits.flatten(0, -2).argmax(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (process_time() - start) * TRAINED / len(inputs)


def row(name: str) -> list[str]:
    """The table's row of a model."""
    torch.manual_seed(0)
    known = MODELS[name]
    model = known.make()
    shape = (MEASURED, 3, PIXELS, PIXELS) if known.images else (MEASURED, TOKENS)
    inputs = torch.randn(shape) if known.images else torch.randint(VOCABULARY, shape)
    epoch = seconds_of_an_epoch(copy.deepcopy(model), inputs[:BATCH])
    phi = FiLM(model.eval().requires_grad_(False))
    one = outputs(model, inputs[:1]).shape[1:]
    data = [{"x": x, "labels": torch.zeros(one[:-1], dtype=torch.long)} for x in inputs]

    def predict(batch: dict) -> BatchOutput:
        return BatchOutput(outputs(model, batch["x"]), batch["labels"])

    evaluator = Evaluator(
        phi,
        predict,
        InOrder(data, BATCH, torch.utils.data.default_collate),
        Metric(known.metric, name),
        Ledger(),
        CACHE_BYTES * MEASURED / OBSERVED,
    )
    evaluator.freeze(partial(moved, phi))
    made = Linearizer(evaluator, DIM, None, torch.Generator().manual_seed(0))
    prediction = evaluator.predictions()
    space = made.coordinates(prediction)
    made.linearize(space.basis, prediction)  # uses what the coordinates were found from
    start = process_time()
    made.linearize(space.basis, prediction)
    seconds = (process_time() - start) * OBSERVED / MEASURED
    taken = made.cost(prediction, DIM)
    size = taken.nbytes * OBSERVED / MEASURED / 2**20
    times = f"{seconds:,.0f}", f"{epoch:,.0f}", f"{LINEARISATIONS * seconds / epoch:.2f}"
    return [name, " x ".join(map(str, one)), f"{phi.dim:,}", taken.way, f"{taken.passes}", f"{size:,.0f}", *times]
