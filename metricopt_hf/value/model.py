"""ValueNetwork: a small ensemble that maps compact coordinates to the metric, with a mean, a spread and a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ValueFunctionError


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch uses one thread of the CPU.

    Networks of this size gain nothing by more, and lose by a factor of ten or more where others, such as the workers of
    a data loader, want the cores too: each product then waits for the last of its threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ValueNetwork(nn.Module):
    """An ensemble of MLPs over z: R^k -> the metric, standardised in and out.

    The paper (MetricOpt, CVPR 2021) learns one network; its layer sizes are not published. Size, ensemble and
    standardisation are this library's design.

    Args:
        num_coordinates: k.
        hidden_size: width of the two hidden layers.
        num_members: networks in the ensemble.

    Example:
        >>> import torch
        >>> network = ValueNetwork(num_coordinates=3)
        >>> mean, std = network.predict(torch.zeros(5, 3))
        >>> mean.shape, std.shape, network.gradient(torch.zeros(3)).shape
        (torch.Size([5]), torch.Size([5]), torch.Size([3]))
    """

    def __init__(self, num_coordinates: int, hidden_size: int = 32, num_members: int = 6):
        super().__init__()
        if min(num_coordinates, hidden_size, num_members) < 1:
            raise ValueFunctionError(
                "num_coordinates, hidden_size and num_members must be at least 1, "
                f"got {num_coordinates}, {hidden_size} and {num_members}."
            )
        self.num_coordinates, self.hidden_size, self.num_members = num_coordinates, hidden_size, num_members
        sizes = [num_coordinates, hidden_size, hidden_size, 1]
        shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_members, i, o)) for i, o in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_members, 1, o)) for _, o in shapes)
        self.slopes = nn.Parameter(torch.zeros(num_members, num_coordinates, 1))
        self.intercepts = nn.Parameter(torch.zeros(num_members, 1, 1))
        self.register_buffer("z_mean", torch.zeros(num_coordinates))
        self.register_buffer("z_std", torch.ones(num_coordinates))
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_std", torch.ones(()))
        # standardised noise of the metric itself, which the ensemble's disagreement cannot show
        self.register_buffer("noise_std", torch.zeros(()))
        self.reset_parameters(torch.Generator().manual_seed(0))

    @classmethod
    def started(cls, num_coordinates: int, given: ValueNetwork | None, generator: torch.Generator) -> ValueNetwork:
        """A network to fit: a copy of `given`, or, where that is None, one with weights drawn from `generator`."""
        if given is None:
            network = cls(num_coordinates)
            network.reset_parameters(generator)
        else:
            network = cls(num_coordinates, given.hidden_size, given.num_members)
            network.load_state_dict(given.state_dict())
        return network

    def negated(self) -> ValueNetwork:
        """A copy that predicts the negative of what this one does."""
        network = ValueNetwork.started(self.num_coordinates, self, torch.Generator())
        with torch.no_grad():
            for tensor in (network.weights[-1], network.biases[-1], network.slopes, network.intercepts):
                tensor.neg_()
            network.score_mean.neg_()
        return network

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw new weights from `generator`; the standardisation stays."""
        with torch.no_grad():
            for weight, bias in zip(self.weights, self.biases, strict=True):
                draw = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
                weight.copy_(draw)
                bias.zero_()
            self.weights[-1].zero_()  # at first the linear part alone, which is fitted in closed form
            self.slopes.zero_()
            self.intercepts.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """Standardised predictions of every member. z: [n, k], or for each its own [members, n, k] -> [members, n]."""
        h = ((z - self.z_mean) / self.z_std).expand(self.num_members, *z.shape[-2:])
        linear = torch.baddbmm(self.intercepts, h, self.slopes)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h, weight)
            if i < len(self.weights) - 1:
                h = F.silu(h)  # measured: ranks new observations better than tanh, softplus or gelu
        return (linear + h).squeeze(-1)

    @one_thread()
    @torch.no_grad()
    def predict(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the metric expected at z: [n, k] (or [k]) -> [n] and [n] (or scalars)."""
        members = self(self._checked(z).reshape(-1, self.num_coordinates))
        spread = members.var(0, correction=0) + self.noise_std**2
        mean, std = members.mean(0) * self.score_std + self.score_mean, spread.sqrt() * self.score_std
        return (mean[0], std[0]) if z.dim() == 1 else (mean, std)

    @one_thread()
    @torch.no_grad()
    def gradient(self, z: Tensor) -> Tensor:
        """Gradient of the predicted mean, in units of the metric per unit of z. z: [n, k] (or [k]) -> same shape.

        The backward pass by hand, equal to autograd's to the bit, in a third of the time: each update needs one.
        """
        points = self._checked(z).reshape(-1, self.num_coordinates)
        h = ((points - self.z_mean) / self.z_std).expand(self.num_members, *points.shape)
        inner = []
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            inner.append(torch.baddbmm(bias, h, weight))
            h = F.silu(inner[-1])
        gradients = self.weights[-1].mT.expand(-1, len(points), -1)
        for before, weight in zip(reversed(inner), reversed(self.weights[:-1]), strict=True):
            gradients = torch.bmm(torch.ops.aten.silu_backward(gradients, before), weight.mT)
        gradients = (gradients + self.slopes.mT) / self.z_std * self.score_std
        return gradients.mean(0).reshape(z.shape)

    def _checked(self, z: Tensor) -> Tensor:
        if z.dim() not in (1, 2) or z.shape[-1] != self.num_coordinates:
            raise ValueFunctionError(
                f"z must be [n, {self.num_coordinates}] or [{self.num_coordinates}], got {list(z.shape)}."
            )
        return z
