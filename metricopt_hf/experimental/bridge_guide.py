"""BridgeGuide: the metric as the function that is bridged; a network of sets stands in for it, and has a gradient.

After differentiable approximation bridges (Ramapuram and Webb, arXiv 1905.03658; see `metricopt_hf.Bridge` for
functions inside of a model). There the function is known and cheap; here it is the black box, so the network learns
from the calls that the phase makes anyway. Architecture, constants and the weighing of its gradient are ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from . import outputs as reading
from .base import GuideContext, Round
from .outputs import CLASSES, NUMBERS, ReadingGuide, Rows
from .set_network import SetNetwork, fit

# optimizer steps of a fit: the first, and those that go on from it
FIRST_FIT_STEPS, WARM_FIT_STEPS = 60, 10
# outputs that are kept to be fitted to, in numbers; the oldest round goes first
MOST_NUMBERS = 2**22


class BridgeGuide(ReadingGuide):
    """Speaks through the loss: the metric that a network of sets expects of the batch's outputs and labels.

    The network (`SetNetwork`) is fitted to the metric of the sets on which the phase calls it: random halves of
    interpolated predictions, and all rows of real ones. So it takes no pass and no call of its own. It is judged by how
    it ranks real rounds' predictions. Beside the task's loss, its gradient at the outputs is as long as `value_weight`
    says. What the metric knows beside outputs and labels, such as groups, it does not see.

    Needs outputs and labels that are rows, with classes or numbers for labels; elsewhere it switches itself off.

    Its arguments are those of `ReadingGuide`.
    """

    kinds = (CLASSES, NUMBERS)

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self._network: SetNetwork | None = None
        # of sets with the same labels: [m, n, c] outputs, their labels, [m] scores
        self._rounds: list[tuple[Tensor, Tensor, Tensor]] = []

    def predict_rows(self, rows: list[Rows]) -> np.ndarray | None:
        if self._network is None:
            return None
        with torch.no_grad():
            return torch.stack([self._network.predict(some) for some in rows]).numpy()

    def learn_rows(self, rows: list[Rows], scores: np.ndarray, observed: Round) -> None:
        steps = WARM_FIT_STEPS
        if self._network is None:
            whole = Rows(torch.cat([some.outputs for some in rows]), rows[0].labels, self.kind)
            self._network, steps = SetNetwork(whole, self.context.generator), FIRST_FIT_STEPS
        start = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or not torch.equal(rows[end].labels, rows[start].labels):
                outputs = torch.stack([some.outputs for some in rows[start:end]])
                told = torch.as_tensor(scores[start:end], dtype=torch.float32)
                self._rounds.append((outputs, rows[start].labels, told))
                start = end
        while len(self._rounds) > 1 and sum(outputs.numel() for outputs, *_ in self._rounds) > MOST_NUMBERS:
            del self._rounds[0]
        fit(self._network, self._rounds, steps, self.context.generator)

    def loss(self, inputs: dict[str, Any], outputs: Any, task_loss: Tensor) -> Tensor | None:
        read = self.read_batch(inputs, outputs)
        if read is None or self._network is None:
            return None
        rows, at = read
        tensors = {**dict(self._network.named_parameters()), **dict(self._network.named_buffers())}
        tensors = {name: tensor.detach().to(at.device) for name, tensor in tensors.items()}
        score = functional_call(self._network, tensors, (rows.outputs, rows.labels))
        worse = -score if self.context.greater_is_better else score
        return task_loss + reading.matched(worse, rows, at, task_loss, self.context.value_weight)

    def state_dict(self) -> dict[str, Any]:
        network = self._network
        return {
            **super().state_dict(),
            "network": None if network is None else network.state_dict(),
            "rounds": [list(some) for some in self._rounds],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._rounds = [tuple(some) for some in state["rounds"]]
        self._network = None
        if state["network"] is not None:
            outputs, labels, _ = self._rounds[0]
            self._network = SetNetwork(Rows(outputs[0], labels, self.kind), torch.Generator())
            self._network.load_state_dict(state["network"])
