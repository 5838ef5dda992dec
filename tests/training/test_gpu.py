"""What needs an accelerator: `pytest -m gpu`. Without one, skipped."""

import pytest
import torch
from helpers import weights
from runs import text_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"fp16": True}, {"bf16": True}, {"torch_compile": True}, {"optim": "adamw_torch_fused", "observe": "scores"}],
    ids=lambda kwargs: ",".join(kwargs) or "fp32",
)
def test_a_guided_run_on_the_gpu(tmp_path, kwargs):
    trainer = text_trainer(tmp_path, use_cpu=False, **kwargs)
    trainer.train()
    assert trainer.phi.model.device.type == "cuda" and len(trainer.result.curve) == 3
    assert trainer.ledger.calls["observe"] > 0 and trainer.result.failed_calls == 0
    assert all(torch.isfinite(value).all() for value in weights(trainer.model).values())
    score = trainer.predict(trainer.selection_dataset).metrics["test_probability"]
    assert score == pytest.approx(trainer.result.best_score, abs=1e-3)
