"""SharingTrainer: Trainer's saves, cards and pushes, with the value function beside the model."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel, Trainer
from transformers.modelcard import TrainingSummary, make_markdown_table
from transformers.trainer_utils import HubStrategy

from ..errors import ValueFunctionError
from ..hub import ValueFunction, cards, client
from ..phi.space import model_class
from ..redaction import shareable
from ..value.serialization import replace_file
from .phase import MetricPhase
from .result import RunResult

logger = logging.getLogger(__name__)


class SharingTrainer(Trainer):
    """What a guided run leaves behind for others: a model, its value function in a folder in it, and a card.

    Whatever saves or pushes the model, at the end or along the way (`hub_strategy`), takes all three.
    """

    phase: MetricPhase | None = None

    @property
    def result(self) -> RunResult | None:
        """The result of the last run, or of this one so far; None before its metric phase."""
        return self.phase.result() if self.phase is not None and self.phase.started else None

    @property
    def value_function(self) -> ValueFunction | None:
        """A copy of the last run's value function; None before there was one, or with a guide that has none."""
        return None if self.phase is None else self.phase.value_function

    def save_model(self, output_dir=None, _internal_call=False):
        """As of Trainer. A model that FSDP2 has sharded is put together for it, whatever form its checkpoints have."""
        of_checkpoint = _internal_call and output_dir is not None and not self.args.push_to_hub
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.phase is None or plugin is None or of_checkpoint:
            return super().save_model(output_dir, _internal_call)
        kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = kind

    def _save(self, output_dir=None, state_dict=None):
        with self._shareable_args():
            super()._save(output_dir, state_dict)
        if self.args.should_save:  # Trainer calls this on every rank, and one of them writes
            self._save_value_function(self.args.output_dir if output_dir is None else output_dir)

    @contextmanager
    def _shareable_args(self) -> Iterator[None]:
        """Inside, the `training_args.bin` that Trainer writes holds no secrets: it is pushed with the model."""
        args, self.args = self.args, shareable(self.args)
        try:
            yield
        finally:
            self.args = args

    def _save_value_function(self, output_dir: str) -> None:
        result = self.result
        if result is not None and result.value_function is not None:
            figures = {"rank_correlation": result.rank_correlation, "trust": result.trust, **self._card_fields}
            folder = os.path.join(output_dir, client.SUBFOLDER)
            try:
                result.value_function.save_pretrained(folder, {"repo": self._repo, **figures})
            except ValueFunctionError as error:  # the model is saved, and training goes on
                logger.warning(str(error))

    # Cards

    # fields that both cards share, from the last call of `create_model_card`
    _card_fields: Mapping[str, Any] = {}

    def create_model_card(self, *args, scores: Mapping[str, float] | None = None, comparison=None, **kwargs) -> None:
        """Write the cards of model and value function into `output_dir`.

        Takes all arguments of `Trainer.create_model_card`, and:

        Args:
            scores: the metric on splits that neither training nor selection saw, by the split's name; they become the
                `model-index`, where the task and the data set are known.
            comparison: Markdown on what other methods reached, such as a table.
        """
        if self.result is None:
            return super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
        path = os.path.join(self.args.output_dir, "README.md")
        if os.path.exists(path):
            old = _tags(path)
            mine = given.get("tags") or []
            given["tags"] = list(dict.fromkeys([*([mine] if isinstance(mine, str) else mine), *old]))
        if getattr(self.model, "config", None) is None:
            given.setdefault("finetuned_from", "")  # Trainer would take it from the config
        summary = TrainingSummary.from_trainer(self, **given)
        os.makedirs(self.args.output_dir, exist_ok=True)
        replace_file(Path(path), cards.printable(str(self._card(summary, scores or {}, comparison))).encode())
        if _is_peft(self.model):
            self.accelerator.unwrap_model(self.model).create_or_update_model_card(self.args.output_dir)
        self._card_fields = {
            "comparison": comparison,
            "task": _first(summary.tasks),
            "dataset": _dataset(summary),
            "license": summary.license,
        }
        self._save_value_function(self.args.output_dir)

    def _card(self, summary: TrainingSummary, scores: Mapping[str, float], comparison: str | None) -> ModelCard:
        result = self.result
        selections = [row["selection"] for row in result.curve if row["selection"] is not None]
        metadata = summary.create_metadata()
        index = metadata.pop("model-index")
        if not isinstance(self.model, PreTrainedModel):
            metadata["library_name"] = "pytorch"
        metadata["tags"] = list(dict.fromkeys([*metadata.get("tags", []), cards.TAG]))
        metadata["metrics"] = list(dict.fromkeys([*metadata.get("metrics", []), cards.printable(result.metric)]))
        if index[0]["results"]:
            metadata["model-index"] = index
        data = ModelCardData(**metadata)
        task, dataset = _first(summary.tasks), _dataset(summary)
        if scores and task is not None and dataset is not None:
            data.model_name = summary.model_name
            data.eval_results = (data.eval_results or []) + [
                EvalResult(
                    task, *dataset, cards.printable(result.metric), float(score),
                    metric_name=cards.printable(f"{result.metric} ({split})"),
                )
                for split, score in scores.items()
            ]
        correlation = result.rank_correlation
        return cards.render(
            "model",
            data,
            name=summary.model_name,
            repo=self._repo,
            finetuned_from=summary.finetuned_from,
            task=task,
            dataset=", ".join(_listed(summary.dataset)),
            metric=result.metric,
            greater_is_better=result.greater_is_better,
            scores=scores,
            selected=result.best_score if result.best_phi is not None else None,
            before=selections[0] if selections else None,
            candidates=len(selections),
            bias_tuned=result.bias_tuned,
            constraints=[str(check) for check in result.constraints],
            evaluation={k: v for k, v in (summary.eval_results or {}).items() if isinstance(v, float)},
            comparison=comparison,
            calls={purpose: count for purpose, count in result.ledger.calls.items() if count},
            seconds=result.ledger.seconds,
            rank_correlation=correlation if np.isfinite(correlation) else None,
            trust=result.trust,
            phi=result.phi,
            phi_dim=result.coordinates.origin.numel(),
            num_coordinates=result.coordinates.dim,
            coordinates=result.coordinates.kind,
            is_peft=_is_peft(self.model),
            is_transformers=type(self.model).__module__.startswith("transformers."),
            model_class=model_class(self.model),
            has_value_function=result.value_function is not None,
            hyperparameters=summary.hyperparameters or {},
            training_results=make_markdown_table([cards.plain(dict(line)) for line in summary.eval_lines or []]),
        )

    # Pushes

    @property
    def _repo(self) -> str:
        """The repository's name, as far as it is known by now."""
        name = self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
        return getattr(self, "hub_model_id", None) or name

    def init_hf_repo(self, *args, **kwargs):
        kept = "nothing was trained or pushed yet" if self.phase is None else self._kept
        return client.push(lambda: super(SharingTrainer, self).init_hf_repo(*args, **kwargs), self._repo, kept)

    def push_to_hub(self, *args, **kwargs):
        """As `Trainer.push_to_hub`: pushes `output_dir` with model, card and value function. Takes the arguments of
        `create_model_card` too.

        Raises:
            HubError: why it failed and what to do; everything is still in `output_dir`, and a second call pushes it.
        """
        return client.push(lambda: super(SharingTrainer, self).push_to_hub(*args, **kwargs), self._repo, self._kept)

    def _push_from_checkpoint(self, checkpoint_folder):
        self._tell_failed_pushes()
        will_push = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        will_push = will_push and (self.args.hub_always_push or self.push_in_progress is None)
        if will_push and self.phase is not None:
            self.create_model_card(model_name=self._repo.rpartition("/")[2])
        with self._shareable_args():
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self):
        super()._finish_current_push()
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """Trainer pushes in the background and never checks whether that succeeded."""
        current = getattr(self, "push_in_progress", None)
        if current is None or not current.is_done():
            return
        self.push_in_progress = None
        for job in current.jobs:
            if (error := job.exception()) is not None:
                why = client.why_not_pushed(error, self._repo, self._kept)
                logger.warning(f"{why} The next push brings all of it.")

    @property
    def _kept(self) -> str:
        return f"everything is in {self.args.output_dir}; push_to_hub() pushes it again"


def _tags(path: str) -> list[str]:
    """Those of a card, as far as it can be read: people write them, in whatever encoding."""
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.tags or []
    except (UnicodeError, ValueError):
        return []


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "create_or_update_model_card")


def _listed(value: Any) -> list[str]:
    """`TrainingSummary` has one or several of a thing, or a None for a data set that was made in memory."""
    return [item for item in ([value] if isinstance(value, str) else value or []) if item is not None]


def _first(value: Any) -> str | None:
    return next(iter(_listed(value)), None)


def _dataset(summary: TrainingSummary) -> tuple[str, str] | None:
    """(type, name) of the data set; its name on the Hub serves for both where only one is known."""
    name = _first(summary.dataset)
    return None if name is None else (_first(summary.dataset_tags) or name, name)
