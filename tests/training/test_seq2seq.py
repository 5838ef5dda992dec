"""Metrics of generated texts, with a tiny T5."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, T5Config, T5ForConditionalGeneration

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
    sizes = {"vocab_size": 8, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def make(folder, metric, **kwargs):
    args = MetricOptSeq2SeqConfig(
        str(folder), max_steps=8, metric_steps=2, per_device_train_batch_size=16, per_device_eval_batch_size=16,
        learning_rate=2e-2, predict_with_generate=True, generation_max_length=6, metric_for_best_model="token_match",
        greater_is_better=True, metric_call_budget=12, phi_dim=4, guide="pairs", save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, **{k: v for k, v in kwargs.items() if k == "generation_num_beams"},
    )  # fmt: skip
    return MetricOptSeq2SeqTrainer(
        tiny_t5(), args, train_dataset=Copy(100, 1), observation_dataset=Copy(40, 3), selection_dataset=Copy(24, 4),
        compute_metrics=metric, post_process_function=kwargs.get("post_process_function"),
    )  # fmt: skip


@pytest.mark.parametrize("beams", [None, 2])
def test_the_metric_sees_what_is_generated(tmp_path, beams, caplog):
    seen = []

    def token_match(prediction):
        seen.append(prediction.predictions)
        generated, labels = prediction.predictions[:, 1:], prediction.label_ids
        width = min(generated.shape[1], labels.shape[1])
        return {"token_match": float((generated[:, :width] == labels[:, :width]).sum() / labels.size)}

    trainer = make(tmp_path, token_match, generation_num_beams=beams)
    trainer.train()
    assert {p.dtype.kind for p in seen} == {"i"} and {len(p) for p in seen} <= {24, 40, 12, 20}
    assert not any(p[:, 6:].any() for p in seen)  # generation_max_length holds; behind it Seq2SeqTrainer pads
    assert trainer.result.observed == "scores" and trainer.result.failed_calls == 0
    assert "scores are observed, not the model's predictions: " in caplog.text
    assert trainer.predict(Copy(20, 5)).metrics["test_token_match"] >= 0
    del seen[:]
    assert "eval_token_match" in trainer.evaluate(Copy(20, 5), max_length=4, num_beams=1)  # of Seq2SeqTrainer
    assert not seen[0][:, 4:].any()


def test_post_processing_gets_all_of_the_output_as_in_transformers_example(tmp_path):
    got = []

    def post_process(examples, features, output):
        got.append((len(features), output.num_samples, output.predictions.shape))
        return EvalPrediction(output.predictions, output.label_ids)

    def mean(prediction):
        return {"token_match": float(np.mean(prediction.predictions))}

    trainer = make(tmp_path, mean, post_process_function=post_process)
    trainer.train()
    assert got and all(rows == count == shape[0] for rows, count, shape in got)
