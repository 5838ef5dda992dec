"""Metric: the user's black box, called with predictions and labels, answering one finite number.

A call gets a copy of the predictions, and its result is checked. Global state that it changes is put back (see
`world_kept`). So a metric that changes its inputs or reseeds cannot disturb the run, and a call ends in one finite
number or in a `MetricError`, whatever the metric returns or raises.
"""

from __future__ import annotations

import copy
import inspect
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..errors import MetricError, brief
from .answer import plain, score_of
from .direction import given

# Global state that a metric may change unnoticed: how to read it, and how to set it.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    *(
        (lambda device=device: _autocast(device), lambda state, device=device: _set_autocast(device, state))
        for device in ("cpu", "cuda")
    ),
    (lambda: _autocast_nesting(), lambda depth: _set_autocast_nesting(depth)),
    (np.geterr, lambda errors: np.seterr(**errors)),
    (lambda: list(warnings.filters), lambda filters: _set_filters(filters)),
    *(
        (lambda name=name: getattr(torch.backends.cudnn, name), lambda value, name=name: _set_cudnn(name, value))
        for name in ("deterministic", "benchmark")
    ),
)


def _set_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()
    warnings.filters[:] = filters  # type: ignore[index]  # a list, whatever its stub says


def _set_cudnn(name: str, value: bool) -> None:
    setattr(torch.backends.cudnn, name, value)


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _set_autocast(device: str, state: tuple[bool, torch.dtype]) -> None:
    torch.set_autocast_enabled(device, state[0])
    torch.set_autocast_dtype(device, state[1])


def _autocast_nesting() -> int:
    """Number of open autocast contexts; torch drops its cast copies of weights when the last one closes."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_autocast_nesting(depth: int) -> None:
    while _autocast_nesting() > depth:
        torch.autocast_decrement_nesting()
    while _autocast_nesting() < depth:
        torch.autocast_increment_nesting()
    torch.clear_autocast_cache()


_kept = threading.local()  # whether a context of `world_kept` is open


@contextmanager
def world_kept() -> Iterator[None]:
    """On leaving, random states, settings of torch and numpy, warning filters and working directory are as before.

    Inside of another one random states are left alone: behind many calls in a row they are put back once.
    """
    if getattr(_kept, "open", False):
        with _settings_kept():
            yield
        return
    _kept.open = True
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with _settings_kept():
            yield
    finally:
        _kept.open = False
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        for device, state in enumerate(cuda_states):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def _settings_kept() -> Iterator[None]:
    folder = None
    with suppress(OSError):  # it may have been removed
        folder = os.getcwd()
    before = [read() for read, _ in _SETTINGS]
    try:
        yield
    finally:
        for (read, write), value in zip(_SETTINGS, before, strict=True):
            if read() != value:
                write(value)
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
        self.function: Callable[..., Any] = function
        self.name, self.timeout = str(name), plain(timeout)
        self.greater_is_better = bool(given(greater_is_better))
        self.exact, self.batchwise = exact, batchwise
        self._abandoned: threading.Thread | None = None

    @property
    def sign(self) -> int:
        """+1 where greater is better, else -1."""
        return 1 if self.greater_is_better else -1

    def __call__(
        self, prediction: EvalPrediction, complete: Callable[[EvalPrediction], EvalPrediction] | None = None
    ) -> float:
        """The metric of `prediction`, or of what `trainer.predict` returns.

        The function is given a copy with `of_metricopt` True, by which it knows these calls from Trainer's own.

        Args:
            complete: maps a copy of it to the metric's input; its errors are the metric's.

        Raises:
            MetricError: it raised (`SystemExit` too, but not `KeyboardInterrupt`), timed out, or answered something
                that is not one finite number; or the model predicted nothing but nan.
        """
        return self._call(_as_tensors(prediction) if self.batchwise else prediction, complete, last=True)

    def value(
        self, prediction: EvalPrediction, complete: Callable[[EvalPrediction], EvalPrediction] | None = None
    ) -> float:
        """The same, greater is better; nan where the call fails."""
        try:
            return self.sign * self(prediction, complete)
        except MetricError:
            return float("nan")

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
            with suppress(MetricError):  # the gathered batches must not count with the next set
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
            given = prediction if complete is None else complete(prediction)
            if isinstance(given, EvalPrediction):
                given.of_metricopt = True
            return self.function(given, **arguments)

        return self._answer(ask, last)

    def _answer(self, ask: Callable[[], Any], last: bool = True) -> float:
        """The score in the result of `ask`; nan where more batches follow."""
        try:
            with world_kept():
                result = ask() if self.timeout is None else self._call_apart(ask)
                return score_of(result, self.name, self.exact) if last else float("nan")
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
    """A copy. Arrays are copied without `deepcopy`, which takes as long as a simple metric."""
    fields = ("predictions", "label_ids", "inputs", "losses")
    made = EvalPrediction(**{name: _copy_of(getattr(prediction, name, None)) for name in fields})
    for name, value in getattr(prediction, "__dict__", {}).items():
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
    """Whether none of the predictions is finite; of several arrays, the first (the logits) counts."""
    while isinstance(predictions, (tuple, list)) and len(predictions):
        predictions = predictions[0]
    if isinstance(predictions, np.ndarray) and predictions.dtype.kind == "f" and predictions.size:
        return not np.isfinite(predictions.flat[0]) and not np.isfinite(predictions).any()
    if isinstance(predictions, torch.Tensor) and predictions.is_floating_point() and predictions.numel():
        return not bool(predictions.isfinite().any())
    return False


def takes_batches(compute_metrics: Callable) -> bool:
    """Whether a `compute_metrics` is written for Trainer's `batch_eval_metrics`."""
    return "compute_result" in inspect.signature(compute_metrics).parameters


def _as_tensors(prediction: EvalPrediction) -> EvalPrediction:
    """Predictions as tensors, as Trainer gives batches."""
    fields = ("predictions", "label_ids", "inputs", "losses")
    values = {name: getattr(prediction, name, None) for name in fields}
    return EvalPrediction(
        **{name: v if v is None else torch.utils._pytree.tree_map(torch.as_tensor, v) for name, v in values.items()}
    )
