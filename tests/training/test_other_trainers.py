"""MetricOptTrainer in front of other libraries' trainers, as docs/other_trainers.md combines them."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from metricopt_hf import MetricError, MetricOptConfig, MetricOptTrainer

pytestmark = pytest.mark.slow

WORDS = ["<pad>", "<eos>", "<unk>", "good", "bad", "quick", "slow", "never", "again"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RUN = {
    "max_steps": 4,
    "metric_steps": 2,
    "metric_call_budget": 24,
    "phi_dim": 4,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "greater_is_better": True,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(count, seed):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS[3:], 6)) for _ in range(count)]


def llama(cls):
    torch.manual_seed(0)
    settings = {"vocab_size": len(WORDS), "num_labels": 1, "pad_token_id": 0, "num_key_value_heads": 2}
    return cls(LlamaConfig(**SIZES, **settings))


def check(trainer, name):
    """It was guided, by the number that `evaluate` returns, and delivers what was selected."""
    logged = [sorted(entry) for entry in trainer.state.log_history]
    trainer.train()
    assert trainer.result.metric == name and trainer.result.observed == "scores"
    assert trainer.ledger.calls["observe"] > 10 and trainer.result.failed_calls == 0
    evaluations = [entry for entry in trainer.state.log_history[len(logged) :] if f"eval_{name}" in entry]
    assert evaluations == []  # those of the guidance are no part of the log
    found = trainer.evaluate(trainer.selection_dataset)[f"eval_{name}"]
    assert found == pytest.approx(trainer.result.chosen.score, abs=1e-6)


def test_sft(tmp_path):
    trl = pytest.importorskip("trl")

    @dataclass
    class Config(MetricOptConfig, trl.SFTConfig):
        pass

    class Mine(MetricOptTrainer, trl.SFTTrainer):
        pass

    args = Config(str(tmp_path), max_length=16, **RUN)
    trainer = Mine(
        llama(LlamaForCausalLM),
        args,
        train_dataset=Dataset.from_dict({"text": texts(32, 1)}),
        eval_dataset=Dataset.from_dict({"text": texts(32, 2)}),
        processing_class=tokenizer(),
        metric="evaluate:eval_mean_token_accuracy",
    )
    check(trainer, "mean_token_accuracy")


def preferences(count, seed):
    pairs = zip(texts(count, seed), texts(count, seed + 100), strict=True)
    return Dataset.from_list([{"prompt": "", "chosen": f"good {a}", "rejected": f"bad {b}"} for a, b in pairs])


def test_reward(tmp_path):
    trl = pytest.importorskip("trl")

    @dataclass
    class Config(MetricOptConfig, trl.RewardConfig):
        pass

    class Mine(MetricOptTrainer, trl.RewardTrainer):
        pass

    trainer = Mine(
        llama(LlamaForSequenceClassification),
        Config(str(tmp_path), max_length=16, **RUN),
        train_dataset=preferences(32, 1),
        eval_dataset=preferences(32, 2),
        processing_class=tokenizer(),
        metric="evaluate:eval_accuracy",
    )
    check(trainer, "accuracy")


def test_sentence_transformer(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    @dataclass
    class Config(MetricOptConfig, library.SentenceTransformerTrainingArguments):
        pass

    class Mine(MetricOptTrainer, library.SentenceTransformerTrainer):
        pass

    torch.manual_seed(0)
    folder = str(tmp_path / "bert")
    for part in (BertModel(BertConfig(vocab_size=len(WORDS), **SIZES)), tokenizer()):
        part.save_pretrained(folder)
    transformer = Transformer(folder)
    model = library.SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu")

    def pairs(count, seed):
        first, second = texts(count, seed), texts(count, seed + 100)
        score = [len(set(a.split()) & set(b.split())) / 6 for a, b in zip(first, second, strict=True)]
        return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": score})

    held = pairs(40, 2)
    trainer = Mine(
        model,
        Config(str(tmp_path), **RUN),
        train_dataset=pairs(32, 1),
        eval_dataset=held,
        loss=CosineSimilarityLoss(model),
        evaluator=EmbeddingSimilarityEvaluator(held["sentence1"], held["sentence2"], held["score"], name="own"),
        metric="evaluate:eval_own_spearman_cosine",
    )
    check(trainer, "own_spearman_cosine")


def test_a_number_that_evaluate_does_not_return_is_named_before_training(tmp_path):
    from helpers import Texts, tiny_bert

    trainer = MetricOptTrainer(
        tiny_bert(),
        MetricOptConfig(str(tmp_path), **RUN),
        train_dataset=Texts(32),
        eval_dataset=Texts(32),
        metric="evaluate:eval_f1",
    )
    with pytest.raises(MetricError, match=r"keys \['eval_loss', .*none of which is 'f1'"):
        trainer.train()
