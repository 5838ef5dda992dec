"""Sharing: Trainer's saves, cards and pushes, with the value function beside the model."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel
from transformers.modelcard import TrainingSummary, make_markdown_table
from transformers.trainer_utils import HubStrategy

from ..errors import ValueFunctionError
from ..hub import ValueFunction, cards, client
from ..phi.space import model_class
from ..redaction import shareable
from ..value.serialization import replace_file

logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextmanager
def whole_weights(trainer: Any, of_checkpoint: bool) -> Iterator[None]:
    """Inside, a model that FSDP2 has sharded is saved whole, whatever form its checkpoints have."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.phase is None or plugin is None or of_checkpoint:
        yield
        return
    kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind


@contextmanager
def shareable_args(trainer: Any) -> Iterator[None]:
    """Inside, the `training_args.bin` that Trainer writes holds no secrets: it is pushed with the model."""
    args, trainer.args = trainer.args, shareable(trainer.args)
    try:
        yield
    finally:
        trainer.args = args


def save_value_function(trainer: Any, output_dir: str, **fields: Any) -> None:
    """Write the value function of a run whose metric phase has ended into a folder in `output_dir`.

    Args:
        fields: for its card, see `cards.render`.
    """
    if (value_function := _value_function(trainer)) is None:
        return
    try:
        fields = {"repo": repository(trainer), "observed": trainer.phase.plan.observe, **fields}
        value_function.save_pretrained(os.path.join(output_dir, client.SUBFOLDER), fields)
    except ValueFunctionError as error:  # the model is saved all the same
        logger.warning(str(error))


def arguments_of(method: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `method`, by name."""
    return dict(inspect.signature(method).bind(*args, **kwargs).arguments)


def write_cards(trainer: Any, given: dict[str, Any], scores: Mapping[str, float], comparison: str | None) -> None:
    """The cards of model and value function; see `MetricOptTrainer.create_model_card`.

    Args:
        given: arguments of Trainer's own `create_model_card`.
    """
    if not trainer.is_world_process_zero():
        return
    path = os.path.join(trainer.args.output_dir, "README.md")
    if os.path.exists(path):
        old, mine = _tags(path), given.get("tags") or []
        given["tags"] = list(dict.fromkeys([*([mine] if isinstance(mine, str) else mine), *old]))
    if getattr(trainer.model, "config", None) is None:
        given.setdefault("finetuned_from", "")  # Trainer would take it from the config
    summary = TrainingSummary.from_trainer(trainer, **given)
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    replace_file(Path(path), cards.printable(str(_card(trainer, summary, scores, comparison))).encode())
    if _is_peft(trainer.model):
        trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(trainer.args.output_dir)
    save_value_function(
        trainer,
        trainer.args.output_dir,
        comparison=comparison,
        task=_first(summary.tasks),
        dataset=_dataset(summary),
        license=summary.license,
    )


def _card(trainer: Any, summary: TrainingSummary, scores: Mapping[str, float], comparison: str | None) -> ModelCard:
    result = trainer.result
    metadata = summary.create_metadata()
    index = metadata.pop("model-index")
    if not isinstance(trainer.model, PreTrainedModel):
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
    return cards.render(
        "model",
        data,
        name=summary.model_name,
        repo=repository(trainer),
        finetuned_from=summary.finetuned_from,
        task=task,
        dataset=", ".join(_listed(summary.dataset)),
        metric=result.metric,
        greater_is_better=result.greater_is_better,
        scores=scores,
        selected=result.chosen.score if result.chosen.known else None,
        before=result.start.score if result.start.known else None,
        candidates=len(result.candidates),
        kind=result.chosen.kind,
        why=result.why,
        taken=result.taken,
        steps=len(result.curve),
        observed=result.observed,
        evaluation={k: v for k, v in (summary.eval_results or {}).items() if isinstance(v, float)},
        comparison=comparison,
        calls={purpose: count for purpose, count in result.ledger.calls.items() if count},
        passes=result.ledger.passes,
        seconds=result.ledger.seconds,
        phi=result.phi,
        phi_dim=result.coordinates.origin.numel(),
        num_coordinates=result.coordinates.dim,
        coordinates=result.coordinates.kind,
        is_peft=_is_peft(trainer.model),
        is_transformers=type(trainer.model).__module__.startswith("transformers."),
        model_class=model_class(trainer.model),
        has_value_function=_value_function(trainer) is not None,
        hyperparameters=summary.hyperparameters or {},
        versions=_versions(),
        training_results=make_markdown_table([cards.plain(dict(line)) for line in summary.eval_lines or []]),
    )


def repository(trainer: Any) -> str:
    """The repository's name, as far as it is known."""
    name = trainer.args.hub_model_id or os.path.basename(os.path.abspath(trainer.args.output_dir))
    return getattr(trainer, "hub_model_id", None) or name


def pushed(trainer: Any, upload: Callable[[], T]) -> T:
    """The result of `upload`, which is tried again where the Hub fails for a moment.

    Raises:
        HubError: it failed for good; what to do, and where the files are.
    """
    return client.push(upload, repository(trainer), _kept(trainer))


def before_push(trainer: Any) -> None:
    """Warn of a failed push in the background, and write the cards for the next one."""
    warn_of_failed_pushes(trainer)
    args = trainer.args
    will_push = trainer.is_world_process_zero() and args.hub_strategy != HubStrategy.END
    if will_push and (args.hub_always_push or trainer.push_in_progress is None) and trainer.phase is not None:
        trainer.create_model_card(model_name=repository(trainer).rpartition("/")[2])


def warn_of_failed_pushes(trainer: Any) -> None:
    """Warn of a failed push in the background, which Trainer never checks."""
    current = getattr(trainer, "push_in_progress", None)
    if current is None or not current.is_done():
        return
    trainer.push_in_progress = None
    for job in current.jobs:
        if (error := job.exception()) is not None:
            why = client.why_not_pushed(error, repository(trainer), _kept(trainer))
            logger.warning(f"{why} The next push brings all of it.")


def _kept(trainer: Any) -> str:
    if trainer.phase is None:
        return "nothing was trained or pushed yet"
    return f"everything is in {trainer.args.output_dir}; push_to_hub() pushes it again"


def _tags(path: str) -> list[str]:
    """The tags of a card, as far as it can be read: people may have written it in any encoding."""
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.tags or []
    except (UnicodeError, ValueError):
        return []


def _value_function(trainer: Any) -> ValueFunction | None:
    """The value function of a run whose metric phase has ended; None if there is none to save."""
    phase = trainer.phase
    return trainer.result.value_function if phase is not None and phase.finished else None


def _versions() -> str:
    """The versions of the libraries that tuned the model."""
    ours = version("metricopt_hf")
    return f"transformers {transformers.__version__}, torch {torch.__version__}, metricopt_hf {ours}"


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
