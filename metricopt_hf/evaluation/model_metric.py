"""Black boxes that want the model itself: its quality once it is exported, rounded, or on another machine.

Such a number is no function of predictions, so nothing is linearised: every observation runs the black box. It gets a
copy of the model in eval mode, which it may round or take apart without any effect on the model in training.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from safetensors.torch import save_model
from torch import nn
from transformers import EvalPrediction

from ..errors import ConfigurationError, MetricError, brief
from ..redaction import SECRET_NAME, command_without_secrets
from . import processes
from .evaluator import Evaluator, agreed
from .metric import Metric

MODEL, SPLIT = "{model}", "{split}"  # in a command
FOLDERS = ("PWD", "OLDPWD")  # variables that are no passwords
LONGEST_LINE = 2**20  # bytes of the last line that a command prints


class ModelMetric(Metric):
    """A black box on the model.

    Args:
        function: `nn.Module -> number or dict`. It gets a copy of the model as it would be saved now, in eval mode,
            where the model is, and without gradients. With a second parameter, it gets the data set too: the
            observation set, the selection set, or the one that `evaluate` is called with. One that takes the model
            alone returns the same number for all of these, so the selection is not held out.
        name: see `Metric`, as for the rest.

    Example:
        >>> size = ModelMetric(lambda model: sum(p.numel() for p in model.parameters()), "parameters", False)
        >>> size(nn.Linear(3, 2))
        8.0
    """

    of_predictions = False
    wants_copy = True  # of the model; else it is given the model itself, and leaves it as it is

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        greater_is_better: bool = True,
        timeout: float | None = None,
        exact: bool = False,
    ):
        super().__init__(function, name, greater_is_better, timeout, exact)
        self.takes_dataset = _takes_two(function)

    def __call__(self, model: nn.Module, dataset: Any = None, split: str = "") -> float:
        """The metric of `model`, which the function may change.

        Args:
            dataset: given to a function that takes one.
            split: what that set is called.

        Raises:
            MetricError: see `Metric`.
        """
        if isinstance(model, EvalPrediction):
            raise MetricError(f"The metric {self.name!r} is one of the model, and cannot be asked about predictions.")
        return self._answer(lambda: self._ask(model, dataset, split))

    def _ask(self, model: nn.Module, dataset: Any, split: str) -> Any:
        return self.function(model, dataset) if self.takes_dataset else self.function(model)


class CommandMetric(ModelMetric):
    """A command as the black box: the model is saved into a folder, and the command's last line is the number.

    It is run without a shell, where the training script was started. When the call is over, on a time-out, and when
    the training script dies, all processes that it has started are killed; `processes` says which are out of reach.

    Environment variables with names of secrets (HF_TOKEN, WANDB_API_KEY, ...) are not passed on, unless the command
    names them: `env PASS=OPENAI_API_KEY python judge.py {model}` is given OPENAI_API_KEY. This is no sandbox: the
    command can read the files of its user, a stored token among them.

    Args:
        command: such as "python score.py {model}": `{model}` is the folder; where it says `{split}`, that is
            "observation", "selection", or the prefix that `evaluate` is called with. The last line that it prints is a
            number, or a JSON object of numbers by name, of at most 1 MiB; its exit status must be 0.
        processor: tokenizer or the like, saved beside the model.

    Raises:
        ConfigurationError: there is no `{model}` in it, or no such program.
    """

    def __init__(
        self,
        command: str,
        name: str,
        greater_is_better: bool = True,
        timeout: float | None = None,
        processor: Any = None,
    ):
        super().__init__(lambda model: None, name, greater_is_better, timeout)
        self.command, self.processor = command, processor
        words = words_of(command)
        if shutil.which(words[0]) is None:
            raise ConfigurationError(
                f"metric_command={_shown(command)}: there is no program {_shown(words[0])} that can be run from here "
                f"({os.getcwd()}). Give its path, or put it into PATH."
            )

    def _call_apart(self, ask: Callable[[], Any]) -> Any:
        return ask()  # a process can be ended; no thread has to be abandoned

    def _ask(self, model: nn.Module, dataset: Any, split: str) -> Any:
        with TemporaryDirectory(prefix="metricopt-") as folder:
            saved = os.path.join(folder, "model")
            _save(model, saved)
            if hasattr(self.processor, "save_pretrained"):
                self.processor.save_pretrained(saved)
            words = [word.replace(MODEL, saved).replace(SPLIT, split) for word in words_of(self.command)]
            environment, withheld = _environment(self.command)
            with open(os.path.join(folder, "out"), "w+b") as out, open(os.path.join(folder, "err"), "w+b") as err:
                try:
                    status = processes.run(words, environment, folder, out, err, self.timeout)
                except subprocess.TimeoutExpired:
                    raise self._too_slow() from None
                answer, complaint = _last_line(out), _last_line(err)
        if status:
            raise MetricError(
                f"The metric {self.name!r} failed: {_shown(words[0])} ended with exit status {status}"
                + (f" and said {_shown(complaint)}." if complaint else ".")
                + (f" It was not given {', '.join(withheld)}; it is, if metric_command names it." if withheld else "")
            )
        if answer is None:
            raise MetricError(
                f"The last line that the command of the metric {self.name!r} printed is longer than {LONGEST_LINE} "
                "bytes. Print a number, or a JSON object of a few numbers by name, on a line of its own."
            )
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise MetricError(
                f"The last line that the command of the metric {self.name!r} printed must be a number, or a JSON "
                f"object of numbers by name; it was {_shown(answer)}."
            ) from None


class ModelEvaluator(Evaluator):
    """Gives a `ModelMetric` at points of phi.

    A function is called on every rank, since it may wait for the others, and the first rank's answer counts. A command
    waits for nobody, and is run on the first rank alone.

    Args:
        dataset: given to a function that takes one.
        split: what that set is called.
    """

    def __init__(self, *args, dataset: Any, split: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataset, self.split = dataset, split

    def freeze(self, moved) -> None:
        """Nothing to be replayed: the metric runs the model itself."""

    def evaluate_with_predictions(self, purpose: str, complete: Callable | None = None) -> tuple[float, None]:
        with self.ledger.charge(purpose, passes=1):
            self._check_finite()
            assert isinstance(self.metric, ModelMetric)  # of others nobody makes a `ModelEvaluator`
            return score_of_model(
                self.metric, self.phi.model, self.dataset, self.split, self.rank, self.world_size
            ), None


def score_of_model(
    metric: ModelMetric, model: nn.Module, dataset: Any, split: str, rank: int = 0, world_size: int = 1
) -> float:
    """The metric of a copy of a model as it is now; the same on every rank.

    Raises:
        MetricError: see `Metric`.
    """

    def compute() -> float:
        given = copy.deepcopy(model).eval().requires_grad_(False) if metric.wants_copy else model
        return metric(given, dataset, split)

    if isinstance(metric, CommandMetric) or world_size == 1:
        return agreed(rank, world_size, compute)
    outcome: float | MetricError
    try:
        outcome = compute()
    except MetricError as error:
        outcome = error

    def own() -> float:
        if isinstance(outcome, MetricError):
            raise outcome
        return outcome

    return agreed(rank, world_size, own)


def words_of(command: str) -> list[str]:
    """The words of a command line, the program first.

    Raises:
        ConfigurationError: it cannot be read as one, or there is no place in it for the model.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigurationError(f"metric_command={_shown(command)} is no command line: {error}.") from None
    if not any(MODEL in word for word in words[1:]):
        raise ConfigurationError(
            f"metric_command={_shown(command)} must say where the folder of the model goes, as in "
            f'"python score.py {MODEL}".'
        )
    return words


def _takes_two(function: Callable) -> bool:
    """Whether a function requires a second argument."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty for p in positional) > 1


def _save(model: nn.Module, folder: str) -> None:
    """Save as `Trainer.save_model` does: in the form of transformers, else as `model.safetensors`."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        os.makedirs(folder)
        save_model(model, os.path.join(folder, "model.safetensors"), {"format": "pt"})


def _environment(command: str) -> tuple[dict[str, str], list[str]]:
    """The environment of a command, and the variables that are withheld because of their names."""
    named = re.findall(r"\w+", command)
    withheld = [n for n in os.environ if SECRET_NAME.search(n) and n not in (*FOLDERS, *named)]
    return {name: value for name, value in os.environ.items() if name not in withheld}, sorted(withheld)


def _shown(text: str) -> str:
    """A command, or its output, for a message: short and without secrets."""
    return brief(command_without_secrets(text[:2000]))


def _last_line(file: BinaryIO) -> str | None:
    """The last line that is not empty, of a file that was written; None if it is longer than `LONGEST_LINE`."""
    start = max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE - 1)
    file.seek(start)
    first, *lines = file.read().decode("utf-8", "replace").split("\n")
    line = next((line.strip() for line in reversed(lines) if line.strip()), None)
    if line is None and not start:
        line = first.strip()
    return line
