"""Metrics that the Hub's `evaluate` modules lack, as `evaluate` scripts: one folder each, loaded by path, so offline.

A script imports nothing from this package: it can be copied to another project or pushed to the Hub as it is.
"""

from pathlib import Path

from ..errors import ConfigurationError

SMALLER_IS_BETTER = {"equalized_odds_gap", "misclassification"}


def path(name: str) -> str:
    """The folder of a shipped `evaluate` module.

    Args:
        name: one of `names()`.

    Returns:
        An absolute path, to be given to `evaluate.load`.

    Raises:
        ConfigurationError: (a ValueError) no module has this name; the message lists those that exist.

    Example:
        >>> import evaluate
        >>> from metricopt_hf.metrics import path
        >>> evaluate.load(path("worst_class_recall")).compute(predictions=[0, 1, 1], references=[0, 1, 0])
        {'worst_class_recall': 0.5}
    """
    if name not in names():
        raise ConfigurationError(f"No metric that comes along is named {name!r}; there are {', '.join(names())}.")
    return str(Path(__file__).resolve().parent / name)


def names() -> list[str]:
    """The shipped modules, in alphabetical order."""
    return sorted(script.stem for script in Path(__file__).resolve().parent.glob("*/*.py"))


def greater_is_better(name: str) -> bool:
    """Which way is better, of a shipped module."""
    return name not in SMALLER_IS_BETTER
