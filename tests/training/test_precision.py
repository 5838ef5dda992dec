"""Blending under loss scaling, clipping and autocast; what cannot be guided is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from runs import Recorder, Truth, bert_trainer, quadratic_trainer

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptTrainer
from metricopt_hf.training.preflight import check_supported


class Scaled(MetricOptTrainer):
    """With a gradient scaler on the CPU, where Trainer's fp16 is a silent no-op."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)


def test_a_gradient_scaler_changes_nothing(tmp_path):
    plain = quadratic_trainer(tmp_path, Truth(), gradient_accumulation_steps=2)
    scaled = quadratic_trainer(tmp_path, Truth(), Scaled, gradient_accumulation_steps=2)
    plain.train()
    scaled.train()
    assert torch.allclose(plain.result.last_phi, scaled.result.last_phi, rtol=1e-5)
    assert not torch.allclose(plain.result.last_phi, plain.result.coordinates.origin)


class Overflow(Scaled):
    """The task gradient overflows once, as in fp16."""

    def _guide_update(self, step):
        if step == 7:
            self.model.w.grad.fill_(float("inf"))
        before = self.phi.read()
        super()._guide_update(step)
        self.seen = getattr(self, "seen", []) + [before]


def test_an_overflow_is_still_found_and_the_step_skipped(tmp_path):
    trainer = quadratic_trainer(tmp_path, Truth(), Overflow)
    trainer.train()
    assert torch.equal(trainer.seen[7], trainer.seen[8]) and not torch.equal(trainer.seen[8], trainer.seen[9])
    assert torch.isfinite(trainer.result.last_phi).all()


def test_the_blended_gradient_is_clipped_and_logged(tmp_path):
    limit = 0.01
    moves = []

    class Spy(Recorder):
        def _guide_update(self, step):
            moves.append(self.phi.read())
            super()._guide_update(step)

    trainer = quadratic_trainer(tmp_path, Truth(), Spy, max_grad_norm=limit, logging_steps=1)
    trainer.train()
    lengths = [float((b - a).norm()) for a, b in zip(moves, moves[1:], strict=False)]
    assert max(lengths) <= 0.05 * limit * 1.001  # learning rate times the limit
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx([float(after.norm()) for _, after, _, _ in trainer.records], rel=1e-4)


def test_bf16_autocast(tmp_path):
    trainer = bert_trainer(tmp_path, bf16=True, cls=Recorder, guide=None)
    trainer.train()
    assert len(trainer.observations) == 24
    for before, after, _, direction in trainer.records:
        expected = before if direction.trust == 0 else None
        assert torch.isfinite(after).all() and (expected is None or torch.equal(after, expected))
    assert any(direction.trust > 0 for *_, direction in trainer.records)


def test_deepspeed_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigurationError, match="DEEPSPEED cannot be guided: .*Use DDP or FSDP2"):
        check_supported(MetricOptConfig(str(tmp_path), report_to=[]), DistributedType.DEEPSPEED)


@pytest.mark.parametrize(
    ("version", "checkpointing", "compiled", "told"),
    [(1, False, False, "fsdp_version 2"), (2, True, False, "gradient_checkpointing=True"), (2, False, True, "compile")],
)
def test_of_fsdp_what_hides_phi_is_refused_with_the_remedy(tmp_path, version, checkpointing, compiled, told):
    plugin = SimpleNamespace(fsdp_version=version, activation_checkpointing=checkpointing)
    args = MetricOptConfig(str(tmp_path), report_to=[], torch_compile=compiled)
    with pytest.raises(ConfigurationError, match=told):
        check_supported(args, DistributedType.FSDP, plugin)


def test_fsdp2_is_not_refused(tmp_path):
    plugin = SimpleNamespace(fsdp_version=2, activation_checkpointing=False)
    check_supported(MetricOptConfig(str(tmp_path), report_to=[]), DistributedType.FSDP, plugin)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = MetricOptConfig(str(tmp_path), report_to=[])
    args._n_gpu = 2
    with pytest.raises(ConfigurationError, match="torchrun"):
        check_supported(args, DistributedType.NO)
