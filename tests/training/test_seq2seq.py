"""Metrics of generated texts, with a tiny T5."""

import pytest
import torch
from runs import SCORES
from transformers import T5Config, T5ForConditionalGeneration

from metricopt_hf import MetricOptSeq2SeqConfig, MetricOptSeq2SeqTrainer


class Copy(torch.utils.data.Dataset):
    """Repeat the first token and stop: lengths differ, so generated batches have to be padded."""

    def __init__(self, size, seed):
        self.tokens = torch.randint(2, 6, (size,), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        token = int(self.tokens[i])
        return {"input_ids": torch.full((4,), token), "labels": torch.tensor([token, token, 1])}


def tiny_t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=8,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def token_match(prediction):
    """Share of label tokens at whose place the right token was generated (after the start token)."""
    generated, labels = prediction.predictions[:, 1:], prediction.label_ids
    width = min(generated.shape[1], labels.shape[1])
    return {"token_match": float((generated[:, :width] == labels[:, :width]).sum() / labels.size)}


@pytest.mark.parametrize("beams", [None, 2])
def test_the_metric_sees_what_is_generated(tmp_path, beams):
    seen = []

    def metric(prediction):
        seen.append(prediction.predictions)
        return token_match(prediction)

    trainer = MetricOptSeq2SeqTrainer(
        tiny_t5(),
        MetricOptSeq2SeqConfig(
            str(tmp_path),
            max_steps=24,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            learning_rate=2e-2,
            predict_with_generate=True,
            generation_max_length=6,
            generation_num_beams=beams,
            metric_for_best_model="token_match",
            greater_is_better=True,
            metric_start_ratio=0.5,
            metric_call_budget=16,
            **SCORES,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Copy(200, 1),
        observation_dataset=Copy(40, 3),
        selection_dataset=Copy(24, 4),
        compute_metrics=metric,
    )
    assert all(name.endswith("film_scale") for name in trainer.phi.names)  # T5's norms have no bias to take a shift
    trainer.train()
    assert {p.dtype.kind for p in seen} == {"i"}
    assert {len(p) for p in seen} == {24, 40}  # tokens are not interpolated: all of each set
    assert not any(p[:, 6:].any() for p in seen)  # generation_max_length holds; behind it Seq2SeqTrainer pads
    assert len(trainer.observations) == 16
    assert trainer.ledger.calls["observe"] == 16
    assert trainer.predict(Copy(20, 5)).metrics["test_token_match"] >= 0
    del seen[:]
    assert "eval_token_match" in trainer.evaluate(Copy(20, 5), max_length=4, num_beams=1)  # of Seq2SeqTrainer
    assert not seen[0][:, 4:].any()
