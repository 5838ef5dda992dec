"""Loss scaling and autocast; what cannot be guided is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from helpers import assert_equal_weights, weights
from runs import text_trainer

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptTrainer, ModelMetric
from metricopt_hf.training.preflight import check_metric, check_supported


class Scaled(MetricOptTrainer):
    """With a gradient scaler on the CPU, where Trainer's fp16 is a silent no-op."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)


@pytest.mark.parametrize("kwargs", [{"max_steps": 8}, {"max_steps": 3}], ids=["two phases", "the phase alone"])
def test_a_gradient_scaler_changes_nothing_in_the_metric_phase(tmp_path, kwargs):
    ends = []
    for cls in (Scaled, MetricOptTrainer):
        trainer = text_trainer(tmp_path, cls, optim="sgd", weight_decay=0.1, learning_rate=0.0, **kwargs)
        trainer.train()
        assert len(trainer.result.curve) == 3 and trainer.result.failed_calls == 0
        ends.append(weights(trainer.model))
    assert_equal_weights(*ends)


def args(folder, **kwargs):
    return SimpleNamespace(args=MetricOptConfig(str(folder), report_to=[], use_cpu=True, **kwargs))


def stage(number):
    return {"zero_optimization": {"stage": number}}


def test_of_deepspeed_the_stage_that_shares_out_phi_is_refused_with_the_remedy(tmp_path):
    stage_3, stage_2 = (SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(stage(n))) for n in (3, 2))
    with pytest.raises(ConfigurationError, match='ZeRO-3 cannot be guided: .*"stage": 2'):
        check_supported(args(tmp_path), DistributedType.DEEPSPEED, stage_3)
    check_supported(args(tmp_path), DistributedType.DEEPSPEED, stage_2)


@pytest.mark.parametrize(
    ("version", "checkpointing", "compiled", "told"),
    [(1, False, False, "fsdp_version 2"), (2, True, False, "gradient_checkpointing=True"), (2, False, True, "compile")],
)
def test_of_fsdp_what_hides_phi_is_refused_with_the_remedy(tmp_path, version, checkpointing, compiled, told):
    plugin = SimpleNamespace(fsdp_version=version, activation_checkpointing=checkpointing)
    with pytest.raises(ConfigurationError, match=told):
        check_supported(args(tmp_path, torch_compile=compiled), DistributedType.FSDP, plugin)


def test_a_metric_of_the_model_is_refused_where_no_process_has_all_of_it():
    metric = ModelMetric(lambda model: 0.5, "size")
    check_metric(metric, DistributedType.MULTI_CPU)
    with pytest.raises(ConfigurationError, match="'size' is one of the model.*use DDP"):
        check_metric(metric, DistributedType.FSDP)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    made = args(tmp_path)
    made.args._n_gpu = 2
    with pytest.raises(ConfigurationError, match="torchrun"):
        check_supported(made, DistributedType.NO)
