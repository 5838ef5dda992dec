"""The errors that this library raises: one base, and few children, each also a builtin error that callers expect."""

import reprlib
from typing import Any

MOST_CHARACTERS = 300  # of a foreign value or message that one of our messages quotes
_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = _short.maxarray = 12
_short.maxstring = _short.maxother = _short.maxlong = MOST_CHARACTERS


class MetricOptError(Exception):
    """Base of every error that metricopt_hf raises on purpose."""


class ConfigurationError(MetricOptError, ValueError):
    """The arguments, or their combination with model and data, cannot work. Raised before any training."""


class PhiError(MetricOptError, ValueError):
    """No phi can be built on this model as asked; the message names what could be used instead."""


class MetricError(MetricOptError, RuntimeError):
    """The black-box metric raised, timed out, or returned something that is not a finite number."""


class CheckpointError(MetricOptError, RuntimeError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class ValueFunctionError(MetricOptError, ValueError):
    """A stored value function is malformed, or belongs to another model, phi space or metric."""


class HubError(MetricOptError, OSError):
    """A push to the Hub failed. The message says where the files still are."""


def brief(value: Any) -> str:
    """A short, printable line that shows `value`, whatever its `__repr__` does.

    An exception is shown as its message. Any value will do: a list of millions, a number of 5,000 digits, an object
    that raises.

    Example:
        >>> brief(list(range(1000))), brief(10**5000)
        ('[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...]', 'an int that cannot be shown')
    """
    try:
        text = str(value) if isinstance(value, BaseException) else _short.repr(value)
        text = " ".join(text[: 4 * MOST_CHARACTERS].split())
        text = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."
        return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates end whoever writes them to a file
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"an {type(value).__name__} that cannot be shown"
