"""The layer that makes a model's logits."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def is_auxiliary(name: str) -> bool:
    """Whether a module belongs to an auxiliary head, which serves the loss only (BEiT, UPerNet, torchvision)."""
    return any(part.startswith("aux") for part in name.split("."))


def output_layer(model: nn.Module, unused: Collection[int] = ()) -> str | None:
    """Name of the layer that makes the logits, if the model ends in one.

    The last linear layer with `config.num_labels` outputs, or such a convolution, as of segmentation, or, as of DETR
    and YOLOS, a linear layer with one more for "no object". Box heads and auxiliary heads are left out. Else timm's
    classifier, else the last layer that has parameters if it is linear or a convolution (a model that ends in a norm is
    an encoder without logits).

    Args:
        unused: ids of parameters; layers that have one of them are left out, as heads of other tasks.
    """
    own = {n: {id(p) for p in m.parameters(recurse=False)} for n, m in model.named_modules() if not is_auxiliary(n)}
    owners = {n: model.get_submodule(n) for n, ids in own.items() if ids and not ids & set(unused)}
    linear = {n: m.out_features for n, m in owners.items() if isinstance(m, nn.Linear) and "box" not in n}
    convolutions = {n: m.out_channels for n, m in owners.items() if isinstance(m, nn.modules.conv._ConvNd)}
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    if num_labels is not None:
        for layers, outputs in ((linear, num_labels), (convolutions, num_labels), (linear, num_labels + 1)):
            if matching := [name for name, size in layers.items() if size == outputs]:
                return matching[-1]
    if callable(getattr(model, "get_classifier", None)):
        classifier = model.get_classifier()
        return next((n for n, m in owners.items() if m is classifier and n in linear | convolutions), None)
    last = next(reversed(owners), None)
    return last if last in linear | convolutions else None
