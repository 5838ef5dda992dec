"""Fine-tune a model for the metric that it is judged by: MetricOpt as an extension of the Hugging Face Trainer."""

from .bridge import Bridge
from .errors import (
    CheckpointError,
    ConfigurationError,
    HubError,
    MetricError,
    MetricOptError,
    PhiError,
    RankError,
    ValueFunctionError,
)
from .evaluation.constraints import ConstraintCheck
from .evaluation.ledger import Ledger
from .evaluation.metric import Metric
from .evaluation.model_metric import ModelMetric
from .evaluation.observation import Observation
from .evaluation.trajectory import Trajectory
from .guides import (
    BehaviourGuide,
    BridgeGuide,
    Direction,
    DirectionGuide,
    Guide,
    GuideContext,
    LossAlignmentGuide,
    RandomGuide,
    Round,
    ValueFunctionGuide,
)
from .hub import ValueFunction
from .phi import FiLM, PhiSpace, Subset
from .training.config import MetricOptConfig
from .training.diagnosis import Diagnosis
from .training.result import RunResult
from .training.seq2seq import MetricOptSeq2SeqConfig, MetricOptSeq2SeqTrainer
from .training.trainer import MetricOptTrainer

__version__ = "0.2.0"

__all__ = [
    "BehaviourGuide",
    "Bridge",
    "BridgeGuide",
    "CheckpointError",
    "ConfigurationError",
    "ConstraintCheck",
    "Diagnosis",
    "Direction",
    "DirectionGuide",
    "FiLM",
    "Guide",
    "GuideContext",
    "HubError",
    "Ledger",
    "LossAlignmentGuide",
    "Metric",
    "MetricError",
    "MetricOptConfig",
    "MetricOptError",
    "MetricOptSeq2SeqConfig",
    "MetricOptSeq2SeqTrainer",
    "MetricOptTrainer",
    "ModelMetric",
    "Observation",
    "PhiError",
    "PhiSpace",
    "RandomGuide",
    "RankError",
    "Round",
    "RunResult",
    "Subset",
    "Trajectory",
    "ValueFunction",
    "ValueFunctionError",
    "ValueFunctionGuide",
]
