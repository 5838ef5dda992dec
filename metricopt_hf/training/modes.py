"""Modes in the metric phase: what moves or is random by itself is switched off; all else stays as in training.

Eval mode is more than that. It also switches gradient checkpointing off, cuDNN refuses to go backward through an RNN in
it, and some models (torchvision's detectors) have no loss in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

MISSING = object()


class Pins:
    """What `model.train()`, whoever calls it, is kept from: waking dropout, drop path and batch statistics.

    Attention modules and others drop by their own mode, without a dropout module, so every module stays in eval mode,
    but for those that must not: RNNs, whose dropout is 0 meanwhile, and layers with gradient checkpointing, which are
    in train mode as far as that needs it.

    The modules are gone through once, when this is made, as `inside` is entered at every micro-batch.

    Args:
        everything: False: only modules of dropout, drop path and batch statistics, for a model whose loss comes out in
            train mode alone.
    """

    def __init__(self, model: nn.Module, everything: bool = True):
        self._modules = list(model.modules())
        # attributes of modules and configs, whatever their class says: (those of the object, name, value inside)
        self._changes: list[tuple[dict[str, Any], str, Any]] = []
        self._pinned: dict[nn.Module, None] = {}  # in order
        self._free: dict[nn.Module, list[nn.Module]] = {}
        for module in self._modules:
            if isinstance(module, nn.RNNBase):
                self._changes.append((vars(module), "dropout", 0.0))
            elif _is_noise(module):
                self._pin(module)
            elif everything:
                if not getattr(module, "gradient_checkpointing", False):
                    self._pin(module)
                elif isinstance(module, GradientCheckpointingLayer):
                    checkpoint = partial(_checkpoint, module, module._gradient_checkpointing_func)
                    self._changes.append((vars(module), "_gradient_checkpointing_func", checkpoint))
                else:
                    self._pin(module)
                    config = getattr(module, "config", None)
                    if getattr(config, "use_cache", False):  # as in train mode: layers would fill it once more
                        self._changes.append((vars(config), "use_cache", False))
        # the pinned ones below are in eval mode already, so that `train` need not go through all of them at every step
        for module in self._pinned:
            self._changes.append((vars(module), "train", partial(_train_rest, module, self._free_below(module))))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """On leaving, modes and all else are what they were."""
        modes = [module.training for module in self._modules]
        before = []
        try:
            for attributes, name, value in self._changes:
                before.append(attributes.get(name, MISSING))
                attributes[name] = value
            yield
        finally:
            for (attributes, name, _), value in reversed(list(zip(self._changes, before, strict=False))):
                if value is MISSING:
                    del attributes[name]
                else:
                    attributes[name] = value
            for module, mode in zip(self._modules, modes, strict=True):
                if module.training != mode:
                    module.training = mode

    def _pin(self, module: nn.Module) -> None:
        """Keep it in eval mode, whoever calls `module.train`."""
        self._pinned[module] = None
        self._changes.append((vars(module), "training", False))

    def _free_below(self, module: nn.Module) -> list[nn.Module]:
        """The topmost modules inside of a pinned one that are not pinned themselves."""
        if module not in self._free:
            self._free[module] = [
                free
                for child in module.children()
                for free in (self._free_below(child) if child in self._pinned else [child])
            ]
        return self._free[module]


def pinned(model: nn.Module, everything: bool = True) -> AbstractContextManager[None]:
    """See `Pins`, where it is for once."""
    return Pins(model, everything).inside()


class Rest:
    """The parameters of a model beside some: what is not tuned.

    They are found once, and asked for by name again whenever they are needed, as wrappers such as FSDP2 replace them.

    Args:
        names: of the parameters that are tuned.
    """

    def __init__(self, model: nn.Module, names: Collection[str]):
        tuned = set(names)
        places = (name.rpartition(".") for name, _ in model.named_parameters() if name not in tuned)
        self._places = [(model.get_submodule(owner)._parameters, part) for owner, _, part in places]
        self._frozen: set[int] = set()  # of the places

    def freeze(self) -> None:
        """From now on they need no gradients."""
        for i, (parameters, part) in enumerate(self._places):
            if parameters[part].requires_grad:
                parameters[part].requires_grad_(False)
                self._frozen.add(i)

    def thaw(self) -> None:
        """Those that `freeze` froze need gradients again; others are left, which a user's callback may have frozen."""
        for parameters, part in (self._places[i] for i in self._frozen):
            parameters[part].requires_grad_(True)
        self._frozen.clear()

    def drop_gradients(self) -> None:
        for parameters, part in self._places:
            parameters[part].grad = None


def _is_noise(module: nn.Module) -> bool:
    """Dropout, drop path, or a norm with batch statistics; the former by name, as every library has its own."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.modules.batchnorm._NormBase) or "drop" in name or "stochasticdepth" in name


def _train_rest(module: nn.Module, free: list[nn.Module], mode: bool = True) -> nn.Module:
    """`module.train`, of a pinned module: what inside of it is `free` changes its mode."""
    for other in free:
        other.train(mode)
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
