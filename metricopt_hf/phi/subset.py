"""Subset: existing parameters of the model as phi. A PEFT model's adapter is one such subset."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from torch import nn

from ..errors import PhiError
from .space import PhiSpace
from .taps import Linear, Tap


class Subset(PhiSpace):
    """The floating-point parameters whose name matches a regular expression (`re.search`).

    Args:
        model: any module.
        pattern: for instance `"classifier"`, `r"\\.bias$"`, `"norm"`.

    Raises:
        PhiError: nothing matches; the message shows names that exist.

    Example:
        >>> from torch import nn
        >>> Subset(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), r"bias$").names
        ('0.bias', '1.bias')
    """

    def __init__(self, model: nn.Module, pattern: str):
        super().__init__(model)
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise PhiError(f"phi={pattern!r} is no regular expression: {error}.") from None
        self._names = tuple(n for n, p in model.named_parameters() if p.is_floating_point() and expression.search(n))
        if not self._names:
            existing = [n for n, _ in model.named_parameters()]
            raise PhiError(
                f"phi={pattern!r} matches no parameter of {type(model).__name__}. "
                f"The last of its {len(existing)} parameters are: {', '.join(existing[-8:])}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def taps(self) -> Sequence[Tap] | None:
        """Taps of linear layers, a LoRA adapter's included; None where phi holds parameters of another layer."""
        if self.is_shared:
            return None
        found: list[Tap] = []
        for owner, names in itertools.groupby(self._names, key=lambda name: name.rpartition(".")[0]):
            module, parts = self.model.get_submodule(owner), [name.rpartition(".")[2] for name in names]
            is_linear = getattr(type(module), "forward", None) is nn.Linear.forward
            if not is_linear or not set(parts) <= {"weight", "bias"}:
                return None
            found.append(Linear(module, "weight" in parts, "bias" in parts))
        return found


def adapter(model: nn.Module) -> Subset:
    """The trainable parameters of a PEFT model (LoRA, IA3, LN-tuning, ...) as phi.

    Raises:
        PhiError: `model` has no PEFT adapter, or nothing in it is trainable.
    """
    if not hasattr(model, "peft_config"):
        raise PhiError(
            'phi="adapter" needs a PEFT model: wrap yours with `peft.get_peft_model(model, LoraConfig(...))`, '
            'or use phi="film" or a regular expression over parameter names.'
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise PhiError(
            "The PEFT model has no trainable parameter: load it with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    return trainable(model)


def trainable(model: nn.Module) -> Subset:
    """Every parameter of the model that is trained."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return Subset(model, "^(" + "|".join(map(re.escape, names)) + ")$")
