"""PrefixCache: a frozen network's work in front of phi is done once per batch and replayed.

While phi is tuned everything else is frozen, so the model computes the same for every phi before it first touches phi.
One forward pass finds the modules of this prefix; their outputs are kept, and in the next pass the modules return them
instead of computing. A trial at another phi compares replayed and full passes; where they differ, nothing is cached.
Inputs that only the prefix reads, such as images, are not kept beside its outputs.

We compare the model's raw outputs (class decisions would hide errors) and the predictions computed from them (a hook
may have captured a frozen layer).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

# one call of one module in a forward pass: (module name, how many-th call of it)
Call = tuple[str, int]
# the output, and whether the modules behind the prefix use its numbers, or only its shape
Kept = tuple[Any, bool]
# runs the model on a batch and returns a result
Run = Callable[[Any], Any]


def nbytes(tree: Any) -> int:
    """Bytes of all tensors and arrays in nested mappings (a collator's are not always dicts), lists and tuples."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(map(nbytes, tree))
    if isinstance(tree, Tensor):
        return tree.nbytes if all(tree.stride()) else tree.element_size()  # an expanded number takes one
    return getattr(tree, "nbytes", 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _same(first: Any, second: Any) -> bool:
    a, b = _tensors(first), _tensors(second)
    return 0 < len(a) == len(b) and all(
        x.shape == y.shape and x.device == y.device and torch.allclose(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _placed(tensor: Tensor) -> Tensor:
    """The tensor where it is kept: on its device if that leaves half of the free memory there free, else in pinned
    memory."""
    if 2 * tensor.nbytes <= _free_bytes(tensor.device):
        return tensor
    kept = tensor.cpu()
    return kept.pin_memory() if torch.cuda.is_available() else kept


def _poison(tensor: Tensor) -> Tensor:
    """The shape of a tensor without its memory; whoever uses the numbers shows it."""
    return tensor.new_full((), float("nan")).expand(tensor.shape) if tensor.is_floating_point() else tensor.clone()


class PrefixCache:
    """Replays what `model` computes before it first touches phi, batch by batch.

    Args:
        model: in eval mode whenever `forward` is called; its parameters outside phi are frozen.
        phi_names: parameters of phi.
        max_bytes: memory for kept outputs; batches that find no room are computed in full.
        moved: context with another phi inside; used once, for the trial.
        collate: index -> that batch anew.
    """

    def __init__(
        self,
        model: nn.Module,
        phi_names: tuple[str, ...],
        max_bytes: float,
        moved: Callable[[], AbstractContextManager],
        collate: Callable[[int], Any],
    ):
        self.model, self._moved, self._collate = model, moved, collate
        self._room = max_bytes
        phi = {id(model.get_parameter(name)) for name in phi_names}
        everywhere = model.named_parameters(remove_duplicate=False)  # layers may share a parameter
        self._owners = {name.rpartition(".")[0] for name, parameter in everywhere if id(parameter) in phi}
        holders = {""} | {o[:i] for o in self._owners for i in range(len(o) + 1) if o[i : i + 1] in ("", ".")}
        self._frozen = {name: module for name, module in model.named_modules() if name not in holders}
        self._calls: tuple[Call, ...] | None = None  # the prefix, in order; None: not tried yet, (): not cached
        self._needed: set[Call] = set()
        self._kept: dict[int, dict[Call, Kept]] = {}  # by batch; empty where replaying is wrong or too large
        self._passes: dict[int, int] = {}  # by batch: calls of the model

    @property
    def active(self) -> bool:
        """Whether a trial has found replayed passes equal to full ones."""
        return bool(self._calls)

    def forward(self, index: int, run: Run, batches: MutableSequence[Any]) -> Any:
        """`run(batches[index])`, which runs the model; the prefix is replayed if it can be.

        Args:
            batches: of which inputs that replaying makes superfluous are taken out.
        """
        if self._calls is None:
            self._try(run, batches)
        if not self.active:
            return run(batches[index])
        if self._kept.get(index):
            with self._returned() as returned, self._replayed(self._kept[index]):
                result = run(batches[index])
            # one that generates may go on for longer at this phi, without what skipped modules would have noted
            return result if len(returned) == self._passes[index] else run(self._collate(index))
        if index in self._kept:
            return run(batches[index])
        with self._returned() as returned:
            result, outputs = self._record(lambda: run(batches[index]))
        self._kept[index], self._passes[index], expected = {}, len(returned), [*returned, result]
        size = nbytes([outputs.get(call) for call in self._needed])
        # a batch may take another path through the model, or use outputs that the batch of the trial did not
        if size <= self._room and tuple(outputs) == self._calls:
            kept = self._select(outputs, self._needed)
            if self._right(kept, lambda: run(batches[index]), expected):
                self._kept[index] = {
                    call: (tree_map_only(Tensor, _placed, output), needed) for call, (output, needed) in kept.items()
                }
                self._room -= size
                without = tree_map_only(Tensor, _poison, batches[index])
                # a result without tensors, such as derivatives, does not show what of the inputs another one would hold
                if _tensors(result) and self._right(kept, lambda: run(without), expected):
                    self._room += nbytes(batches[index]) - nbytes(without)
                    batches[index] = without
        return result

    def _try(self, run: Run, batches: Sequence[Any]) -> None:
        """Find the prefix, and which of its outputs are needed behind it, with batch 0."""
        _, outputs = self._record(lambda: run(batches[0]))
        self._calls = ()
        with self._moved():
            with self._returned() as returned:
                result = run(batches[0])
            expected = [*returned, result]
            run(batches[-1])  # overwrites what modules store on themselves with another batch's

            def right(needed: set[Call]) -> bool:
                return self._right(self._select(outputs, needed), lambda: run(batches[0]), expected)

            every = set(outputs)
            if not every or not right(every):
                return
            needed = {call for call in every if not right(every - {call})}
            self._needed = needed if right(needed) else every
        self._calls = tuple(outputs)

    def _right(self, kept: dict[Call, Kept], run: Callable[[], Any], expected: list[Any]) -> bool:
        """Whether the model's passes and `run` itself return the expected outputs, with `kept` replayed."""
        try:
            with self._returned() as returned, self._replayed(kept):
                result = run()
        except Exception:
            return False  # say, a poisoned tensor was viewed or changed in place, so it is needed
        return _same([*returned, result], expected)

    @contextmanager
    def _returned(self) -> Iterator[list[Any]]:
        """The outputs that the model returns inside, call by call."""
        returned: list[Any] = []
        handle = self.model.register_forward_hook(lambda module, args, output: returned.append(output))
        try:
            yield returned
        finally:
            handle.remove()

    @staticmethod
    def _select(outputs: dict[Call, Any], needed: set[Call]) -> dict[Call, Kept]:
        return {
            call: (output if call in needed else tree_map_only(Tensor, _poison, output), call in needed)
            for call, output in outputs.items()
        }

    def _record(self, run: Callable[[], Any]) -> tuple[Any, dict[Call, Any]]:
        """Run, and copy the outputs of the outermost frozen modules before phi is first touched."""
        outputs: dict[Call, Any] = {}
        seen: Counter[str] = Counter()
        depth, touched = 0, False

        def enter(module, args):
            nonlocal depth
            depth += 1

        def leave(name, output):
            nonlocal depth
            depth -= 1
            if depth == 0 and not touched:
                # a copy, because an in-place activation behind may change it
                outputs[name, seen[name]] = tree_map_only(Tensor, lambda t: t.detach().clone(), output)
                seen[name] += 1

        def touch(module, args):
            nonlocal touched
            touched = True

        handles = [self.model.get_submodule(o).register_forward_pre_hook(touch) for o in self._owners]
        for name, module in self._frozen.items():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda m, a, output, name=name: leave(name, output)))
        try:
            return run(), outputs
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _replayed(self, kept: dict[Call, Kept]) -> Iterator[None]:
        """Inside, each module of the prefix returns its kept outputs, call by call, and then computes again."""
        device = next(self.model.parameters()).device
        outputs: dict[str, list[Kept]] = defaultdict(list)
        for (name, _), answer in kept.items():
            outputs[name].append(answer)
        patched = []

        def brought(tensor: Tensor) -> Tensor:  # a copy, as it may be changed in place
            return tensor.clone() if tensor.device == device else tensor.to(device, non_blocking=True)

        def stub(original: Callable, answers: Iterator[Kept]) -> Callable:
            def forward(*args, **kwargs):
                answer = next(answers, None)
                if answer is None:
                    return original(*args, **kwargs)
                return tree_map_only(Tensor, brought, answer[0]) if answer[1] else answer[0]

            return forward

        try:
            for name, answers in outputs.items():
                module = self._frozen[name]
                patched.append((module, module.__dict__.get("forward")))
                module.forward = stub(module.forward, iter(answers))
            yield
        finally:
            for module, original in patched:
                if original is None:
                    del module.forward
                else:
                    module.forward = original
