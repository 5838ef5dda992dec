"""ResumingTrainer: checkpoints with the state of the guidance, and going on from them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CheckpointError
from ..evaluation.ledger import Ledger
from ..phi import PhiSpace
from . import checkpoint
from .optimization import forget
from .sharing import SharingTrainer

logger = logging.getLogger(__name__)


class ResumingTrainer(SharingTrainer):
    """A guided run that was interrupted goes on as if it had not been.

    Its checkpoints hold the guidance's state beside the model's merged weights, and from them phi and what lies under
    it are put back.
    """

    guided: bool
    phi: PhiSpace
    _sharded: bool
    ledger: Ledger
    _metric_start: int
    _requires_grad: dict[str, bool] | None
    _kind_of_coordinates: str

    @property
    def _settings(self) -> dict[str, Any]:
        """What a metric phase that has begun cannot go on without."""
        args = self.args
        return {
            "phi": _named(self.phi.description),
            "guide": type(self.phase.guide).__name__,
            "metric": self.phase.metric.name,
            "greater_is_better": self.phase.metric.greater_is_better,
            "metric_constraints": args.metric_constraints,
            "coordinates": self._kind_of_coordinates,
            "phi_dim": args.phi_dim,
            "observe": args.observe,
            "metric_start_ratio": args.metric_start_ratio,
        }

    def _save_checkpoint(self, model, trial):
        guided = self.guided and not self.args.save_only_model
        saves = guided and self.args.should_save
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if saves or (guided and self._sharded):  # of a sharded model all ranks are needed to put phi together
            state = self._guidance_state(self.phase.state_dict() if self.phase.started else None)
        with checkpoint.written(folder):
            if saves:
                checkpoint.save(state, folder)
            super()._save_checkpoint(model, trial)
            if saves and os.path.isdir(folder):  # a limit on checkpoints may have removed it again
                checkpoint.vouch(folder)

    def _guidance_state(self, phase: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "phi": self.phi.state_dict(),
            "optimized": self._optimized,
            "ledger": self.ledger.state_dict(),
            "settings": self._settings,
            "phase": phase,
        }

    @property
    def _optimized(self) -> list[str]:
        """The parameters that the optimizer has moved, and keeps a state of."""
        return [name for name, parameter in self.model.named_parameters() if self.optimizer.state.get(parameter)]

    @contextmanager
    def _others_frozen(self, folder: str | None) -> Iterator[None]:
        """Inside, what the optimizer kept no state of needs no gradients: of a sharded model torch would miss it."""
        if not (self.guided and self._sharded) or folder is None:
            yield
            return
        kept = set(checkpoint.load(folder).get("optimized", self._requires_grad))
        others = [p for name, p in self.model.named_parameters() if name not in kept and p.requires_grad]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with checkpoint.readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.guided:
            self._load_phi(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        if self.guided:
            self._load_phi(self.state.best_model_checkpoint)

    def _load_phi(self, folder: str) -> None:
        """The model's weights were saved merged: put phi and what lies under it back."""
        if os.path.exists(os.path.join(folder, checkpoint.JSON_FILE)):  # else by a plain Trainer: phi is the identity
            state = checkpoint.load(folder)
            self._refuse_others(folder, state["settings"], {"phi": _named(self.phi.description)})
            self.phi.load_state_dict(state["phi"])

    def _load_optimizer_and_scheduler(self, folder):
        with checkpoint.readable(folder), self._others_frozen(folder):
            super()._load_optimizer_and_scheduler(folder)
        if not self.guided or folder is None:
            return
        state = checkpoint.load(folder)
        if state["phase"] is None:
            self.ledger.load_state_dict(state["ledger"])
            return
        self._refuse_others(folder, state["settings"], self._settings)
        phase = state["phase"]
        start = phase["start_step"]
        if phase["before"] or start >= self._metric_start:
            self.ledger.load_state_dict(state["ledger"])
            self.phase.load_state_dict(phase)
        elif self.state.global_step <= self._metric_start:
            self._begin_anew(folder, start)
        else:
            raise CheckpointError(
                f"{folder} was saved in a metric phase that began at step {start}; in this run it begins at "
                f"{self._metric_start}, and step {self.state.global_step} lies behind. Resume with the same max_steps "
                "or num_train_epochs, or with so many more that the first phase goes on; or begin a new run from its "
                "weights."
            )

    def _begin_anew(self, folder: str, start: int) -> None:
        """The run was lengthened: what was tuned becomes plain weights, and the first phase goes on with them."""
        logger.warning(
            f"{folder} is of a metric phase that began at step {start}; this run is longer, and its own begins at step "
            f"{self._metric_start}. What was tuned is merged into the weights, the first phase goes on, and guidance "
            "begins anew, with a budget of its own."
        )
        self.phi.merge()
        self.phi.attach()
        forget(self.optimizer, self.phi.parameters)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # not phi's

    def _refuse_others(self, folder: str, saved: dict[str, Any], ours: dict[str, Any]) -> None:
        """Raises CheckpointError where the run that saved was another one."""
        for name, value in ours.items():
            if saved[name] != value:
                raise CheckpointError(
                    f"{folder} was saved by a run with {name}={saved[name]!r}, this one has {name}={value!r}: resume "
                    "with the same, or begin a new run from its weights (load the model from that folder, and call "
                    "train() without resume_from_checkpoint)."
                )


def _named(description: dict[str, Any]) -> str:
    """A phi in one line."""
    return f"{description['kind']} on {', '.join(name for name, _ in description['parameters'])}"
