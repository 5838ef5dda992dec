"""Dominoes: an automobile or a truck under a digit that tells the label in training, and elsewhere does not.

After Shah et al. 2020 ("The pitfalls of simplicity bias in neural networks") and Kirichenko et al. 2023 ("Last layer
re-training is sufficient for robustness to spurious correlations", DFR). The digit, 0 or 1 of scikit-learn's, enlarged
to 32 x 32, stands above the vehicle. It agrees with the label in 95 % of the training images and in 50 % of those that
are measured on.

The ResNet-20 that is pretrained on CIFAR-10's train split is trained on dominoes for three epochs: on one half of
train's vehicles. The task trains phi on the other half. What is measured on are vehicles of the test split, which the
net has never seen, under digits that no training image has.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from . import cifar, scores
from .problem import Problem, Sizes, Task, cached

VEHICLES = (1, 9)  # automobile and truck: labels 0 and 1
AGREEMENT = {"train": 0.95, "test": 0.5}
EPOCHS, BATCH, LEARNING_RATE = 3, 64, 3e-4


def digits(part: str) -> list[Tensor]:
    """[n, 32, 32] in units of [0, 1] of every 0, and of every 1; of "train" every second one, of "test" the others."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, (32, 32), mode="bilinear")[:, 0]
    offset = list(AGREEMENT).index(part)
    return [images[np.flatnonzero(found.target == digit)[offset::2]] for digit in (0, 1)]


def dominoes(vehicles: Tensor, labels: Tensor, part: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Each vehicle under a digit of its own.

    Args:
        vehicles: [n, 3, 32, 32] in units of [0, 1].
        labels: [n] 0 or 1.
        part: "train" or "test": how often the digit is the label, and of which digits it is.

    Returns:
        [n, 3, 64, 32] in units of [0, 1], and the digits [n].
    """
    generator = torch.Generator().manual_seed(seed)
    shown = labels.clone()
    for label in (0, 1):  # the share is exact in each label
        rows = torch.as_tensor(np.flatnonzero(labels == label))
        rows = rows[torch.randperm(len(rows), generator=generator)]
        others = rows[: round((1 - AGREEMENT[part]) * len(rows))]
        shown[others] = 1 - label
    images = torch.empty(len(labels), 32, 32)
    for digit, drawings in enumerate(digits(part)):
        rows = torch.as_tensor(np.flatnonzero(shown == digit))
        images[rows] = drawings[torch.randint(len(drawings), (len(rows),), generator=generator)]
    return torch.cat([images[:, None].expand(-1, 3, -1, -1), vehicles], dim=2), shown


def _made(split: str, part: str) -> dict[str, Tensor]:
    """Of a split of CIFAR-10 the dominoes, normalised, with labels and digits."""
    images = cifar.decoded(split, VEHICLES)
    labels = (images.labels == VEHICLES[1]).long()
    pixels, shown = dominoes(images.pixel_values, labels, part)
    return {"pixel_values": cifar.normalised(pixels), "labels": labels, "group": shown}


def _train(data: dict[str, Tensor]) -> cifar.CifarResNet:
    """The pretrained net with a new output layer, all of it trained by cross-entropy; in eval mode."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = cifar.pretrained()
        net.linear = nn.Linear(net.linear.in_features, len(VEHICLES))
        optimizer = torch.optim.Adam(net.train().parameters(), LEARNING_RATE)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(data["labels"])).split(BATCH):
                optimizer.zero_grad()
                net(data["pixel_values"][rows], data["labels"][rows])["loss"].backward()
                optimizer.step()
    return net.eval()


@functools.cache
def _pools(sizes: Sizes) -> tuple[cifar.CifarResNet, dict[str, Tensor], dict[str, Tensor]]:
    """The net, and columns of what it is not trained on: of train (without the digits), and of test."""

    def make() -> dict[str, Tensor]:
        train = _made(f"train[:{sizes.train_pool or ''}]", "train")
        test = _made(f"test[:{sizes.test_pool or ''}]", "test")
        half = len(train["labels"]) // 2
        net = _train({name: column[:half] for name, column in train.items()})
        parts = {"train": {name: column[half:] for name, column in train.items()}, "test": test}
        tensors = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
        for name, columns in parts.items():
            made = cifar.activations(net, cifar.Images(columns["pixel_values"], columns["labels"]))
            tensors |= {f"{name}.pixel_values": made.pixel_values, f"{name}.labels": made.labels}
        return tensors | {"test.group": test["group"]}

    trained = f"{EPOCHS}x{BATCH}x{LEARNING_RATE}"  # another start, another file
    tensors = cached(f"dominoes/resnet20-{trained}-{sizes.train_pool}-{sizes.test_pool}", make)
    net = cifar.CifarResNet(20, len(VEHICLES)).eval()

    def of(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    net.load_state_dict(of("model."))
    return net, of("train."), of("test.")


def problem(sizes: Sizes, seed: int) -> Problem:
    return cifar.cut(*_pools(sizes), sizes, seed, tuple(f"dominoes, {part}" for part in AGREEMENT))


SIZES, SMOKE = Sizes(None, 4_000, None, 500), Sizes(600, 40, 600, 30)


def task(smoke: bool) -> Task:
    return Task(
        "dominoes",
        "Dominoes (automobile or truck under a digit), ResNet-20",
        scores.worst_group_accuracy,
        "worst-group accuracy",
        True,
        False,
        "binary",
        functools.partial(problem, SMOKE if smoke else SIZES),
        note="Groups: each label under each digit. The digit agrees with the label in 95 % of the training images, in "
        "50 % of the others. The net was pretrained on CIFAR-10's train split and then trained on dominoes made of one "
        "half of its vehicles; the training split is of the other half. Observation, selection and report are vehicles "
        "of the test split, which it has not seen, under digits that are in no training image.",
        kind="beyond threshold",
        why="The net decides by the digit; the groups that suffer are one of each label, so a bias helps one at the "
        "other's expense.",
        groups="label and group",
    )
