"""What the documentation's code takes for granted: a model, data, a metric, a CSV file, and models on the Hub."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = ["good", "bad", "value", "quick", "never", "again", "delivery", "."]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=["input_ids", "attention_mask"], **names)


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=len(SPECIAL + WORDS), num_labels=2, **SIZES))


def hub(folder: Path) -> dict[str, str]:
    """Names on the Hub that pages use -> folders with small models of that kind."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(SPECIAL + WORDS), pad_token_id=0, eos_token_id=1, **sizes)
    llama = LlamaConfig(vocab_size=len(SPECIAL + WORDS), pad_token_id=0, eos_token_id=1, num_key_value_heads=2, **SIZES)
    bert = BertConfig(vocab_size=len(SPECIAL + WORDS), **SIZES)
    made = {
        "distilbert/distilbert-base-uncased": classifier(),
        "google-t5/t5-small": T5ForConditionalGeneration(config),
        "Qwen/Qwen3-0.6B": LlamaForCausalLM(llama),
        "sentence-transformers/all-MiniLM-L6-v2": BertModel(bert),
    }
    for name, model in made.items():
        for part in (model, tokenizer()):
            part.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def reviews(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts whose label is whether `good` stands there more often than `bad`, from three regions."""
    generator, rows = np.random.default_rng(seed), []
    while len(rows) < count:
        words = generator.choice(WORDS, 8)
        label, region = int((words == "good").sum() > (words == "bad").sum()), int(generator.integers(3))
        rows.append({"text": " ".join(words), "label": label, "region": region})
    return rows


def names() -> dict[str, Any]:
    """The names that a page need not define."""
    encode = tokenizer()

    def dataset(count: int, seed: int) -> Dataset:
        rows = reviews(count, seed)
        columns = dict(encode([row["text"] for row in rows]))
        columns["labels"] = [row["label"] for row in rows]
        return Dataset.from_dict({**columns, "group": [row["region"] for row in rows]})

    def pairs(count: int, seed: int) -> Dataset:
        ids = encode([row["text"] for row in reviews(count, seed)])["input_ids"]
        return Dataset.from_dict({"input_ids": ids, "labels": [[*row[:3], 1] for row in ids]})

    def texts(count: int, seed: int) -> list[str]:
        return [row["text"] for row in reviews(count, seed)]

    def preferred(count: int, seed: int) -> Dataset:
        rows = zip(texts(count, seed), texts(count, seed + 1), strict=True)
        return Dataset.from_list([{"prompt": "", "chosen": f"good {a}", "rejected": f"bad {b}"} for a, b in rows])

    def scored(count: int, seed: int) -> Dataset:
        first, second = texts(count, seed), texts(count, seed + 1)
        score = [len({*a.split()} & {*b.split()}) / 8 for a, b in zip(first, second, strict=True)]
        return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": score})

    def metric(prediction) -> float:
        """Accuracy."""
        return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())

    return {
        "model": classifier(),
        "train": dataset(64, 1),
        "validation": dataset(80, 2),
        "observation": dataset(40, 3),
        "selection": dataset(40, 4),
        "report": dataset(40, 5),
        "metric": metric,
        "translations": pairs(32, 6),
        "more_translations": pairs(16, 7),
        "texts": Dataset.from_dict({"text": texts(32, 8)}),
        "more_texts": Dataset.from_dict({"text": texts(16, 9)}),
        "preferences": preferred(32, 10),
        "more_preferences": preferred(16, 12),
        "pairs": scored(32, 14),
        "more_pairs": scored(16, 16),
    }


def write_reviews(path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label", "region"])
        writer.writeheader()
        writer.writerows(reviews(150, 0))
