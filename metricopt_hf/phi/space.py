"""PhiSpace: a few parameters of a model as one flat vector phi, read, written and restored in place.

Extension point: a new space says which parameters it is made of (`names`), and, if it inserted something into the
model, how that merges back into plain weights and comes in again (`merge`, `attach`, `state_dict`), also in the model's
own `state_dict()`, which anybody may save.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import PhiError


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 may have sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model: then all ranks take part in every forward pass and every read of phi."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """FSDP2 leaves some parameters whole behind a pass without a backward: what is written to those is lost."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def model_class(model: nn.Module) -> str:
    """The name of a model's class, as it was before FSDP2 made one of its own of it."""
    return type(model).__bases__[1].__name__ if isinstance(model, FSDPModule) else type(model).__name__


def _like(value: Tensor, target: Tensor) -> Tensor:
    """`value` (whole) in the dtype, shape and sharding of `target`."""
    value = value.reshape(target.shape).to(device=target.device, dtype=target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value


class PhiSpace(ABC):
    """The parameters `names` of `model` as one vector phi: [dim] float32 on the model's device.

    Parameters are asked of the modules that hold them at every use, because wrappers such as FSDP2 replace the objects.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._places: tuple[tuple[str, ...], list[tuple[dict[str, Any], str]]] = ((), [])  # of which names, where

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the parameters in `model.named_parameters()`, in phi's order."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        reshard(self.model)
        if (names := self.names) != self._places[0]:
            split = [name.rpartition(".") for name in names]
            self._places = names, [(self.model.get_submodule(owner)._parameters, part) for owner, _, part in split]
        return [parameters[part] for parameters, part in self._places[1]]

    @property
    def inserted(self) -> tuple[str, ...]:
        """The `names` that the space itself put into the model and that `merge` removes."""
        return ()

    @property
    def output_bias(self) -> str | None:
        """Which of `names` is the bias of the layer that makes the logits, where the space knows it."""
        return None

    @property
    def dim(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def description(self) -> dict[str, Any]:
        """What makes two phi comparable, as JSON values: the kind, and [name, shape] of every parameter in order."""
        parameters = [[n, list(p.shape)] for n, p in zip(self.names, self.parameters, strict=True)]
        return {"kind": type(self).__name__, "parameters": parameters}

    def read(self) -> Tensor:
        """phi: [dim] float32, a copy."""
        return torch.cat([whole(p.detach()).reshape(-1).float() for p in self.parameters])

    def write(self, phi: Tensor) -> None:
        """Set phi: [dim]."""
        with torch.no_grad():
            for parameter, value in self._split(phi):
                parameter.copy_(_like(value, parameter))

    def read_grad(self) -> Tensor:
        """The gradient at phi: [dim] float32; a parameter without one counts as zero."""
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)
        return torch.cat([whole(g.detach()).reshape(-1).float() for g in grads])

    def add_grad(self, vector: Tensor) -> None:
        """Add `vector`: [dim] to the gradients, creating those that are None."""
        for parameter, value in self._split(vector):
            value = _like(value, parameter)
            parameter.grad = value.clone() if parameter.grad is None else parameter.grad.add_(value)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """On leaving, whatever happened inside, phi is bit for bit what it was."""
        parameters = self.parameters
        before = [p.detach().clone() for p in parameters]
        try:
            yield
        finally:
            reshard(self.model)
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)

    def idle(self, outputs: Callable[[], Sequence[Tensor]]) -> list[str]:
        """The `names` that change nothing of what `outputs` computes: tuning them is in vain."""
        generator = torch.Generator().manual_seed(0)
        idle = self._idle(self.names, outputs, generator)
        if idle:  # beside a factor of 0, as LoRA begins with, the other factor changes nothing; elsewhere it does
            with self.restored(), torch.no_grad():
                for parameter in self.parameters:
                    parameter.add_(_like(0.1 * torch.randn(parameter.shape, generator=generator), parameter))
                idle = self._idle(idle, outputs, generator)
        return idle

    def _idle(
        self, names: Sequence[str], outputs: Callable[[], Sequence[Tensor]], generator: torch.Generator
    ) -> list[str]:
        """Those of `names` that change nothing where phi is now."""
        before, idle = outputs(), []
        for name in names:
            with self.restored(), torch.no_grad():
                parameter = self.model.get_parameter(name)
                parameter.add_(_like(torch.randn(parameter.shape, generator=generator), parameter))
                after = outputs()
            if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                idle.append(name)
        return idle

    def attach(self) -> None:  # noqa: B027, where nothing was inserted there is nothing to do
        """Insert again, as the identity, what `merge` took out: the same parameters, so that an optimizer has them."""

    def merge(self) -> None:  # noqa: B027
        """Turn whatever is inserted into plain weights and take it out; the outputs stay the same."""

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the model is the plain one that `merge` would leave; afterwards, bit for bit what it was."""
        if not self.inserted:
            yield
            return
        state = self.state_dict()
        self.merge()
        try:
            yield
        finally:
            self.attach()
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that has to be put back, beside a merged checkpoint, to continue exactly."""
        return {name: p.detach().cpu().clone() for name, p in zip(self.names, map(whole, self.parameters), strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        given, expected = ({(n, tuple(t.shape)) for n, t in s.items()} for s in (state, self.state_dict()))
        if given != expected:
            raise PhiError(
                f"The saved phi holds {sorted(given - expected)}, this model's phi has {sorted(expected - given)} "
                "instead: build it with the same `phi`, on the same model, as in the run that saved it."
            )
        with torch.no_grad():
            for name, value in state.items():
                tensors[name].copy_(_like(value, tensors[name]))

    def __add__(self, other: PhiSpace) -> PhiSpace:
        return Union(self, other)

    def _split(self, vector: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        parameters = self.parameters
        sizes = [p.numel() for p in parameters]
        if vector.shape != (sum(sizes),):
            raise PhiError(f"phi has {sum(sizes)} numbers, the vector given has shape {tuple(vector.shape)}.")
        return zip(parameters, vector.split(sizes), strict=True)


class Union(PhiSpace):
    """Two spaces on the same model, one after the other; made by `space + space`."""

    def __init__(self, first: PhiSpace, second: PhiSpace):
        if first.model is not second.model:
            raise PhiError("Only spaces on the same model can be added.")
        if shared := set(first.names) & set(second.names):
            raise PhiError(f"Both spaces hold {sorted(shared)}; a parameter can be in phi once.")
        super().__init__(first.model)
        self.parts = (first, second)

    @property
    def names(self) -> tuple[str, ...]:
        return self.parts[0].names + self.parts[1].names

    @property
    def inserted(self) -> tuple[str, ...]:
        return self.parts[0].inserted + self.parts[1].inserted

    @property
    def output_bias(self) -> str | None:
        return self.parts[0].output_bias or self.parts[1].output_bias

    def attach(self) -> None:
        for part in self.parts:
            part.attach()

    def merge(self) -> None:
        for part in self.parts:
            part.merge()

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.parts[0].state_dict(), **self.parts[1].state_dict()}
