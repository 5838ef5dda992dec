"""A classifier of scikit-learn's digits with k-means codes in its middle, tuned under plain Trainer.

A small net is trained; its hidden layer is then replaced by the nearest of a few k-means centres, as if it had to be
stored in some bits. What is in front of the codes can be tuned to that only by a gradient that passes them.
"""

from __future__ import annotations

import copy
import tempfile
from time import process_time

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from examples.comparison.report import mean_and_error, require
from metricopt_hf.experimental import Bridge

from .training import SILENT

HIDDEN, CENTRES = 16, 12
PRETRAINED_STEPS, TUNED_STEPS, BATCH = 150, 300, 64
LEARNING_RATE = 3e-3
TESTED = 800  # of 1,797 examples
METHODS = ("nothing passes the codes", "straight-through", "bridge")


class Codes(nn.Module):
    """The nearest of some centres: [n, d] -> [n, d]."""

    def __init__(self, centres: Tensor):
        super().__init__()
        self.register_buffer("centres", centres)

    def forward(self, x: Tensor) -> Tensor:
        return self.centres[torch.cdist(x, self.centres).argmin(1)]


class StraightThrough(nn.Module):
    """The gradient of the codes is taken to be the identity."""

    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.function(x.detach()) - x.detach())


class Stopped(StraightThrough):
    """Nothing passes: what is in front of the codes stays."""

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.detach())


class Net(nn.Module):
    """Digits [n, 64] -> {"loss", "logits"}, with something in its middle."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, HIDDEN))
        self.middle: nn.Module = nn.Identity()
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.middle(self.front(pixels)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trained(model: Net, rows: list[dict], steps: int, seed: int) -> Net:
    """By plain Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            seed=seed,
            **SILENT,
        )
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def measure(seeds: list[int]) -> list[dict]:
    """Per run "method", "seed", "start" and "accuracy" on test examples, and "seconds" of processor time."""
    digits, measured = load_digits(), []
    pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    for seed in seeds:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        test, train = order[:TESTED], order[TESTED:]
        rows = [{"pixels": pixels[i], "labels": labels[i]} for i in train]

        @torch.no_grad()
        def accuracy(model: Net, test: Tensor = test) -> float:
            return float((model(pixels[test], labels[test])["logits"].argmax(-1) == labels[test]).float().mean())

        torch.manual_seed(seed)
        start = trained(Net(), rows, PRETRAINED_STEPS, seed)
        whole = accuracy(start)
        with torch.no_grad():
            hidden = start.front(pixels[train])
        centres = KMeans(CENTRES, n_init=3, random_state=seed).fit(hidden.numpy()).cluster_centers_
        codes = Codes(torch.tensor(centres, dtype=torch.float32))
        for method in METHODS:
            torch.manual_seed(seed)
            approximator = nn.Sequential(nn.Linear(HIDDEN, 64), nn.Tanh(), nn.Linear(64, HIDDEN))
            model = copy.deepcopy(start)
            model.middle = {METHODS[0]: Stopped, METHODS[1]: StraightThrough}.get(
                method, lambda function, net=approximator: Bridge(function, net)
            )(copy.deepcopy(codes))
            found, begun = {"method": method, "seed": seed, "whole": whole, "start": accuracy(model)}, process_time()
            found["accuracy"] = accuracy(trained(model, rows, TUNED_STEPS, seed))
            measured.append({**found, "seconds": process_time() - begun})
    return measured


def section(measured: list[dict]) -> str:
    """Of the page."""
    cells = []
    for method in METHODS:
        runs = [run for run in measured if run["method"] == method]
        shares = (mean_and_error([run[name] for run in runs]) for name in ("start", "accuracy"))
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        cells.append([method, *(f"{m:.4f} ± {e:.4f}" for m, e in shares), f"{seconds:.1f}"])
    headers = ["method", "accuracy with codes", "tuned", "seconds"]
    made = require("tabulate", "report").tabulate(cells, headers, tablefmt="github", disable_numparse=True)
    whole, error = mean_and_error([run["whole"] for run in measured if run["method"] == METHODS[0]])
    return (
        f"scikit-learn's digits, {TESTED} of them to test on. A net 64-64-{HIDDEN}-10, trained for {PRETRAINED_STEPS} "
        f"steps, has an accuracy of {whole:.4f} ± {error:.4f}. Its hidden layer is replaced by the nearest of "
        f"{CENTRES} k-means centres, and everything but these is tuned for {TUNED_STEPS} steps of plain `Trainer` "
        f"(AdamW, {LEARNING_RATE:g}, batches of {BATCH}). One setting for all, not tuned.\n\n{made}"
    )
