"""LossAlignmentGuide: the parameters of a loss, adapted online by a policy that the metric rewards.

After adaptive loss alignment (ALA; Huang, Zhai, Talbott, Bautista, Sun, Guestrin and Susskind, arXiv 1905.05895).

From the paper: the loss -sigma(y^T Phi log f) with Phi symmetric, in [-1, 1] and the identity at the start; episodes of
one step, in which a policy changes each entry of Phi by -beta, 0 or +beta; the sign of the improvement of a discounted
metric as the reward; REINFORCE.

From a student's reimplementation (github.com/madst0614/ala-cifar100), and so not known to be the paper's: what the
state holds, one small network for all pairs of classes, a replay memory, beta = 0.1.

Ours: all sizes and the other constants below, the loss of pairs, how the loss is weighed against the task's, and that
how far it is followed is up to `Trust`, as with every guide.

A patent application, US 2020/0327450, claims this loop; its status is not known to us. Ask before you ship it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .aligned_losses import AlignedLoss, ClassLoss, PairLoss
from .base import GuideContext, Round
from .outputs import CLASSES, IDENTITIES, ReadingGuide, Rows, matched
from .set_network import linear

BETA = 0.1
DISCOUNT = 0.7  # of the metric, a round
HISTORY = 3  # rounds whose errors the state holds
STATE_SIZE = 2 * HISTORY + 1  # errors, their relative changes, the parameter, progress
HIDDEN_SIZE = 16
HALF_WAY = 10  # rounds after which progress is a half
MOST_REPLAYED = 4096  # actions that are remembered, one for each parameter and episode
POLICY_STEPS, REPLAYED_PER_STEP, LEARNING_RATE = 10, 256, 1e-2
ENTROPY_WEIGHT = 0.01


class LossAlignmentGuide(ReadingGuide):
    """Speaks through a loss of its own, whose parameters a policy moves from one round of observations to the next.

    It stands in for the task's loss, its gradient at the outputs `value_weight` times as long as that one's. It is
    judged by how its loss, with the parameters as they are, ranks real rounds' predictions: a loss that falls where the
    metric does not improve is not followed.

    Of classes the loss is ALA's; of labels that are not classes of the outputs, as with embeddings, a loss of pairs.
    With other labels it switches itself off.

    Its arguments are those of `ReadingGuide`.
    """

    kinds = (CLASSES, IDENTITIES)

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self._loss: AlignedLoss | None = None
        first, last = linear(STATE_SIZE, HIDDEN_SIZE, context.generator), linear(HIDDEN_SIZE, 3, context.generator)
        with torch.no_grad():
            last.weight.mul_(0.1)  # at first all actions are about as likely
        self._policy = nn.Sequential(first, nn.Tanh(), last)
        self._optimizer = torch.optim.Adam(self._policy.parameters(), LEARNING_RATE)
        self.parameters: Tensor | None = None  # of the loss, [p]
        self.episodes, self._step = 0, -1
        self._metric: float | None = None  # discounted
        self._errors: list[Tensor] = []  # [p] of the last rounds, the latest last
        self._tried: tuple[Tensor, Tensor] | None = None  # [p, STATE_SIZE] states and [p] actions, not yet rewarded
        # [n, STATE_SIZE], [n] and [n]
        self._replay = (torch.zeros(0, STATE_SIZE), torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    def predict_rows(self, rows: list[Rows]) -> np.ndarray | None:
        if self._loss is None:
            self._begin(rows[0])
        with torch.no_grad():
            losses = torch.stack([self._loss(some, self.parameters) for some in rows]).numpy()
        return -losses if self.context.greater_is_better else losses

    def learn_rows(self, rows: list[Rows], scores: np.ndarray, observed: Round) -> None:
        if self._loss is None:
            self._begin(rows[0])
        latest = max((t for t in (observed.trajectory, observed.interpolated) if len(t)), key=lambda t: t.steps[-1])
        if latest.steps[-1] == self._step:  # nothing was trained since the last action
            return
        self._step = int(latest.steps[-1])
        metric = float(latest.last_round.scores.mean()) * (1 if self.context.greater_is_better else -1)
        if self._metric is not None:
            self._reward(float(np.sign(metric - self._metric)))
        self._metric = metric if self._metric is None else DISCOUNT * self._metric + (1 - DISCOUNT) * metric
        errors = torch.stack([self._loss.errors(some) for some in rows]).mean(0)
        self._errors = [*(self._errors or [errors] * HISTORY)[1:], errors]
        self._act()

    def loss(self, inputs: dict[str, Any], outputs: Any, task_loss: Tensor) -> Tensor | None:
        read = self.read_batch(inputs, outputs)
        if read is None or self._loss is None:
            return None
        rows, at = read
        own = self._loss(rows, self.parameters.to(at.device))
        return matched(own, rows, at, task_loss, self.context.value_weight)

    def _begin(self, rows: Rows) -> None:
        self._loss = ClassLoss(rows.outputs.shape[1]) if rows.kind == CLASSES else PairLoss()
        self.parameters = self._loss.start.clone()

    def _state(self) -> Tensor:
        """[p, STATE_SIZE]."""
        errors = torch.stack(self._errors, 1)
        changes = (errors[:, 1:] - errors[:, :-1]) / (errors[:, :-1] + 0.01)
        progress = torch.full_like(self.parameters, self.episodes / (self.episodes + HALF_WAY))
        return torch.cat([errors, changes.clamp(-2, 2), self.parameters[:, None], progress[:, None]], 1)

    def _act(self) -> None:
        """One more episode: move every parameter by what the policy draws for it."""
        state = self._state()
        with torch.no_grad():
            chances = self._policy(state).softmax(-1)
        actions = torch.multinomial(chances, 1, generator=self.context.generator)[:, 0]
        self.parameters = (self.parameters + BETA * (actions - 1)).clamp(-1, 1)
        self._tried = state, actions
        self.episodes += 1

    def _reward(self, reward: float) -> None:
        """Reward what was tried last, and learn from all that is remembered (REINFORCE)."""
        states, actions = self._tried
        told = (states, actions, torch.full((len(actions),), reward))
        columns = zip(self._replay, told, strict=True)
        self._replay = tuple(torch.cat([old, new])[-MOST_REPLAYED:] for old, new in columns)
        for _ in range(POLICY_STEPS):
            drawn = torch.randint(len(self._replay[0]), (REPLAYED_PER_STEP,), generator=self.context.generator)
            states, actions, rewards = (column[drawn] for column in self._replay)
            log_chances = self._policy(states).log_softmax(-1)
            chosen = log_chances.gather(1, actions[:, None])[:, 0]
            entropy = -(log_chances.exp() * log_chances).sum(-1)
            loss = -((rewards - self._replay[2].mean()) * chosen + ENTROPY_WEIGHT * entropy).mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "classes": self._loss.num_classes if isinstance(self._loss, ClassLoss) else None,
            "parameters": self.parameters,
            "policy": self._policy.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "episodes": self.episodes,
            "step": self._step,
            "metric": self._metric,
            "errors": list(self._errors),
            "tried": None if self._tried is None else list(self._tried),
            "replay": list(self._replay),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.parameters = state["parameters"]
        if self.parameters is not None:
            self._loss = PairLoss() if state["classes"] is None else ClassLoss(state["classes"])
        self._policy.load_state_dict(state["policy"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.episodes, self._step, self._metric = state["episodes"], state["step"], state["metric"]
        self._errors = list(state["errors"])
        self._tried = None if state["tried"] is None else tuple(state["tried"])
        self._replay = tuple(state["replay"])
