"""Modes in the metric phase: what moves or is random by itself is switched off; all else stays as in training.

Eval mode is more than that. It also switches gradient checkpointing off, cuDNN refuses to go backward through an RNN in
it, and some models (torchvision's detectors) have no loss in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def pinned(model: nn.Module, everything: bool = True) -> Iterator[None]:
    """Inside, `model.train()`, whoever calls it, wakes neither dropout nor drop path nor batch statistics.

    Attention modules and others drop by their own mode, without a dropout module, so every module stays in eval mode,
    but for those that must not: RNNs, whose dropout is 0 meanwhile, and layers with gradient checkpointing, which are
    in train mode as far as that needs it. On leaving, modes and all else are what they were.

    Args:
        everything: False: only modules of dropout, drop path and batch statistics, for a model whose loss comes out in
            train mode alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as put_back:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                put_back.enter_context(_changed(module, "dropout", 0.0))
            elif _is_noise(module):
                _pin(module, put_back)
            elif everything:
                if not getattr(module, "gradient_checkpointing", False):
                    _pin(module, put_back)
                elif isinstance(module, GradientCheckpointingLayer):
                    checkpoint = partial(_checkpoint, module, module._gradient_checkpointing_func)
                    put_back.enter_context(_changed(module, "_gradient_checkpointing_func", checkpoint))
                else:
                    _pin(module, put_back)
                    config = getattr(module, "config", None)
                    if getattr(config, "use_cache", False):  # as in train mode: layers would fill it once more
                        put_back.enter_context(_changed(config, "use_cache", False))
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _is_noise(module: nn.Module) -> bool:
    """Dropout, drop path, or a norm with batch statistics; the former by name, as every library has its own."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.modules.batchnorm._NormBase) or "drop" in name or "stochasticdepth" in name


def _pin(module: nn.Module, put_back: ExitStack) -> None:
    """Let `module.train` go on to its children and leave it in eval mode."""
    put_back.enter_context(_changed(module, "train", partial(_train_children, module)))
    module.training = False


def _train_children(module: nn.Module, mode: bool = True) -> nn.Module:
    module.training = False
    for child in module.children():
        child.train(mode)
    return module


def _checkpoint(layer: nn.Module, checkpoint: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Checkpointing asks for train mode, and then what `layer` computes shall see it in eval mode."""
    return checkpoint(partial(_in_eval_mode, layer, function), *args, **kwargs)


def _in_eval_mode(layer: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    before, layer.training = layer.training, False
    try:
        return function(*args, **kwargs)
    finally:
        layer.training = before


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute is `value`, on the object itself, whatever its class says."""
    missing = object()
    before = vars(owner).get(name, missing)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is missing:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before
