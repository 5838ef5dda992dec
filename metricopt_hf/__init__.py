"""Fine-tune a model for the metric that it is judged by: MetricOpt as an extension of the Hugging Face Trainer."""

from .config import MetricOptConfig
from .errors import (
    CheckpointError,
    ConfigurationError,
    HubError,
    MetricError,
    MetricOptError,
    PhiError,
    ValueFunctionError,
)
from .guide import Direction, Guide, RandomGuide, ValueFunctionGuide
from .ledger import Ledger
from .metric import Metric
from .observation import Observation
from .phi import FiLM, PhiSpace, Subset
from .seq2seq import MetricOptSeq2SeqConfig, MetricOptSeq2SeqTrainer
from .trainer import MetricOptTrainer
from .trajectory import Trajectory
from .value import ValueFunction

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "Direction",
    "FiLM",
    "Guide",
    "HubError",
    "Ledger",
    "Metric",
    "MetricError",
    "MetricOptConfig",
    "MetricOptError",
    "MetricOptSeq2SeqConfig",
    "MetricOptSeq2SeqTrainer",
    "MetricOptTrainer",
    "Observation",
    "PhiError",
    "PhiSpace",
    "RandomGuide",
    "Subset",
    "Trajectory",
    "ValueFunction",
    "ValueFunctionError",
    "ValueFunctionGuide",
]
