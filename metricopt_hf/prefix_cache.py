"""PrefixCache: a frozen network's work in front of phi is done once per batch and replayed.

While phi is tuned everything else stands still, so whatever the model computes before it first touches phi is the same
for every phi. Which modules those are is found by watching one forward pass; what they return is kept, and on the next
pass they return it instead of computing. Whether that is right for a model is not assumed but tried, at another phi,
against the full forward pass; where it is not, nothing is cached.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

# one call of one module in a forward pass: (module name, how many-th call of it)
Call = tuple[str, int]


def nbytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    return sum(t.numel() * t.element_size() for t in tree_flatten(tree)[0] if isinstance(t, Tensor))


def _same(first: Any, second: Any) -> bool:
    a, b = (tree_flatten(tree)[0] for tree in (first, second))
    return len(a) == len(b) and all(
        torch.allclose(x, y, rtol=1e-5, atol=1e-6, equal_nan=True) if isinstance(x, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
        if isinstance(x, Tensor) or isinstance(x, (int, float))
    )


def _poison(tensor: Tensor) -> Tensor:
    """The shape of a tensor without its memory; whoever uses the numbers shows it."""
    return tensor.new_full((), float("nan")).expand(tensor.shape) if tensor.is_floating_point() else tensor.clone()


class PrefixCache:
    """Replays what `model` computes before it first touches phi, batch by batch.

    Args:
        model: in eval mode whenever `forward` is called; its parameters outside phi must not change any more.
        phi_names: parameters of phi.
        max_bytes: memory for kept outputs; a set that would need more is not cached.
        moved: context inside which phi is another one; used once, to try whether replaying is right.
    """

    def __init__(
        self,
        model: nn.Module,
        phi_names: tuple[str, ...],
        max_bytes: float,
        moved: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.max_bytes, self._moved = model, max_bytes, moved
        self._owners = {name.rpartition(".")[0] for name in phi_names}
        holders = {""} | {o[:i] for o in self._owners for i in range(len(o) + 1) if o[i : i + 1] in ("", ".")}
        self._frozen = {name: module for name, module in model.named_modules() if name not in holders}
        self._calls: tuple[Call, ...] | None = None  # the prefix, in order; None: not tried yet, (): not cached
        self._needed: set[Call] = set()  # those whose numbers, and not only shapes, are used behind the prefix
        self._kept: dict[int, dict[Call, Any]] = {}

    @property
    def active(self) -> bool:
        """Whether replaying was tried and found right."""
        return bool(self._calls)

    def forward(self, index: int, run: Callable[[], Any], num_batches: int) -> Any:
        """`run()`, which runs the model on batch `index` of `num_batches`, with the prefix replayed where it can be."""
        if self._calls is None:
            self._try(run, num_batches)
        if not self.active:
            return run()
        if index in self._kept:
            with self._replayed(self._kept[index], self._needed):
                return run()
        result, outputs = self._record(run)
        if tuple(outputs) == self._calls:  # a batch that takes another way through the model is not cached
            self._kept[index] = {call: self._copy(call, output) for call, output in outputs.items()}
        return result

    def _try(self, run: Callable[[], Any], num_batches: int) -> None:
        _, outputs = self._record(run)
        self._calls = ()
        with self._moved():
            expected = run()

            def right(needed: set[Call]) -> bool:
                kept = {c: o if c in needed else tree_map_only(Tensor, _poison, o) for c, o in outputs.items()}
                try:
                    with self._replayed(kept, needed):
                        return _same(run(), expected)
                except (RuntimeError, ValueError, TypeError, IndexError):
                    return False  # a poisoned tensor was viewed or changed in place, so it is needed

            every = set(outputs)
            if not every or not right(every):
                return
            needed = {call for call in every if not right(every - {call})}
            self._needed = needed if right(needed) else every
        if nbytes([outputs[call] for call in self._needed]) * num_batches <= self.max_bytes:
            self._calls = tuple(outputs)

    def _copy(self, call: Call, output: Any) -> Any:
        return output if call in self._needed else tree_map_only(Tensor, _poison, output)

    def _record(self, run: Callable[[], Any]) -> tuple[Any, dict[Call, Any]]:
        """Run, and copy what the outermost frozen modules return before phi is first touched."""
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
    def _replayed(self, kept: dict[Call, Any], needed: set[Call]) -> Iterator[None]:
        """Inside, each of the prefix's modules returns what is kept of it, call by call, and then computes again."""
        outputs: dict[str, list[tuple[Any, bool]]] = defaultdict(list)
        for call, output in kept.items():
            outputs[call[0]].append((output, call in needed))
        patched = []

        def stub(original: Callable, answers: Iterator[tuple[Any, bool]]) -> Callable:
            def forward(*args, **kwargs):
                answer = next(answers, None)
                if answer is None:
                    return original(*args, **kwargs)
                return tree_map_only(Tensor, torch.clone, answer[0]) if answer[1] else answer[0]

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
