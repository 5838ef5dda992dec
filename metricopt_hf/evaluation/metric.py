"""Metric: the user's black box, called with predictions and labels, answering one finite number.

Nobody looks inside. What comes out is checked, what goes in is a copy, and what a call changes elsewhere (see
`world_kept`) is put back. So a metric that changes its inputs, prints, or reseeds cannot disturb the run, and
whatever it answers or raises, a call ends in one finite number or in a `MetricError`.
"""

from __future__ import annotations

import copy
import inspect
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import evaluate
import numpy as np
import torch
from scipy.special import expit, softmax
from transformers import EvalPrediction

from .. import metrics as shipped_metrics
from ..errors import ConfigurationError, MetricError, brief
from .answer import plain, score_of, values_of, weights_of
from .constraints import Constraint, ConstraintCheck, shortfall
from .direct import DirectModule
from .direction import given

INPUTS = ("auto", "argmax", "scores", "identity")
AUTOCAST = ("cpu", "cuda")  # devices whose autocast state is put back
PENALTY = 20.0  # of a constraint's relative shortfall, in units of the score

# Global state that a metric may change unnoticed: how to read it, and how to set it.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (lambda: [_autocast(kind) for kind in AUTOCAST], lambda states: [_set_autocast(*state) for state in states]),
    (np.geterr, lambda errors: np.seterr(**errors)),
    (lambda: list(warnings.filters), lambda filters: (warnings.resetwarnings(), warnings.filters.extend(filters))),
    *(
        (lambda name=name: getattr(torch.backends.cudnn, name), lambda value, name=name: _set_cudnn(name, value))
        for name in ("deterministic", "benchmark")
    ),
)


def _autocast(kind: str) -> tuple[str, bool, torch.dtype]:
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _set_autocast(kind: str, enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled(kind, enabled)
    torch.set_autocast_dtype(kind, dtype)


def _set_cudnn(name: str, value: bool) -> None:
    setattr(torch.backends.cudnn, name, value)


_kept = threading.local()  # whether a context of `world_kept` is open


@contextmanager
def world_kept() -> Iterator[None]:
    """On leaving, random states, torch's and numpy's settings, warning filters and working directory are as before.

    Inside of another one nothing is done: many calls in a row are put back once.
    """
    if getattr(_kept, "open", False):
        yield
        return
    _kept.open = True
    try:
        with _world_kept():
            yield
    finally:
        _kept.open = False


@contextmanager
def _world_kept() -> Iterator[None]:
    folder = None
    with suppress(OSError):  # it may have been removed
        folder = os.getcwd()
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    before = [read() for read, _ in _SETTINGS]
    try:
        yield
    finally:
        for (read, write), value in zip(_SETTINGS, before, strict=True):
            if read() != value:
                write(value)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        for device, state in enumerate(cuda_states):
            torch.cuda.set_rng_state(state, device)
        with suppress(OSError):
            if folder is not None and os.getcwd() != folder:
                os.chdir(folder)


class Metric:
    """A black box with a name, a direction and checks.

    Args:
        function: `EvalPrediction -> number or dict`; what Trainer's `compute_metrics` is.
        name: the key to read from a dict (with or without Trainer's "eval_" prefix), and the name in logs and cards;
            or a weighted sum of several, such as "0.7*f1+0.3*recall".
        greater_is_better: which way is better.
        timeout: seconds after which a call is given up, None for never. With it, calls run in a thread of their own,
            which cannot be killed: it is abandoned, and no other call is made until it has come back.
        exact: the dict must have that key; else a single entry will do, whatever it is called.
        batchwise: the function is written for Trainer's `batch_eval_metrics`: called with one batch after the other, as
            tensors, and `compute_result`, which is True with the last.

    `of_predictions`: whether it is a function of predictions, so that it can be asked about others than the model's.

    Attributes:
        constraints: on other numbers of the dict, which come before the metric's own (`metric_constraints`).

    Example:
        >>> import numpy as np
        >>> accuracy = Metric(lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}, "accuracy")
        >>> accuracy(EvalPrediction(predictions=np.eye(2), label_ids=np.array([0, 0])))
        0.5
    """

    of_predictions = True

    def __init__(
        self,
        function: Callable[[EvalPrediction], Any],
        name: str,
        greater_is_better: bool = True,
        timeout: float | None = None,
        exact: bool = False,
        batchwise: bool = False,
    ):
        self.function, self.name, self.timeout = function, str(name), plain(timeout)
        self.greater_is_better = bool(given(greater_is_better))
        self.exact, self.batchwise = exact, batchwise
        self.constraints: tuple[Constraint, ...] = ()
        self._abandoned: threading.Thread | None = None
        self._unit: float | None = None  # size of the first score

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the numbers that scores bring along: those of the constraints, in their order, then the sum's."""
        return (*(constraint.key for constraint in self.constraints), *weights_of(self.name))

    def merit(self, score: float) -> float:
        """By which scores are compared: greater is better, and what misses constraints is penalised.

        The penalty is `PENALTY` times the shortfall (see `Constraint`), in units of the first score that was asked for,
        so that a bound missed by a hundredth costs as much as a fifth of the score.
        """
        if self._unit is None:
            self._unit = abs(float(score)) or 1.0
        return self.sign * float(score) - PENALTY * self._unit * self.shortfall(score)

    def shortfall(self, score: float) -> float:
        """By how much a score's values miss the constraints, see `Constraint`; 0 where all hold."""
        return shortfall(self.constraints, values_of(score)[: len(self.constraints)])

    def checks(self, values: Sequence[float], errors: Sequence[float] | None = None) -> tuple[ConstraintCheck, ...]:
        """Which constraints hold.

        Args:
            values: [m] of `keys`, as a score brings them along.
            errors: [m] their standard errors, where they are known.
        """
        errors = [float("nan")] * len(values) if errors is None else errors
        return tuple(
            ConstraintCheck(str(constraint), float(value), constraint.shortfall(value) == 0, float(error))
            for constraint, value, error in zip(self.constraints, values, errors, strict=False)
        )

    @property
    def sign(self) -> int:
        """+1 where greater is better, else -1."""
        return 1 if self.greater_is_better else -1

    def __call__(
        self, prediction: EvalPrediction, complete: Callable[[EvalPrediction], EvalPrediction] | None = None
    ) -> float:
        """The metric of `prediction`.

        Args:
            complete: what is made of a copy of it first; its errors are the metric's.

        Raises:
            MetricError: it raised (`SystemExit` too, but not `KeyboardInterrupt`), timed out, or answered something
                that is not one finite number; or the model predicted nothing but nan, of which no answer is right.
        """
        return self._call(_as_tensors(prediction) if self.batchwise else prediction, complete, last=True)

    def over(self, batches: Iterable[EvalPrediction]) -> float:
        """The metric of a set that comes batch by batch, for a `batchwise` function. Raises as `__call__`."""
        batch = None
        try:
            for following in batches:
                if batch is not None:
                    self._call(batch, last=False)
                batch = following
            return self._call(batch, last=True)
        except MetricError:
            with suppress(MetricError):  # what it has gathered must not count with the next set
                self._call(batch, last=True)
            raise

    def _call(self, prediction: EvalPrediction, complete: Callable | None = None, last: bool = True) -> float:
        if _nothing_finite(prediction.predictions):
            raise MetricError(
                "The model predicts nothing but numbers that are not finite (nan or inf), so the metric "
                f"{self.name!r} is not asked: has a loss of nan spoilt the weights? Look "
                "for a division by zero in it, or lower learning_rate."
            )
        prediction = _copied(prediction)

        def ask() -> Any:
            arguments = {"compute_result": last} if self.batchwise else {}
            return self.function(prediction if complete is None else complete(prediction), **arguments)

        return self._answer(ask, last)

    def _answer(self, ask: Callable[[], Any], last: bool = True) -> float:
        """What is made of what `ask` returns or raises; nan where more batches are to follow."""
        try:
            with world_kept():
                result = ask() if self.timeout is None else self._call_apart(ask)
                return score_of(result, self.name, self.exact, self.keys) if last else float("nan")
        except (MetricError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a scoring script that calls sys.exit() must not end the run
            raise MetricError(f"The metric {self.name!r} raised {type(error).__name__}: {brief(error)}") from error

    def _call_apart(self, ask: Callable[[], Any]) -> Any:
        if self._abandoned is not None:
            if self._abandoned.is_alive():
                raise MetricError(
                    f"The metric {self.name!r} has not come back from an earlier call that was given up after "
                    f"{self.timeout} s; it is not called again before that."
                )
            self._abandoned = None
        outcome: dict[str, Any] = {}

        def work():
            try:
                outcome["result"] = ask()
            except BaseException as error:  # handed over to the caller's thread
                outcome["error"] = error

        thread = threading.Thread(target=work, name=f"metric {self.name}", daemon=True)
        thread.start()
        thread.join(min(self.timeout, threading.TIMEOUT_MAX))
        if thread.is_alive():
            self._abandoned = thread
            raise self._too_slow()
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    def _too_slow(self) -> MetricError:
        return MetricError(
            f"The metric {self.name!r} took longer than metric_timeout={self.timeout} s. Allow it more time, or let it "
            "do less."
        )


def _copied(prediction: EvalPrediction) -> EvalPrediction:
    """With arrays of its own; the usual ones are copied without `deepcopy`, which takes as long as a simple metric."""
    fields = ("predictions", "label_ids", "inputs", "losses")
    made = EvalPrediction(**{name: _copy_of(getattr(prediction, name)) for name in fields})
    for name, value in vars(prediction).items():
        if not hasattr(made, name):  # such as indices
            setattr(made, name, _copy_of(value))
    return made


def _copy_of(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple):
        return tuple(map(_copy_of, value))
    return copy.deepcopy(value)


def _nothing_finite(predictions: Any) -> bool:
    """Whether there are predictions and none is finite; of several arrays the first, the logits, is looked at."""
    while isinstance(predictions, (tuple, list)) and len(predictions):
        predictions = predictions[0]
    if isinstance(predictions, np.ndarray) and predictions.dtype.kind == "f" and predictions.size:
        return not np.isfinite(predictions.flat[0]) and not np.isfinite(predictions).any()
    if isinstance(predictions, torch.Tensor) and predictions.is_floating_point() and predictions.numel():
        return not bool(predictions.isfinite().any())
    return False


def from_evaluate(
    module: evaluate.EvaluationModule,
    greater_is_better: bool = True,
    inputs: str | Callable[[EvalPrediction], dict[str, Any]] = "auto",
    kwargs: dict[str, Any] | None = None,
    timeout: float | None = None,
) -> Metric:
    """A metric from an `evaluate` module.

    Args:
        module: for instance `evaluate.load("f1")`.
        inputs: how predictions become the module's inputs.
            "argmax": class indices; token labels of -100 are left out. Multi-label: 1 where the logit is positive.
            "scores": softmax over the last axis (of two classes the second column; of a single logit, and multi-label,
            the sigmoid).
            "identity": predictions as they are, a trailing axis of 1 dropped.
            A function `EvalPrediction -> dict` gives the arguments of `module.compute` itself.
            "auto" reads the module's features: "scores" if it takes `prediction_scores`, "argmax" if it takes
            integer predictions, else "identity".
            Of several label columns (`label_names`) the first is the references; a module that takes `groups`, as
            `worst_group_accuracy` does, gets the second.
        kwargs: passed on to `module.compute`, for instance `{"average": "macro"}`.

    Raises:
        ConfigurationError: `inputs` is unknown, or the module takes texts and `inputs` is no function.
    """
    features = module.features[0] if isinstance(module.features, list) else module.features
    if not callable(inputs) and inputs not in INPUTS:
        raise ConfigurationError(f"metric_inputs={inputs!r} is none of {', '.join(INPUTS)}, nor a function.")
    wants = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    argument = "prediction_scores" if "prediction_scores" in wants else "predictions"
    dtype = str(getattr(wants.get(argument), "dtype", ""))
    if inputs == "auto":
        if dtype == "string":
            raise ConfigurationError(
                f"The evaluate module {module.name!r} compares texts: pass metric_inputs as a function "
                "EvalPrediction -> {'predictions': [...], 'references': [...]} that decodes them, "
                "or use a compute_metrics of your own."
            )
        if argument == "prediction_scores":
            inputs = "scores"
        else:
            inputs = "argmax" if dtype.startswith("int") else "identity"

    direct = DirectModule(module)

    def function(prediction: EvalPrediction) -> dict[str, float]:
        if callable(inputs):
            arguments = inputs(prediction)
        else:
            columns = prediction.label_ids if isinstance(prediction.label_ids, tuple) else (prediction.label_ids,)
            predictions, labels = _select(prediction.predictions, columns[0], inputs)
            arguments = {argument: predictions, "references": labels}
            if "groups" in wants:
                arguments["groups"] = _groups(module.name, columns)
        return direct.compute(**arguments, **(kwargs or {}))

    return Metric(function, module.name, greater_is_better, timeout)


def _groups(name: str, columns: Sequence[np.ndarray]) -> np.ndarray:
    """The label column of a prediction that holds the groups."""
    if len(columns) != 2:
        raise MetricError(
            f"The evaluate module {name!r} takes groups, beside labels, and got {len(columns)} label column(s): "
            'say label_names=["labels", "group"] in the config, and give observation and selection such a column.'
        )
    return columns[1]


def _select(predictions: Any, labels: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(predictions, (tuple, list)):
        predictions = predictions[0]  # models that also return hidden states put the logits first
    floating = np.issubdtype(predictions.dtype, np.floating)
    # a row of answers per example and a logit for each
    multilabel = floating and predictions.ndim > 1 < predictions.shape[-1] and predictions.shape == np.shape(labels)
    if how == "argmax":
        if multilabel:
            return (predictions > 0).astype(np.int64), labels.astype(np.int64)
        if predictions.ndim == labels.ndim + 1 and predictions.shape[-1] > 1:
            predictions = predictions.argmax(-1)
        elif floating:  # one logit
            predictions = (predictions.reshape(labels.shape) > 0).astype(np.int64)
        kept = labels != -100
        return predictions[kept], labels[kept]
    if how == "scores":
        if predictions.ndim == 1 or predictions.shape[-1] == 1:
            return expit(predictions.reshape(-1)), labels
        if multilabel:
            return expit(predictions), labels
        scores = softmax(predictions, axis=-1)
        return (scores[..., 1] if scores.shape[-1] == 2 else scores), labels
    if predictions.ndim > 1 and predictions.shape[-1] == 1:
        predictions = predictions.squeeze(-1)
    return predictions, labels


def resolve(
    metric: Any,
    greater_is_better: bool,
    inputs: str | Callable[[EvalPrediction], dict[str, Any]] = "auto",
    kwargs: dict[str, Any] | None = None,
    timeout: float | None = None,
) -> Metric:
    """A `Metric` from whatever a user may name: one, an `evaluate` module, a callable, or a module's name or path.

    A name is looked up as a path, among the modules shipped with this package, then on the Hub.

    Raises:
        ConfigurationError: nothing of that name can be loaded, or `metric` is none of these.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, (str, os.PathLike)):
        metric = load(os.fspath(metric))
    if isinstance(metric, evaluate.EvaluationModule):
        return from_evaluate(metric, greater_is_better, inputs, kwargs, timeout)
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__)
        return Metric(metric, name, greater_is_better, timeout)
    raise ConfigurationError(
        f"metric={metric!r} must be an evaluate module, its name or path, or a callable EvalPrediction -> number."
    )


def takes_batches(compute_metrics: Callable) -> bool:
    """Whether a `compute_metrics` is written for Trainer's `batch_eval_metrics`."""
    return "compute_result" in inspect.signature(compute_metrics).parameters


def _as_tensors(prediction: EvalPrediction) -> EvalPrediction:
    """As Trainer gives batches; the whole set, or one already."""
    tensors = {
        name: value if value is None else torch.utils._pytree.tree_map(torch.as_tensor, value)
        for name, value in vars(prediction).items()
        if name in ("predictions", "label_ids", "inputs", "losses")
    }
    return EvalPrediction(**tensors)


def load(name: str) -> evaluate.EvaluationModule:
    """The module of a name or path, see `resolve`."""
    if not os.path.exists(name) and name in shipped_metrics.names():
        name = shipped_metrics.path(name)
    try:
        # in memory: the lock of a cache file would outlive an error, and hold up the next call
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:
        raise ConfigurationError(
            f"The evaluate module {name!r} could not be loaded ({type(error).__name__}: {error}). Give a path to a "
            f"local module, a name on the Hub, or one of those that come along: {', '.join(shipped_metrics.names())}."
        ) from error
