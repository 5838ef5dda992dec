"""MetricOptTrainer for models that generate: metrics of texts, observed through `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..evaluation import data
from .config import MetricOptConfig
from .trainer import MetricOptTrainer


@dataclass(repr=False)
class MetricOptSeq2SeqConfig(MetricOptConfig, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the arguments of metric guidance."""


class MetricOptSeq2SeqTrainer(MetricOptTrainer, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with metric guidance: with `predict_with_generate`, the metric sees generated token ids."""

    def prediction_step(self, *args, **kwargs):
        # Seq2SeqTrainer keeps these from its last evaluate(); an observation may come before any
        if not hasattr(self, "_gen_kwargs"):
            lengths = {"max_length": self.args.generation_max_length, "num_beams": self.args.generation_num_beams}
            self._gen_kwargs = {name: value for name, value in lengths.items() if value is not None}
        return super().prediction_step(*args, **kwargs)

    def whole_output(self, prediction: EvalPrediction, features: Any) -> EvalLoopOutput:
        """`post_process_function` gets all of the output, as in transformers' example with generated answers."""
        return EvalLoopOutput(prediction.predictions, prediction.label_ids, None, len(data.places(features)))
