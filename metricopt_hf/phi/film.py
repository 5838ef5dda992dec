"""FiLM: scale and shift per channel of norm layers, and the output layer's bias, written into the norms' own weights.

After FiLM (Perez et al., 2018): y = (1 + scale) * norm(x) + shift, with scale = shift = 0, the identity, at the start.
Because norm(x) ends in `weight * x + bias`, nothing has to be inserted: weight = (1 + scale) * weight_0 and
bias = (1 + scale) * bias_0 + shift. The tuned model is an ordinary model at every moment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PhiError
from .output_layer import is_auxiliary, output_layer
from .space import PhiSpace, like, reshard, whole
from .taps import Channels, Tap


@dataclass(frozen=True)
class _Site:
    """A norm layer that can be modulated: `host`, in it, is the module whose output is the norm's output."""

    name: str
    norm: nn.Module
    host: nn.Module
    channel_dim: int


def _channel_dim(norm: nn.Module, host: nn.Module) -> int | None:
    """The dimension of the output that weight and bias act on, or None where the layer is not `weight * x + bias`.

    Found by trying: a change of the weights must change the output as a modulation would. That also settles which
    layers can be written to, without a list of the norm classes of every library.
    """
    weight, bias = norm.weight, getattr(norm, "bias", None)
    n = weight.numel()
    m = 2 if n != 2 else 3  # anything but n
    generator = torch.Generator().manual_seed(0)
    captured: list[Tensor] = []
    # a copy, because the activation behind it may work in place
    handle = host.register_forward_hook(lambda module, args, output: captured.append(output.clone()))
    saved = {id(t): t.detach().clone() for t in (weight, bias) if t is not None}
    training = {module: module.training for module in norm.modules()}
    norm.eval()

    def run(x: Tensor) -> Tensor:
        captured.clear()
        norm(x.clone())
        return captured[-1].double()

    try:
        with torch.no_grad():
            for shape, dim in (((2, m, n), -1), ((2, n, m, 1), 1), ((2, n, m), 1), ((2, n), -1)):
                x = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
                scale = torch.rand(n, generator=generator).to(weight.device, weight.dtype)
                shift = torch.randn(n, generator=generator).to(weight.device, weight.dtype)
                try:
                    if not weight.isfinite().all() or not weight.any():  # not loaded yet, as on ranks but the first
                        weight.copy_(1 + scale)
                        if bias is not None:
                            bias.copy_(shift)
                    plain = run(x)
                    weight.mul_(1 + scale)
                    if bias is not None:
                        bias.mul_(1 + scale).add_(shift)
                    merged = run(x)
                except (RuntimeError, ValueError, IndexError, AssertionError):
                    continue  # not an input of this layer's rank
                finally:
                    for tensor in (weight, bias):
                        if tensor is not None:
                            tensor.copy_(saved[id(tensor)])
                broadcast = [1] * plain.dim()
                broadcast[dim] = -1
                modulated = plain * (1 + scale.double().reshape(broadcast))
                if bias is not None:
                    modulated = modulated + shift.double().reshape(broadcast)
                tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
                if torch.allclose(merged, modulated, rtol=tolerance, atol=tolerance):
                    return dim
    finally:
        handle.remove()
        for module, mode in training.items():
            module.training = mode
    return None


def _norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that look like a norm: "norm" or "bn" in the class name and a weight per channel."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        kind = type(module).__name__.lower()
        if isinstance(weight, Tensor) and weight.dim() == 1 and ("norm" in kind or kind.startswith("bn")):
            found[name] = module
    return found


def _last_block(names: list[str]) -> list[str]:
    """The norm layers from the last repeated block on: that block's, and the final one behind it.

    A block is the deepest numbered container (`layer3.2`, `encoder.layer.5`) that holds at least two of the norms.
    """

    def containers(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[: i + 1]) for i in range(len(parts) - 1) if parts[i].isdigit()]

    for i in range(len(names) - 1, -1, -1):
        for container in reversed(containers(names[i])):
            inside = [n for n in names if n.startswith(container + ".")]
            if len(inside) >= 2:
                return names[names.index(inside[0]) :]
    return names[-2:]


def _has(norm: nn.Module, part: str) -> bool:
    return getattr(norm, part, None) is not None


class FiLM(PhiSpace):
    """Scale and shift of norm layers of `model`, and the bias of its output layer (one number per logit).

    phi holds, norm by norm, scale and shift (of a norm without a bias, the scale alone), then the output bias, which
    counts from zero like the rest: phi is 0 until it is moved.

    Args:
        model: any CNN or transformer whose norm layers have per-channel weights (timm, transformers, torchvision, own).
        layers: regular expression (`re.search`) over the names of norm layers; default: the last block's, and the final
            norm behind it.
        output_bias: whether the output layer's bias belongs to phi; "auto": where there is such a layer with a bias.

    Raises:
        PhiError: no norm layer can be modulated, or `layers` matches none; the message names what phi could be.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
        >>> phi = FiLM(model)
        >>> phi.names, phi.dim, float(phi.read().abs().max())
        (('1.weight', '1.bias', '3.bias'), 19, 0.0)
        >>> phi.write(phi.read() + 0.5); model[1].weight[0].item(), model[1].bias[0].item()
        (1.5, 0.5)
    """

    def __init__(self, model: nn.Module, layers: str | None = None, output_bias: bool | str = "auto"):
        super().__init__(model)
        if hasattr(model, "peft_config"):
            raise PhiError(
                f"{type(model).__name__} is a PEFT model, of which the adapter alone is saved: what FiLM does to its "
                'norm layers would be lost. Use phi="adapter", which is the default for it; or merge the adapter first '
                "(`model.merge_and_unload()`)."
            )
        self._asked = layers, output_bias
        self._find(())

    @property
    def names(self) -> tuple[str, ...]:
        parts = [(f"{s.name}." if s.name else "", s.norm) for s in self._sites]
        norms = [prefix + part for prefix, norm in parts for part in ("weight", "bias") if _has(norm, part)]
        return (*norms, *((self.output_bias,) if self._output_layer else ()))

    @property
    def output_bias(self) -> str | None:
        """Name of the bias of the layer that makes the logits, if it is in phi."""
        if not self._output_layer:
            return None
        # of a bias that two layers share (D-FINE's, RT-DETR v2's heads), the name that the model goes by
        bias = self.model.get_submodule(self._output_layer).bias
        return next(name for name, parameter in self.model.named_parameters() if parameter is bias)

    @property
    def output_bias_slice(self) -> slice | None:
        if not self._output_layer:
            return None
        size = self._origin[-1].numel()
        return slice(self.dim - size, self.dim)

    def reset(self) -> None:
        reshard(self.model)
        self._origin = [whole(p.detach()).clone() for p in self.parameters]
        self._phi = torch.cat([torch.zeros(p.numel(), device=p.device) for p in self._origin])

    def settle(self, moved: Callable[[], bool]) -> None:
        """A head that makes no prediction, as that of another task, is left out, and others are looked for."""
        unused: set[int] = set()
        while still := {id(parameter) for parameter in self._idle(moved)} - unused:
            unused |= still
            try:
                self._find(unused)
            except PhiError:  # there are no others
                return

    def _idle(self, moved: Callable[[], bool]) -> Iterator[nn.Parameter]:
        """Weights of norms that no prediction calls or is moved by, and an output bias that moves none."""
        hosts = {f"{site.name}.weight".removeprefix("."): site.host for site in self._sites}
        parts = list(self.split(torch.arange(self.dim)))
        for name, (parameter, where) in zip(self.names, parts, strict=True):
            host = hosts.get(name)
            if host is None and name != self.output_bias:
                continue
            calls: list[int] = []
            hook = None if host is None else host.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
            with self.restored():
                there = self.read()
                there[where] += torch.linspace(1, 2, len(where)).to(there)
                self.write(there)
                idle = not moved()
            if hook is not None:
                hook.remove()
            if idle and not calls:
                yield parameter

    def read(self) -> Tensor:
        return self._phi.clone()

    def write(self, phi: Tensor) -> None:
        parts = [part for _, part in self.split(phi)]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self._values(parts), strict=True):
                parameter.copy_(like(value, parameter))
        self._phi = phi.detach().to(self._phi, copy=True)

    def _values(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The parameters' values at phi, in float32 or, of such parameters, float64."""
        origin = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in self._origin)
        left = iter(parts)
        for site in self._sites:
            scale = 1 + next(left)
            yield scale * next(origin)
            if _has(site.norm, "bias"):
                yield scale * next(origin) + next(left)
        if self._output_layer:
            yield next(origin) + next(left)

    def pull(self, gradients: Sequence[Tensor]) -> Tensor:
        origin = iter(self._origin)
        left = iter([whole(g.detach()).reshape(-1).float() for g in gradients])
        parts = []
        for site in self._sites:
            by_scale = next(left) * next(origin).float()
            if _has(site.norm, "bias"):
                by_shift = next(left)
                parts += [by_scale + by_shift * next(origin).float(), by_shift]
            else:
                parts.append(by_scale)
        return torch.cat([*parts, *left])

    def taps(self) -> Sequence[Tap] | None:
        if self.is_shared:  # as of heads that share their bias
            return None
        parts = iter([part for _, part in self.split(self._phi)])
        found: list[Tap] = []
        for site in self._sites:
            scale, shift = next(parts), next(parts) if _has(site.norm, "bias") else None
            found.append(Channels(site.host, site.channel_dim, scale, shift))
        if self._output_layer:
            layer = self.model.get_submodule(self._output_layer)
            found.append(Channels(layer, -1 if isinstance(layer, nn.Linear) else 1, None, next(parts)))
        return found

    def state_dict(self) -> dict[str, Tensor]:
        origin = {f"origin {name}": value.cpu() for name, value in zip(self.names, self._origin, strict=True)}
        return {**origin, "phi": self._phi.cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        expected = self.state_dict()
        if given := {name for name in state if name in expected and state[name].shape == expected[name].shape}:
            self._origin = [
                state[f"origin {name}"].to(old) if f"origin {name}" in given else old
                for name, old in zip(self.names, self._origin, strict=True)
            ]
        super().load_state_dict(state)

    def _find(self, unused: Collection[int]) -> None:
        """Choose the layers.

        Args:
            unused: ids of parameters of others.
        """
        layers, output_bias = self._asked
        self._sites = self._find_sites(layers, unused)
        self._output_layer = self._find_output_layer(output_bias, unused)
        self.reset()

    def _find_sites(self, layers: str | None, unused: Collection[int]) -> list[_Site]:
        norms = _norm_layers(self.model)
        if layers is None:
            left = {name: norm for name, norm in norms.items() if id(norm.weight) not in unused}
            chosen = _last_block([name for name in left if not is_auxiliary(name)])
        else:
            try:
                chosen = [name for name in norms if re.search(layers, name)]
            except re.error as error:
                raise PhiError(f"layers={layers!r} is no regular expression: {error}.") from None
        sites = []
        for name in chosen:
            norm = host = norms[name]
            # timm's norm-and-activation layers: what comes out of `drop` is what goes into the activation
            if hasattr(norm, "act") and isinstance(getattr(norm, "drop", None), nn.Module):
                host = norm.drop
            dim = _channel_dim(norm, host)
            if dim is None:
                if layers is None:
                    continue  # by default, those that can be written to
                raise PhiError(
                    f"{name} ({type(norm).__name__}) does not compute weight * x + bias, so FiLM cannot be written "
                    'into its weights. Choose others with `layers="..."`; norm layers here: '
                    f"{', '.join(norms)}."
                )
            sites.append(_Site(name, norm, host, dim))
        if not sites:
            raise PhiError(self._no_site_message(layers, list(norms)))
        return sites

    def _find_output_layer(self, output_bias: bool | str, unused: Collection[int]) -> str | None:
        """Name of the layer whose bias is in phi; None where there is none."""
        if not output_bias:
            return None
        layer = output_layer(self.model, unused)
        bias = None if layer is None else self.model.get_submodule(layer).bias
        if bias is not None:
            return layer
        if output_bias == "auto":
            return None
        raise PhiError(
            f"{type(self.model).__name__} has no output layer with a bias that could be found (looked at: {layer}). "
            'Use `FiLM(model, output_bias=False)`, and add a bias by name: `+ Subset(model, "name\\.bias$")`.'
        )

    def _no_site_message(self, layers: str | None, norms: list[str]) -> str:
        kind = type(self.model).__name__
        if norms and layers is not None:
            return f"layers={layers!r} matches no norm layer of {kind}. They are: {', '.join(norms)}."
        biases = [n for n, _ in self.model.named_parameters() if n.endswith("bias")]
        named = biases or [n for n, _ in self.model.named_parameters()]
        pattern = re.escape(named[-1]) + "$" if named else "..."
        return (
            f"{kind} has no norm layer that computes weight * x + bias per channel, so FiLM cannot reach it. Use "
            f"existing parameters instead: phi={pattern!r} takes {named[-1] if named else 'nothing'}"
            + (f", phi='bias$' all {len(biases)} biases" if biases else "")
            + '; or wrap the model with peft and use phi="adapter".'
        )
