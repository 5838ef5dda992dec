"""Building: the parts of a guided run, made for a trainer, and put back from a checkpoint."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer

from .. import guides
from ..errors import CheckpointError, MetricError
from ..evaluation import data
from ..evaluation.columns import explain_labels, forgotten_columns
from ..evaluation.ledger import Ledger
from ..phase.phase import MetricPhase
from ..phase.plan import PhasePlan
from ..phase.selection import Selection
from ..value import ValueNetwork
from . import checkpoint, preflight
from .observing import Observing
from .setup import Setup
from .subclasses import is_overridden

logger = logging.getLogger(__name__)

POST_PROCESS = (
    "{}() is overridden here. If it makes something else of the predictions before it calls compute_metrics, hand the "
    "same over: post_process_function=f, with f(examples, features, predictions) -> EvalPrediction "
    "(docs/your_metric.md). "
    "If it makes or renames metrics itself, pass the one to optimise: metric=Metric(compute_metrics, 'its name')."
)


def phase(trainer: Any, setup: Setup, steps: int) -> MetricPhase:
    """The metric phase of a run.

    Args:
        steps: its optimizer steps.
    """
    args, seen, ledger = trainer.args, Observing(trainer, setup.metric, setup.phi), Ledger()
    plan = PhasePlan.from_args(args, steps, setup.metric.of_predictions)
    selects = setup.selection is not None or not setup.metric.of_predictions
    selector = seen.evaluator(setup.selection, ledger, "selection") if selects else None
    given, spec = trainer.given.guide, trainer.given.guide_name(args)
    value_function = setup.value_function
    coordinates = None if value_function is None else value_function.coordinates_from(setup.phi.read())
    network: ValueNetwork | None = value_function
    if network is not None and not setup.metric.greater_is_better:  # guides go up
        network = network.negated()

    def make_guides(linearised: bool) -> dict[str, guides.Guide]:
        if isinstance(given, guides.Guide):
            return {spec: given}
        found = guides.from_spec(spec, linearised)
        if value_function is not None and spec == guides.AUTO:
            found["value_function"] = guides.ValueFunctionGuide()
        return found

    return MetricPhase(
        seen.evaluator(setup.observation, ledger),
        Selection(selector, setup.phi, plan.on_all_rows),
        plan,
        make_guides,
        partial(optimizer_over, trainer),
        seen.loss_gradients,
        plan.observing_scores(args),
        coordinates,
        network,
    )


def optimizer_over(trainer: Trainer, parameter: Tensor, rate: float) -> Optimizer:
    """An optimizer of the user's class over the coordinates of phi; Adam where that class wants a model."""
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        options = {k: value for k, value in options.items() if k not in ("lr", "params", "model", "optimizer_dict")}
        return cls([parameter], **{**options, "lr": rate, "weight_decay": 0.0})
    except Exception:  # such as one of blocks of weights, or of layers by name
        return torch.optim.Adam([parameter], rate)


def check_metric(trainer: Any, setup: Setup, run: MetricPhase) -> None:
    """The metric's first call, before any training time is spent.

    Raises:
        MetricError: it fails; the message shows its input, and a column that may be missing.
    """
    evaluator, metric = run.evaluator, setup.metric
    before = evaluator.ledger.seconds["check"]
    try:
        score, prediction = evaluator.evaluate_with_predictions("check")
    except MetricError as error:
        asked = "a copy of the model"
        if metric.of_predictions:
            asked = "an EvalPrediction of all of that set (predictions, label_ids as numpy arrays), or of a part,"
        hints = _label_hint(trainer, setup, evaluator.predict, str(error)), _override_hint(trainer)
        raise MetricError(
            "\n".join([str(error), *(hint for hint in hints if hint)])
            + "\nThis was the first call of the metric, on the observation set, before training; nothing was trained. "
            f"The metric is called with {asked} and must return one finite number, or a dict that holds one."
        ) from error
    if metric.of_predictions and prediction is not None:
        _warn_of_places(trainer, setup, run, float(score))
    direction = "greater" if metric.greater_is_better else "smaller"
    logger.info(
        f"{metric.name} before training: {score:.4f} on the observation set ({direction} is better; "
        f"{evaluator.ledger.seconds['check'] - before:.2f} s)."
    )


def _label_hint(trainer: Any, setup: Setup, predict: Any, error: str) -> str | None:
    """The faults of the label columns, where predictions lack labels, or one that the metric wants."""
    seen = getattr(predict, "__self__", None)
    batch, forward = None if seen is None else seen.unlabelled, getattr(trainer.model, "forward", None)
    if batch is None:
        return forgotten_columns(trainer.label_names, setup.observation, forward, error)
    whole = preflight.metric_columns(trainer.label_names, trainer.model)
    return explain_labels(trainer.label_names, batch, setup.observation, forward, whole)


def _override_hint(trainer: Any) -> str | None:
    if trainer.post_process_function is not None:
        return None
    overridden = next((name for name in ("evaluate", "evaluation_loop") if is_overridden(trainer, name)), None)
    return None if overridden is None else POST_PROCESS.format(overridden)


def _warn_of_places(trainer: Any, setup: Setup, run: MetricPhase, score: float) -> None:
    """Warn of a metric that looks rows up by their place but gets parts of `eval_dataset`: in another order of the rows
    it returns another number than `score`."""
    evaluator = run.evaluator
    if trainer.metric_inputs.completes or not data.is_part(setup.observation):
        return
    try:
        for order in range(3):  # a coarse metric may have the same value by chance
            other = evaluator.evaluate("check", partial(data.reordered, order=order))
            if np.isclose(other, score):
                continue
            if np.isclose(evaluator.evaluate("check"), score):  # else it is never twice the same
                logger.warning(
                    f"In another order of the same rows {evaluator.metric.name} is {other:g} instead of {score:g}: "
                    "does it look rows up by their place in eval_dataset? It is given random parts of that. Set "
                    'include_for_metrics=["indices"] and look up prediction.indices, or pass an '
                    "observation_dataset and a selection_dataset that it knows, with "
                    'observe="predictions_on_all_rows".'
                )
            return
    except MetricError:
        pass


# Checkpoints


def settings_of(trainer: Any) -> dict[str, Any]:
    """The settings that a run must share with the one whose checkpoint it resumes, as JSON values."""
    args, setup = trainer.args, trainer.settled()
    sets = setup.observation, setup.selection
    names = [name for name, _ in setup.phi.description["parameters"]]
    return {
        "phi": f"{setup.phi.description['kind']} on {', '.join(names)}",
        "guide": trainer.given.guide_name(args),
        "metric": setup.metric.name,
        "greater_is_better": setup.metric.greater_is_better,
        "metric_inputs": args.metric_inputs,
        "metric_kwargs": str(args.to_dict()["metric_kwargs"]),
        "metric_call_budget": args.metric_call_budget,
        "phi_dim": args.phi_dim,
        "phi_learning_rate": args.phi_learning_rate,
        "observe": args.observe,
        "seed": args.seed,
        "observation_size": args.observation_size,
        "rows of observation and selection": [len(part) if hasattr(part, "__len__") else None for part in sets],
        "value_weight": str(args.value_weight),
    }


def state_of(trainer: Any) -> dict[str, Any]:
    """The state of the guidance: nested dicts and lists of tensors and plain values."""
    run = trainer.phase
    return {
        "ledger": run.ledger.state_dict(),
        "phi": run.phi.state_dict() if run.started else None,
        "phase": run.state_dict() if run.started else None,
    }


def resume(trainer: Any, folder: str, start: int) -> None:
    """Load the state that `state_of` saved, after model, optimizer and schedule.

    Args:
        start: the first metric step of this run.

    Raises:
        CheckpointError: the checkpoint is of another run, or of a metric phase that this run's does not go on with.
    """
    run, state = trainer.phase, checkpoint.load(folder)
    checkpoint.check_settings(folder, trainer.checkpoint_settings or {}, settings_of(trainer))
    saved = state["phase"]
    if saved is None:
        run.ledger.load_state_dict(state["ledger"])
    elif saved["start_step"] == start:
        run.ledger.load_state_dict(state["ledger"])
        run.phi.load_state_dict(state["phi"])
        run.load_state_dict(saved)
    elif trainer.state.global_step <= start:
        logger.warning(
            f"{folder} is of a metric phase that began at step {saved['start_step']}; this run is longer, and its own "
            f"begins at step {start}. The loss goes on with the weights as they are, and guidance begins anew, with a "
            "budget of its own."
        )
    else:
        raise CheckpointError(
            f"{folder} was saved in a metric phase that began at step {saved['start_step']}; in this run it begins at "
            f"{start}, and step {trainer.state.global_step} lies behind. Resume with the same max_steps or "
            "num_train_epochs, or with enough more to stay before the metric phase; or begin a new run "
            "from its weights."
        )
