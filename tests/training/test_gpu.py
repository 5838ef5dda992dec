"""What needs an accelerator: `pytest -m gpu`. Without one, skipped."""

import pytest
import torch
from helpers import tiny_bert, true_class_probability, weights
from runs import bert_trainer

from metricopt_hf.training.phase import MetricPhase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"fp16": True}, {"bf16": True}, {"torch_compile": True}, {"optim": "adamw_torch_fused"}],
    ids=lambda kwargs: ",".join(kwargs) or "fp32",
)
def test_a_guided_run_on_the_gpu(tmp_path, kwargs):
    trainer = bert_trainer(tmp_path, use_cpu=False, metric=true_class_probability, **kwargs)
    trainer.train()
    assert trainer.phi.model.device.type == "cuda"
    assert len(trainer.observations) == 24
    assert all(torch.isfinite(value).all() for value in weights(trainer.model).values())


def test_observations_leave_the_cuda_generator_alone(tmp_path):
    finals = []
    for budget in (0, 24):
        model = tiny_bert()
        trainer = bert_trainer(tmp_path, model, use_cpu=False, value_weight=0, metric_call_budget=budget)
        trainer.train()
        finals.append((trainer.result.last_phi, torch.cuda.get_rng_state()))
    assert torch.equal(finals[0][0], finals[1][0])
    assert torch.equal(finals[0][1], finals[1][1])


def test_between_rounds_a_step_never_waits_for_the_gpu(tmp_path, monkeypatch):
    correct, watched = MetricPhase.correct, []

    def without_waiting(phase):
        if getattr(phase.guide, "_there", None) is None:  # behind a fit, it is copied to the GPU
            return correct(phase)
        watched.append(phase.guide.standing[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            correct(phase)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(MetricPhase, "correct", without_waiting)
    trainer = bert_trainer(tmp_path, use_cpu=False, observe_steps=4, max_steps=24, metric_call_budget=48)
    trainer.train()
    assert len(watched) >= 6 and max(watched) > 0
