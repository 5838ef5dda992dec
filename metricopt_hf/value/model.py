"""ValueFunction: a small ensemble that maps compact coordinates to the metric, with a mean, a spread and a gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..errors import ValueFunctionError


class ValueFunction(nn.Module, PyTorchModelHubMixin, library_name="metricopt_hf", tags=["metricopt"]):
    """An ensemble of MLPs over z: R^k -> the metric, standardised in and out.

    The paper (MetricOpt, CVPR 2021) learns one network; its layer sizes are not published. Size, ensemble and
    standardisation are this library's design.

    Args:
        num_coordinates: k.
        hidden_size: width of the two hidden layers.
        num_members: networks in the ensemble.

    Example:
        >>> import torch
        >>> value_function = ValueFunction(num_coordinates=3)
        >>> mean, std = value_function.predict(torch.zeros(5, 3))
        >>> mean.shape, std.shape, value_function.gradient(torch.zeros(3)).shape
        (torch.Size([5]), torch.Size([5]), torch.Size([3]))
    """

    def __init__(self, num_coordinates: int, hidden_size: int = 32, num_members: int = 5):
        super().__init__()
        if min(num_coordinates, hidden_size, num_members) < 1:
            raise ValueFunctionError(
                "num_coordinates, hidden_size and num_members must be at least 1, "
                f"got {num_coordinates}, {hidden_size} and {num_members}."
            )
        self.num_coordinates, self.num_members = num_coordinates, num_members
        sizes = [num_coordinates, hidden_size, hidden_size, 1]
        shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_members, i, o)) for i, o in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_members, 1, o)) for _, o in shapes)
        for name, size in (("z_mean", num_coordinates), ("z_std", num_coordinates)):
            self.register_buffer(name, torch.zeros(size) if name == "z_mean" else torch.ones(size))
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_std", torch.ones(()))
        # what the ensemble's disagreement cannot show: noise of the metric itself, standardised
        self.register_buffer("noise_std", torch.zeros(()))
        self.reset_parameters(torch.Generator().manual_seed(0))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw new weights from `generator`; the standardisation stays."""
        with torch.no_grad():
            for weight, bias in zip(self.weights, self.biases, strict=True):
                draw = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
                weight.copy_(draw)
                bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """Standardised predictions of every member. z: [n, k] -> [members, n]."""
        h = ((z - self.z_mean) / self.z_std).expand(self.num_members, *z.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h, weight)
            if i < len(self.weights) - 1:
                h = F.silu(h)  # measured: ranks new observations better than tanh, softplus or gelu
        return h.squeeze(-1)

    @torch.no_grad()
    def predict(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the metric expected at z: [n, k] (or [k]) -> [n] and [n] (or scalars)."""
        members = self(self._checked(z).reshape(-1, self.num_coordinates))
        spread = members.var(0, correction=0) + self.noise_std**2
        mean, std = members.mean(0) * self.score_std + self.score_mean, spread.sqrt() * self.score_std
        return (mean[0], std[0]) if z.dim() == 1 else (mean, std)

    def gradient(self, z: Tensor) -> Tensor:
        """Gradient of the predicted mean, in units of the metric per unit of z. z: [n, k] (or [k]) -> same shape."""
        z = self._checked(z).detach().clone().requires_grad_()
        with torch.enable_grad():
            total = self(z.reshape(-1, self.num_coordinates)).mean(0).sum()
            (gradient,) = torch.autograd.grad(total, z)
        return gradient * self.score_std

    def _checked(self, z: Tensor) -> Tensor:
        if z.dim() not in (1, 2) or z.shape[-1] != self.num_coordinates:
            raise ValueFunctionError(
                f"z must be [n, {self.num_coordinates}] or [{self.num_coordinates}], got {list(z.shape)}."
            )
        return z
