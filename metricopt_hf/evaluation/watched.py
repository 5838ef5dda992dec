"""Which tensors of a batch nobody reads: found by handing in tensors that note what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# what tells nothing of the numbers in a tensor
SHAPE_ONLY = {
    Tensor.shape.__get__,
    Tensor.device.__get__,
    Tensor.dtype.__get__,
    Tensor.ndim.__get__,
    Tensor.is_cuda.__get__,
    Tensor.requires_grad.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.__len__,
    torch.is_floating_point,
    torch.numel,
}
# and what makes another of it with the same numbers, which is watched in turn
MOVES = {Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.contiguous}


class _Watched(Tensor):
    """Notes in `read`, a list that all made of it share, when somebody looks at its numbers."""

    read: list[Callable]

    def __deepcopy__(self, memo):
        with torch._C.DisableTorchFunctionSubclass():
            return _watch(self.clone(), self.read)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        watched = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, _Watched)]
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if function in SHAPE_ONLY:
            return result
        if function in MOVES and isinstance(result, Tensor):
            return _watch(result, args[0].read)
        for tensor in watched:
            tensor.read.append(function)
        # in nested arguments, as of torch.cat, it cannot be told which
        if not watched:
            for value in args:
                for tensor in value if isinstance(value, (list, tuple)) else ():
                    if isinstance(tensor, _Watched):
                        tensor.read.append(function)
        return result


def _watch(tensor: Tensor, read: list[Callable]) -> Tensor:
    watched = tensor.as_subclass(_Watched)
    watched.read = read
    return watched


def thinned(batch: Any, device: torch.device, run: Callable[[Any], Any]) -> Any:
    """`batch` on `device`, with every floating-point tensor whose numbers `run` does not read made up of nan.

    What is made up has no memory of its own. Whoever reads it after all shows it.

    Args:
        batch: nested mappings, lists and tuples; a mapping comes out as a dict.
        run: takes such a batch.
    """
    reads: list[list[Callable]] = []

    def watch(tensor: Tensor) -> Tensor:
        reads.append([])
        return _watch(tensor.detach(), reads[-1]) if tensor.is_floating_point() else tensor

    run(_mapped(batch, watch))
    order = iter(reads)

    def replaced(tensor: Tensor) -> Tensor:
        is_read = bool(next(order))
        if is_read or not tensor.is_floating_point():
            return tensor.to(device)
        return torch.full((), float("nan"), dtype=tensor.dtype, device=device).expand(tensor.shape)

    return _mapped(batch, replaced)


def leaves(tree: Any) -> Iterator[Any]:
    """What is in nested mappings, lists and tuples."""
    if isinstance(tree, (Mapping, list, tuple)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from leaves(value)
    else:
        yield tree


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_mapped(value, change) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree
