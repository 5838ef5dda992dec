"""CIFAR-10 under four cameras: training images as they are, and each test image as one of four cameras would give it.

Which camera an image of the test split is under, and its noise, are the same for every seed, so that what the net
computes in front of its last block is computed once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as image

from . import cifar, scores
from .problem import Problem, Sizes, Task, cached

DEPTH = 20
# pixels [n, 3, 32, 32] in units of [0, 1], before they are normalised -> the same
CAMERAS = {
    "as it is": lambda pixels: pixels,
    "noise": lambda pixels: image.gaussian_noise(pixels, sigma=0.06),
    "blur": lambda pixels: image.gaussian_blur(pixels, kernel_size=7, sigma=0.8),
    "contrast": lambda pixels: image.adjust_contrast(pixels, 0.4),
}


def photographed(pixels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[n, 3, 32, 32] in units of [0, 1], each under one camera; and which of `CAMERAS` [n], as often each."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        camera = torch.randperm(len(pixels)) % len(CAMERAS)
        taken = torch.empty_like(pixels)
        for i, camera_of in enumerate(CAMERAS.values()):
            taken[camera == i] = camera_of(pixels[camera == i])
    return taken, camera


def _test_images(sizes: Sizes) -> tuple[cifar.Images, Tensor]:
    images = cifar.decoded(f"test[:{sizes.test_pool or ''}]")
    taken, camera = photographed(images.pixel_values)
    return cifar.Images(cifar.normalised(taken), images.labels), camera


def pixels(sizes: Sizes) -> Tensor:
    """[n, 3, 32, 32] normalised: the images that are measured on."""
    return _test_images(sizes)[0].pixel_values


@functools.cache
def _test_pool(sizes: Sizes) -> dict[str, Tensor]:
    net = cifar.pretrained(DEPTH)

    def make() -> dict[str, Tensor]:
        images, camera = _test_images(sizes)
        made = cifar.activations(net, images)
        return {"pixel_values": made.pixel_values, "labels": made.labels, "group": camera}

    return cached(f"cifar/cameras-resnet{DEPTH}-{sizes.test_pool}", make)


def problem(sizes: Sizes, seed: int) -> Problem:
    net, train, _ = cifar.pool(DEPTH, sizes)
    return cifar.cut(net, train, _test_pool(sizes), sizes, seed, ("cifar10 train", "cifar10 test, four cameras"))


def task(sizes: Sizes) -> Task:
    return Task(
        "cifar_cameras",
        f"CIFAR-10 under four cameras, ResNet-{DEPTH}",
        scores.worst_camera_accuracy,
        "worst-camera accuracy",
        True,
        False,
        "classes",
        functools.partial(problem, sizes),
        note="Each test image is under one camera: as it is; Gaussian noise 0.06; Gaussian blur 0.8; contrast 0.4. "
        "Training images are as they are. The net has seen no image of the test split.",
        kind="beyond threshold",
        why="What a camera does to the features differs from image to image, and a bias per class is one for all.",
        groups="group",
        pixels=functools.partial(pixels, sizes),
    )
