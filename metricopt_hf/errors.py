"""The errors that this library raises: one base, few children, each also of the builtin kind that callers expect."""


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
    """A push to the Hub failed. What was to be pushed is still where the message says."""
