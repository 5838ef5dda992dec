"""CIFAR-10 (a JPEG copy) and the CIFAR ResNets of He et al. 2015, from local folders."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .problem import Problem, Rows, Sizes, cached, data_root

COLUMNS = ("pixel_values", "labels")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut has no parameters: where the size changes it is subsampled and zero-padded."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images. forward: pixel_values [b, 3, 32, 32], labels [b] -> dict of loss and logits.

    Where all but the last block stands still, its `activations` can be passed instead of pixels: [b, 64, 8, 8].
    `group` is not looked at: it is the metric's.
    """

    def __init__(self, depth: int = 20, num_labels: int = 10):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(n, 16, 16)
        self.layer2 = self._layer(n, 16, 32)
        self.layer3 = self._layer(n, 32, 64)
        self.linear = nn.Linear(64, num_labels)

    @staticmethod
    def _layer(n: int, inputs: int, outputs: int) -> nn.Sequential:
        first = Block(inputs, outputs, stride=1 if inputs == outputs else 2)
        return nn.Sequential(first, *[Block(outputs, outputs, 1) for _ in range(n - 1)])

    def trunk(self, pixel_values: Tensor) -> Tensor:
        """[b, 3, 32, 32] -> [b, 64, 8, 8], what the last block is given."""
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(pixel_values)))))
        for block in self.layer3[:-1]:
            x = block(x)
        return x

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, group: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = self.trunk(pixel_values) if pixel_values.shape[1] == 3 else pixel_values
        logits = self.linear(self.layer3[-1](x).mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def pretrained(depth: int = 20) -> CifarResNet:
    model = CifarResNet(depth)
    model.load_state_dict(load_file(data_root() / "resnet_cifar10" / f"resnet{depth}.safetensors"), strict=False)
    return model.eval()


@dataclass
class Images:
    """Decoded images: pixel_values [n, 3, 32, 32] float32 normalised, labels [n]. Its `vars` are columns of `Rows`."""

    pixel_values: Tensor
    labels: Tensor


def decoded(split: str, classes: tuple[int, ...] | None = None) -> Images:
    """Images in units of [0, 1], not normalised yet; of some classes only, if these are given."""
    table = datasets.load_dataset(str(data_root() / "cifar10"), split=split)
    if classes is not None:
        table = table.select(np.flatnonzero(np.isin(table["label"][:], classes)))
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in table["img"]])
    return Images(pixels.permute(0, 3, 1, 2).float() / 255, torch.tensor(table["label"][:]))


def normalised(pixels: Tensor) -> Tensor:
    """[n, 3, h, w] in units of [0, 1] -> as the nets want it."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (pixels - mean) / std


def load(split: str) -> Images:
    images = decoded(split)
    return Images(normalised(images.pixel_values), images.labels)


@torch.no_grad()
def activations(net: CifarResNet, images: Images, batch_size: int = 250) -> Images:
    """What `net` computes in front of its last block, in place of the pixels."""
    return Images(torch.cat([net.trunk(batch) for batch in images.pixel_values.split(batch_size)]), images.labels)


@functools.cache
def pool(depth: int, sizes: Sizes) -> tuple[CifarResNet, dict[str, Tensor], dict[str, Tensor]]:
    """The net, and columns of the train and of the test pool, with activations as `pixel_values`."""
    net = pretrained(depth)

    def make() -> dict[str, Tensor]:
        splits = {"train": f"train[:{sizes.train_pool}]", "test": f"test[:{sizes.test_pool or ''}]"}
        images = {name: activations(net, load(split)) for name, split in splits.items()}
        return {f"{name}.{column}": getattr(i, column) for name, i in images.items() for column in COLUMNS}

    tensors = cached(f"cifar/resnet{depth}-{sizes.train_pool}-{sizes.test_pool}", make)
    return net, *({column: tensors[f"{name}.{column}"] for column in COLUMNS} for name in ("train", "test"))


def cut(
    net: CifarResNet,
    train: dict[str, Tensor],
    test: dict[str, Tensor],
    sizes: Sizes,
    seed: int,
    pools: tuple[str, str] = ("cifar10 train", "cifar10 test"),
) -> Problem:
    """Some of the train pool to train on, and all of the test pool: to observe on, to select on, and to report on."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(train["labels"]))[: sizes.train]
    order = generator.permutation(len(test["labels"]))
    parts = np.split(order, [sizes.observation, 2 * sizes.observation])
    measured = (Rows(test, rows, pools[1]) for rows in parts)
    return Problem(Rows(train, chosen, pools[0]), *measured, net, eval_batch=100)


def problem(depth: int, sizes: Sizes, seed: int) -> Problem:
    """The nets have seen the whole train split, so the splits that are measured on come from test."""
    return cut(*pool(depth, sizes), sizes, seed)
