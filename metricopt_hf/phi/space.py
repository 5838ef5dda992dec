"""PhiSpace: a few numbers of a model as one flat vector phi, read, written, and differentiated row by row.

Extension point. A new space says which parameters it writes (`names`), how phi becomes their values (`read`, `write`),
and, if its outputs are to be linearised by backward passes, where a row's derivatives come from (`taps`).
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
from .taps import Tap


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 may have sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model: then all ranks take part in every forward pass and every read of phi."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Shard parameters again that FSDP2 leaves whole after a pass without a backward: writes to those would be lost."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def model_class(model: nn.Module) -> str:
    """The name of a model's class, as it was before FSDP2 made one of its own of it."""
    return type(model).__bases__[1].__name__ if isinstance(model, FSDPModule) else type(model).__name__


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value` (whole) in the dtype, shape and sharding of `target`."""
    value = value.reshape(target.shape).to(device=target.device, dtype=target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value


class PhiSpace(ABC):
    """Some numbers of `model` as one vector phi: [dim] float32 on the model's device.

    Nothing is inserted into the model: phi sets parameters that it has. Parameters are asked of the modules that hold
    them at every use, because wrappers such as FSDP2 replace the objects.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names in `model.named_parameters()` of the parameters that phi sets."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that phi sets, in the order of `names`."""
        reshard(self.model)
        return [self.model.get_parameter(name) for name in self.names]

    @property
    def dim(self) -> int:
        """How many numbers phi has."""
        return sum(p.numel() for p in self.parameters)

    @property
    def description(self) -> dict[str, Any]:
        """The kind of phi, and [name, shape] of every parameter in order, as JSON values; equal for comparable phi."""
        parameters = [[n, list(p.shape)] for n, p in zip(self.names, self.parameters, strict=True)]
        return {"kind": type(self).__name__, "parameters": parameters}

    @property
    def output_bias_slice(self) -> slice | None:
        """Place in phi of the bias of the layer that makes the logits; None if unknown."""
        return None

    def reset(self) -> None:  # noqa: B027, a space without an origin of its own has nothing to do
        """Take the model's present weights for phi's origin, from which `read` and `write` count."""

    def settle(self, moved: Callable[[], bool]) -> None:  # noqa: B027, a space that was named part by part stays so
        """Before a run: leave out what makes no prediction.

        Args:
            moved: whether the model predicts something else than where it is now.
        """

    def read(self) -> Tensor:
        """phi: [dim] float32, a copy."""
        return torch.cat([whole(p.detach()).reshape(-1).float() for p in self.parameters])

    def write(self, phi: Tensor) -> None:
        """Set phi: [dim].

        Raises:
            PhiError: the vector has another length.
        """
        with torch.no_grad():
            for parameter, value in self.split(phi):
                parameter.copy_(like(value, parameter))

    def split(self, vector: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its part of a vector that has a number for each of theirs.

        Raises:
            PhiError: the vector has another length.
        """
        parameters = self.parameters
        sizes = [p.numel() for p in parameters]
        if vector.shape != (sum(sizes),):
            raise PhiError(f"phi has {sum(sizes)} numbers, the vector given has shape {tuple(vector.shape)}.")
        return zip(parameters, vector.split(sizes), strict=True)

    def gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """The gradient of a loss at phi: [dim] float32. A parameter that the loss does not use counts as zero.

        Args:
            loss: computes it, differentiable in the model's parameters.
        """
        if is_sharded(self.model):
            return self._gradient_of_sharded(loss)
        parameters = self.parameters
        needed = [p.requires_grad for p in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                found = torch.autograd.grad(loss(), parameters, allow_unused=True)
        finally:
            for parameter, needs in zip(parameters, needed, strict=True):
                parameter.requires_grad_(needs)
        return self.pull([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)])

    def _gradient_of_sharded(self, loss: Callable[[], Tensor]) -> Tensor:
        """The same under FSDP2, which gives gradients to parameters' `grad` only, in a backward pass of its own."""
        everything = list(self.model.parameters())
        before = [p.grad for p in everything]
        try:
            for parameter in everything:
                parameter.grad = None
            with torch.enable_grad():
                loss().backward()
            parameters = self.parameters
            return self.pull([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        finally:
            for parameter, gradient in zip(everything, before, strict=True):
                parameter.grad = gradient

    def pull(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of the parameters, in the order of `names`, as one of phi: [dim] float32."""
        return torch.cat([whole(g.detach()).reshape(-1).float() for g in gradients])

    def taps(self) -> Sequence[Tap] | None:
        """Taps for a row's derivatives by each part of phi, in order; None: differences are taken instead."""
        return None

    @property
    def is_shared(self) -> bool:
        """Whether several modules hold one of the parameters, so that one module's derivatives are incomplete."""
        owners: dict[int, set[int]] = {id(parameter): set() for parameter in self.parameters}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in owners:
                    owners[id(parameter)].add(id(module))
        return any(len(modules) > 1 for modules in owners.values())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """On leaving, phi and its parameters are as before, bit for bit."""
        parameters = self.parameters
        phi, before = self.read(), [p.detach().clone() for p in parameters]
        try:
            yield
        finally:
            self.write(phi)
            reshard(self.model)
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The state that an exact resume needs beside the model's own weights."""
        return {"phi": self.read().cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state of `state_dict`.

        Raises:
            PhiError: it is of another phi.
        """
        given, expected = ({(n, tuple(t.shape)) for n, t in s.items()} for s in (state, self.state_dict()))
        if given != expected:
            raise PhiError(
                f"The saved phi holds {sorted(given - expected)}, this model's phi has {sorted(expected - given)} "
                "instead: build it with the same `phi`, on the same model, as in the run that saved it."
            )
        self.write(state["phi"].to(self.parameters[0].device))

    def __add__(self, other: PhiSpace) -> PhiSpace:
        return Union(self, other)


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
    def output_bias_slice(self) -> slice | None:
        first, second = self.parts
        if first.output_bias_slice is not None:
            return first.output_bias_slice
        where = second.output_bias_slice
        return where and slice(where.start + first.dim, where.stop + first.dim)

    def reset(self) -> None:
        for part in self.parts:
            part.reset()

    def settle(self, moved: Callable[[], bool]) -> None:
        for part in self.parts:
            part.settle(moved)

    def read(self) -> Tensor:
        return torch.cat([part.read() for part in self.parts])

    def write(self, phi: Tensor) -> None:
        count = self.parts[0].dim
        if phi.shape != (self.dim,):
            raise PhiError(f"phi has {self.dim} numbers, the vector given has shape {tuple(phi.shape)}.")
        for part, own in zip(self.parts, (phi[:count], phi[count:]), strict=True):
            part.write(own)

    def pull(self, gradients: Sequence[Tensor]) -> Tensor:
        count = len(self.parts[0].names)
        return torch.cat([self.parts[0].pull(gradients[:count]), self.parts[1].pull(gradients[count:])])

    def taps(self) -> Sequence[Tap] | None:
        found = [part.taps() for part in self.parts]
        return None if None in found else [tap for taps in found for tap in taps or ()]

    def state_dict(self) -> dict[str, Tensor]:
        parts = (part.state_dict() for part in self.parts)
        return {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(self.state_dict()):
            super().load_state_dict(state)  # raises, and names its entries
        for i, part in enumerate(self.parts):
            part.load_state_dict({n.partition(".")[2]: v for n, v in state.items() if n.startswith(f"{i}.")})
