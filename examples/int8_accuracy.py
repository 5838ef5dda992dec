#!/usr/bin/env python
"""Fine-tune a classifier for its accuracy behind an export: int8 weights in ONNX Runtime.

    pip install "metricopt_hf[onnx]"
    python examples/int8_accuracy.py
    python examples/int8_accuracy.py --max_steps 20 --metric_steps 20 --metric_call_budget 200

The metric is a `ModelMetric`: it is given a copy of the model at each point of phi, exports it, quantises the export,
runs that on the data set, and answers the accuracy. No formula of it is known, and no gradient passes through it. The
data are the digits that come with scikit-learn, the model is a small MLP, and the whole takes less than a minute.

What is scored by a program of its own takes a command instead of a function, in any script and in the other examples:

    --metric_command "python score.py {model} {split}" --metric_for_best_model my_score --greater_is_better True
"""

import logging
import os
import sys
import warnings
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from metricopt_hf import MetricOptConfig, MetricOptTrainer, ModelMetric

DEFAULTS = {
    "output_dir": "out/int8_accuracy",
    "max_steps": 12,
    "metric_steps": 12,  # all of them: the model is trained already
    "metric_call_budget": 96,
    "per_device_train_batch_size": 32,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
FIRST_STEPS, HIDDEN = 60, 24  # few, so that there is something left to learn


class Digits(torch.utils.data.Dataset):
    """Some of scikit-learn's 1,797 digits: `features` [n, 64] in units of [0, 1], `labels` [n]."""

    def __init__(self, rows: np.ndarray):
        digits = load_digits()
        self.features = torch.as_tensor(digits.data[rows] / 16, dtype=torch.float32)
        self.labels = torch.as_tensor(digits.target[rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[i], "labels": self.labels[i]}


class MLP(nn.Module):
    """forward: features [b, 64], labels [b] -> dict of loss and logits [b, 10]."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 10)

    def forward(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.last(F.relu(self.norm(self.first(features))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@contextmanager
def quiet():
    """Inside, the exporter's advice is not repeated at each call."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def int8_predictions(model: nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The logits [n, classes] of `model` with int8 weights in ONNX Runtime, on the CPU.

    Args:
        inputs: name -> [n, ...], of `forward`.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    tensors = {name: torch.as_tensor(column) for name, column in inputs.items()}
    with TemporaryDirectory() as folder, quiet():
        exported, quantised = (os.path.join(folder, name) for name in ("float.onnx", "int8.onnx"))
        torch.onnx.export(
            model.cpu(), (), exported, kwargs=tensors, input_names=list(inputs), output_names=["logits"], dynamo=False
        )
        quantize_dynamic(exported, quantised, weight_type=QuantType.QInt8)
        session = onnxruntime.InferenceSession(quantised, providers=["CPUExecutionProvider"])
        return session.run(["logits"], inputs)[0]


def int8_accuracy(model: nn.Module, rows: Digits) -> float:
    predicted = int8_predictions(model, {"features": rows.features.numpy()}).argmax(-1)
    return float((predicted == rows.labels.numpy()).mean())


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser(MetricOptConfig, description=__doc__)
    parser.set_defaults(**DEFAULTS)
    (args,) = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    order = np.random.default_rng(args.seed).permutation(1797)
    train, observation, selection, report = (Digits(rows) for rows in np.split(order, [600, 1000, 1400]))
    model = MLP()
    plain = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": args.disable_tqdm}
    first = TrainingArguments(args.output_dir, max_steps=FIRST_STEPS, **plain)
    Trainer(model, first, train_dataset=train).train()

    trainer = MetricOptTrainer(
        model,
        args,
        train_dataset=train,
        observation_dataset=observation,
        selection_dataset=selection,
        metric=ModelMetric(int8_accuracy, "int8_accuracy"),
    )
    before = trainer.evaluate(report, metric_key_prefix="before")
    trainer.train()
    after = trainer.evaluate(report, metric_key_prefix="after")
    scores = {"before": before["before_int8_accuracy"], "after": after["after_int8_accuracy"]}
    print(
        f"accuracy in int8 on the report split: {scores['before']:.3f} before, {scores['after']:.3f} after; "
        f"{trainer.ledger.calls['observe']} calls to observe, {trainer.ledger.calls['select']} to select"
    )
    return scores


if __name__ == "__main__":
    main(sys.argv[1:])
