"""Fine-tune a model for the metric that it is judged by: MetricOpt as an extension of the Hugging Face Trainer."""

from .diagnosis import Diagnosis
from .errors import (
    CheckpointError,
    ConfigurationError,
    HubError,
    MetricError,
    MetricOptError,
    PhiError,
    ValueFunctionError,
)
from .evaluation.ledger import Ledger
from .evaluation.metric import Metric
from .evaluation.model_metric import ModelMetric
from .guides import Guide, GuideContext
from .hub import ValueFunction
from .phi import FiLM, PhiSpace, Subset
from .training.config import MetricOptConfig
from .training.reporting import RunResult
from .training.seq2seq import MetricOptSeq2SeqConfig, MetricOptSeq2SeqTrainer
from .training.trainer import MetricOptTrainer

__version__ = "0.3.0"

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "Diagnosis",
    "FiLM",
    "Guide",
    "GuideContext",
    "HubError",
    "Ledger",
    "Metric",
    "MetricError",
    "MetricOptConfig",
    "MetricOptError",
    "MetricOptSeq2SeqConfig",
    "MetricOptSeq2SeqTrainer",
    "MetricOptTrainer",
    "ModelMetric",
    "PhiError",
    "PhiSpace",
    "RunResult",
    "Subset",
    "ValueFunction",
    "ValueFunctionError",
]
