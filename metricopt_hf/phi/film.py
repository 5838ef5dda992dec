"""FiLM: a scale and a shift per channel behind norm layers, and the output layer's bias; they merge into plain weights.

After FiLM (Perez et al., 2018): y = (1 + scale) * norm(x) + shift, with scale = shift = 0, the identity, at the start.
Because norm(x) ends in `weight * x + bias`, the modulation merges: weight <- (1 + scale) * weight and
bias <- (1 + scale) * bias + shift. The tuned model is then an ordinary model that needs nothing of ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, zeros
from torch.utils.hooks import RemovableHandle

from ..errors import PhiError
from .space import PhiSpace, reshard, whole

SCALE, SHIFT = "film_scale", "film_shift"


def _modulate(host: nn.Module, args, output: Tensor) -> Tensor:
    """Forward hook. The parameters are read off the module, so wrappers may replace them and copies have theirs."""
    shape = [1] * output.dim()
    shape[host.film_dim] = -1
    # in float32 up to the end: in bfloat16, 1 + scale would be 1 for every |scale| < 0.004; FSDP2 may cast it to that
    scale = 1 + getattr(host, SCALE).float().reshape(shape)
    shift = getattr(host, SHIFT, None)
    # addcmul: one pass over the activations instead of two
    modulated = output * scale if shift is None else torch.addcmul(shift.float().reshape(shape), output, scale)
    return modulated.to(output.dtype)


def _merged(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a norm layer with the modulation behind it multiplied in, in their own dtype."""
    weight = (weight * (1 + scale)).to(weight.dtype)
    return weight, None if bias is None else (bias * (1 + scale) + shift).to(bias.dtype)


def _merge_saved(host_name: str, norm: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict hook of a modulated norm: whoever asks the model for its weights gets plain ones."""
    scale, shift = (state.pop(prefix + _join(host_name, part), None) for part in (SCALE, SHIFT))
    if scale is None or scale.is_meta:  # accelerate shards what is empty, and then puts the weights in
        return
    if scale.any() or (shift is not None and shift.any()):  # else the weights themselves
        weight, bias = prefix + "weight", prefix + "bias"
        with torch.no_grad():
            merged = _merged(state[weight], state.get(bias), scale, shift)
        state.update({name: value for name, value in zip((weight, bias), merged, strict=True) if value is not None})


def _load_plain(host_name: str, norm: nn.Module, state: dict[str, Any], prefix: str, *args) -> None:
    """Hook before a state dict is loaded: plain weights, merged ones too, make the modulation the identity."""
    host = norm.get_submodule(host_name)
    for part in (SCALE, SHIFT):
        name = prefix + _join(host_name, part)
        if hasattr(host, part) and name not in state and prefix + "weight" in state:
            state[name] = _zeros(getattr(host, part))


def _zeros(like: Tensor) -> Tensor:
    """Zeros in the shape and sharding of `like`, on a device also where that is on none yet."""
    if isinstance(like, DTensor) and like.is_meta:
        return zeros(like.shape, dtype=like.dtype, device_mesh=like.device_mesh, placements=like.placements)
    return torch.zeros_like(like)


def _join(module_name: str, part: str) -> str:
    return f"{module_name}.{part}" if module_name else part  # the model itself has no name


@dataclass(frozen=True)
class _Site:
    """A norm layer that can be modulated: `host`, in it, is the module whose output is the norm's output."""

    norm_name: str
    norm: nn.Module
    host_name: str
    host: nn.Module
    channel_dim: int


def _channel_dim(norm: nn.Module, host: nn.Module) -> int | None:
    """The dimension of the output that weight and bias act on, or None where the layer is not `weight * x + bias`.

    Found by trying: a change of the weights must change the output as a modulation would. That also settles which
    layers merge exactly, without a list of the norm classes of every library.
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


def _auxiliary(name: str) -> bool:
    """Whether a module belongs to an auxiliary head, which serves the loss only (BEiT, UPerNet, torchvision)."""
    return any(part.startswith("aux") for part in name.split("."))


def _output_layer(model: nn.Module) -> str | None:
    """Name of the layer that makes the logits, if the model ends in one.

    The last linear layer with `config.num_labels` outputs, or such a convolution, as of segmentation, or, as of DETR
    and YOLOS, a linear layer with one more for "no object". Box heads and auxiliary heads are left out. Else timm's
    classifier, else the last layer that has parameters if it is linear or a convolution (a model that ends in a norm is
    an encoder without logits).
    """
    owners = {
        n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False)) and not _auxiliary(n)
    }
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


class FiLM(PhiSpace):
    """Scale and shift behind norm layers of `model`, and the bias of its output layer (one number per logit).

    Built means attached: the model computes the same as before until phi is moved. `merge` takes it out again.

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
        >>> phi.names
        ('1.film_scale', '1.film_shift', '3.bias')
        >>> phi.merge(); [name for name, _ in model.named_parameters()]
        ['0.weight', '0.bias', '1.weight', '1.bias', '3.weight', '3.bias']
    """

    def __init__(self, model: nn.Module, layers: str | None = None, output_bias: bool | str = "auto"):
        super().__init__(model)
        if hasattr(model, "peft_config"):
            raise PhiError(
                f"{type(model).__name__} is a PEFT model, of which the adapter alone is saved: what FiLM does to its "
                'norm layers would be lost. Use phi="adapter", which is the default for it; or merge the adapter first '
                "(`model.merge_and_unload()`)."
            )
        self._sites = self._find_sites(layers)
        self._output_bias = self._find_output_bias(output_bias)
        self._handles: list[RemovableHandle] = []
        self._taken_out: dict[str, nn.Parameter] = {}  # by `merge`
        self.attach()

    @property
    def names(self) -> tuple[str, ...]:
        return self.inserted + ((self._output_bias,) if self._output_bias else ())

    @property
    def output_bias(self) -> str | None:
        return self._output_bias

    @property
    def inserted(self) -> tuple[str, ...]:
        return tuple(
            _join(site.host_name, part) for site in self._sites for part in (SCALE, SHIFT) if hasattr(site.host, part)
        )

    def merge(self) -> None:
        reshard(self.model)
        with torch.no_grad():
            for site in self._sites:
                if not hasattr(site.host, SCALE):
                    continue
                weight, bias = site.norm.weight, getattr(site.norm, "bias", None)
                merged = _merged(weight, bias, getattr(site.host, SCALE), getattr(site.host, SHIFT, None))
                for tensor, value in zip((weight, bias), merged, strict=True):
                    if tensor is not None:
                        tensor.copy_(value)
                if isinstance(getattr(site.host, SCALE), DTensor):  # FSDP2 would put it in again, so it stays
                    for part in (SCALE, SHIFT):
                        if hasattr(site.host, part):
                            getattr(site.host, part).zero_()
                    continue
                for part in (SCALE, SHIFT):
                    if hasattr(site.host, part):
                        self._taken_out[_join(site.host_name, part)] = getattr(site.host, part)
                        delattr(site.host, part)
                del site.host.film_dim
        if not self.inserted:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def attach(self) -> None:
        for site in self._sites:
            if hasattr(site.host, SCALE):
                continue
            site.host.film_dim = site.channel_dim
            self._insert(site, SCALE)
            if getattr(site.norm, "bias", None) is not None:  # without a bias, a shift could not merge
                self._insert(site, SHIFT)
            name = site.host_name.removeprefix(site.norm_name).removeprefix(".")
            self._handles += [
                site.host.register_forward_hook(_modulate),
                site.norm.register_state_dict_post_hook(partial(_merge_saved, name)),
                site.norm.register_load_state_dict_pre_hook(partial(_load_plain, name)),
            ]

    def _insert(self, site: _Site, part: str) -> None:
        weight = site.norm.weight
        # float32 whatever the model's dtype: steps of 1e-3 vanish in bfloat16
        zeros = torch.zeros(weight.numel(), device=weight.device, dtype=torch.float32)
        parameter = self._taken_out.pop(_join(site.host_name, part), None)
        if parameter is None:
            parameter = nn.Parameter(zeros)
        else:
            parameter.data = zeros
        site.host.register_parameter(part, parameter)

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        for site in self._sites:
            for part in ("weight", "bias"):
                tensor = getattr(site.norm, part, None)
                if tensor is not None:
                    state[_join(site.norm_name, part)] = whole(tensor.detach()).cpu().clone()
        return state

    def _find_sites(self, layers: str | None) -> list[_Site]:
        norms = _norm_layers(self.model)
        if layers is None:
            chosen = _last_block([name for name in norms if not _auxiliary(name)])
        else:
            try:
                chosen = [name for name in norms if re.search(layers, name)]
            except re.error as error:
                raise PhiError(f"layers={layers!r} is no regular expression: {error}.") from None
        sites = []
        for name in chosen:
            norm, host, host_name = norms[name], norms[name], name
            # timm's norm-and-activation layers: what comes out of `drop` is what goes into the activation
            if hasattr(norm, "act") and isinstance(getattr(norm, "drop", None), nn.Module):
                host, host_name = norm.drop, f"{name}.drop"
            if hasattr(host, SCALE):
                raise PhiError(f"{name} is modulated already: merge the first FiLM before building another.")
            dim = _channel_dim(norm, host)
            if dim is None:
                if layers is None:
                    continue  # by default, those that merge
                raise PhiError(
                    f"{name} ({type(norm).__name__}) does not compute weight * x + bias, so a FiLM behind it would not "
                    'merge into plain weights. Choose others with `layers="..."`; norm layers here: '
                    f"{', '.join(norms)}."
                )
            sites.append(_Site(name, norm, host_name, host, dim))
        if not sites:
            raise PhiError(self._no_site_message(layers, list(norms)))
        return sites

    def _find_output_bias(self, output_bias: bool | str) -> str | None:
        if not output_bias:
            return None
        layer = _output_layer(self.model)
        bias = None if layer is None else self.model.get_submodule(layer).bias
        if bias is not None:
            # of a bias that two layers share (D-FINE's, RT-DETR v2's heads), the name that the model goes by
            return next(name for name, parameter in self.model.named_parameters() if parameter is bias)
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
