"""A PEFT model's adapter as phi: tuned, and saved, loaded and pushed as the adapter that it is."""

from pathlib import Path

import pytest
import torch
from helpers import Texts, tiny_bert
from runs import text_trainer

from metricopt_hf import PhiError

peft = pytest.importorskip("peft")

CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.1),
    "ia3": lambda: peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "ln_tuning": lambda: peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_tuned_saved_loaded_and_pushed_as_one(tmp_path, monkeypatch, kind):
    """peft 310, 876: only the class names changed."""
    model = peft.get_peft_model(tiny_bert(), CONFIGS[kind]())
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = text_trainer(tmp_path, model=model, learning_rate=1e-2, save_strategy="steps", save_steps=4)
    assert set(trainer.phi.names) == {n for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.ledger.calls["observe"] > 0 and trainer.result.failed_calls == 0
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trainer.phi.names)
    score = trainer.predict(trainer.selection_dataset).metrics["test_probability"]
    assert score == pytest.approx(trainer.result.best_score, abs=1e-6)

    pushed = {}
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, folder_path, **kwargs: pushed.update({path.name: path for path in Path(folder_path).iterdir()}),
    )
    trainer.hub_model_id = "someone/adapter"
    trainer.push_to_hub()
    assert "adapter_model.safetensors" in pushed and "model.safetensors" not in pushed

    trainer.save_model(str(tmp_path / "final"))
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "final")).eval()
    ids = Texts(20, seed=9).ids
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, atol=1e-6)


def test_film_on_a_peft_model_is_refused_with_the_reason(tmp_path):
    trainer = text_trainer(tmp_path, model=peft.get_peft_model(tiny_bert(), CONFIGS["lora"]()), phi="film")
    with pytest.raises(PhiError, match="adapter"):
        trainer.train()
