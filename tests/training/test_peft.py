"""A PEFT model's adapter as phi: tuned, and saved as the adapter that it is."""

from pathlib import Path

import pytest
import torch
from helpers import Texts, tiny_bert, true_class_probability
from runs import SCORES

from metricopt_hf import MetricOptConfig, MetricOptTrainer

peft = pytest.importorskip("peft")

CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.1),
    "ia3": lambda: peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "ln_tuning": lambda: peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_an_adapter_is_tuned_saved_and_pushed_as_one(tmp_path, monkeypatch, kind, ratio):
    model = peft.get_peft_model(tiny_bert(), CONFIGS[kind]())
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = MetricOptTrainer(
        model,
        MetricOptConfig(
            str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            phi="adapter",
            metric_start_ratio=ratio,
            **SCORES,
            metric_call_budget=24,
            save_strategy="steps",
            save_steps=6,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            greater_is_better=True,
        ),
        train_dataset=Texts(160, seed=1),
        observation_dataset=Texts(40, seed=3),
        selection_dataset=Texts(40, seed=4),
        metric=true_class_probability,
    )
    assert set(trainer.phi.names) == {n for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(trainer.observations) == 24
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trainer.phi.names)

    pushed = {}

    def upload_folder(self, folder_path, **kwargs):
        pushed.update({path.name: path for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    trainer.hub_model_id = "someone/adapter"
    trainer.push_to_hub()
    assert "adapter_model.safetensors" in pushed and "model.safetensors" not in pushed

    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "final" / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "final")).eval()
    ids = Texts(20, seed=9).ids
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, atol=1e-6)
