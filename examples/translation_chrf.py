#!/usr/bin/env python
"""Fine-tune a model that generates text for chrF, or for another metric of texts, and compare with the loss alone.

    python examples/translation_chrf.py \\
        --dataset_name Helsinki-NLP/opus_books --dataset_config_name en-fr --source en --target fr \\
        --eval_split train --max_eval_samples 4000 --model_name_or_path google-t5/t5-small \\
        --prefix "translate English to French: "

Any pair of text columns will do (`--source document --target summary`), and any `evaluate` module that compares texts
(`--metric sacrebleu --metric_for_best_model score`). Generated tokens cannot be linearised, so every metric call
generates all of the observation split: `--observation_size` and `--metric_call_budget` bound that.

Four disjoint splits: the loss sees train, the metric is observed on `observation`, what a metric phase ends with is
chosen on `selection`, and methods are compared on `report`. Left in `output_dir`: the model tuned by MetricOpt with the
first seed, and `results.json`. `--help` lists all options.
"""

import logging
import os
from collections import Counter
from dataclasses import dataclass, field, replace

import datasets
import evaluate
import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from comparison.methods import METHODS, REFERENCE, by_loss_alone, in_order, run_method
from comparison.report import MethodRun, comparison_table, save_results, table_note
from comparison.splits import MEASURED, DataArguments, find_column, load_splits
from comparison.study import ModelArguments, run_script
from metricopt_hf import MetricOptSeq2SeqConfig, MetricOptSeq2SeqTrainer

DEFAULTS = {
    "output_dir": "out/translation",
    "model_name_or_path": "google-t5/t5-small",
    "max_steps": 200,
    "metric_call_budget": 60,
    "observation_size": 100,
    "max_report_samples": 1000,
    "predict_with_generate": True,
    "generation_max_length": 64,
    "greater_is_better": True,
    "save_strategy": "no",
    "report_to": "none",
}
CHOICES = ("loss_only", "shuffled", "metricopt")


@dataclass
class TextArguments:
    """What is in the data, and how it is read."""

    source: str = field(default="en", metadata={"help": "Column of what is read, or its key in `translation`."})
    target: str = field(default="fr", metadata={"help": "Column of what shall be written, or its key there."})
    prefix: str = field(default="", metadata={"help": "Put in front of what is read."})
    max_length: int = field(default=64, metadata={"help": "Tokens behind which a text is cut off."})
    methods: list[str] = field(default_factory=lambda: list(CHOICES), metadata={"help": "What to run and compare."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run each."})


def ngrams(text: str, n: int) -> Counter:
    """Of characters, white space left out."""
    text = "".join(text.split())
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def chrf(texts: list[str], references: list[str], order: int = 6, beta: float = 2.0) -> float:
    """chrF2 of a corpus, 0 to 100 (Popović, 2015): F-score of character n-grams, recall weighing twice.

    Example:
        >>> chrf(["a cat"], ["a cat"]), chrf(["dog"], ["a cat"])
        (100.0, 0.0)
    """
    scores = []
    for n in range(1, order + 1):
        pairs = [(ngrams(text, n), ngrams(reference, n)) for text, reference in zip(texts, references, strict=True)]
        same = sum((ours & theirs).total() for ours, theirs in pairs)
        written, wanted = (sum(pair[i].total() for pair in pairs) for i in (0, 1))
        if written and wanted:
            scores.append((1 + beta**2) * same / (beta**2 * wanted + written))
    return 100 * float(np.mean(scores)) if scores else 0.0


def main(argv: list[str] | None = None) -> list[MethodRun]:
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, TextArguments, MetricOptSeq2SeqConfig), description=__doc__
    )
    parser.add_argument("--metric", dest="metric_name_or_path", help="Short for --metric_name_or_path.")
    parser.set_defaults(**DEFAULTS)
    data, named, texts, args = parser.parse_args_into_dataclasses(argv)
    if data.dataset_name is None:
        parser.error("name the data: --dataset_name Helsinki-NLP/opus_books --dataset_config_name en-fr, or a folder")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("comparison").setLevel(logging.INFO)
    tokenizer = AutoTokenizer.from_pretrained(named.model_name_or_path, **named.loading)

    def read(dataset: datasets.Dataset) -> datasets.Dataset:
        nested = {f"translation.{name}": name for name in (texts.source, texts.target)}
        dataset = dataset.flatten()
        dataset = dataset.rename_columns({old: new for old, new in nested.items() if old in dataset.column_names})
        source = find_column(dataset, texts.source, (), "source")
        target = find_column(dataset, texts.target, (), "target")

        def encode(rows):
            asked = [texts.prefix + text for text in rows[source]]
            return tokenizer(asked, text_target=rows[target], truncation=True, max_length=texts.max_length)

        return dataset.map(encode, batched=True, remove_columns=dataset.column_names)

    def decoded(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    module = None if args.metric_name_or_path is None else evaluate.load(args.metric_name_or_path)
    name = "chrf" if module is None else args.metric_for_best_model or module.name
    args = replace(args, metric_name_or_path=None, metric_for_best_model=name)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        written, wanted = decoded(prediction.predictions), decoded(prediction.label_ids)
        if module is None:
            return {"chrf": chrf(written, wanted)}
        return module.compute(predictions=written, references=wanted)

    runs = []
    for seed in texts.seeds:
        set_seed(seed)
        splits = load_splits(data, read, seed, args.observation_size, named.token)

        def trainer(output_dir, follows_metric=True, seed=seed, splits=splits, **changes):
            model = AutoModelForSeq2SeqLM.from_pretrained(named.model_name_or_path, **named.loading)
            numbers = {name: changes.pop(name) for name in [*changes] if hasattr(args, name)}
            cls = MetricOptSeq2SeqTrainer if follows_metric else by_loss_alone(MetricOptSeq2SeqTrainer)
            return cls(
                model,
                replace(args, seed=seed, output_dir=output_dir, **numbers),
                train_dataset=splits.train,
                observation_dataset=splits.observation,
                selection_dataset=splits.selection,
                data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
                processing_class=tokenizer,
                compute_metrics=compute_metrics,
                **changes,
            )

        for name in texts.methods:
            tuned, rows = run_method(METHODS[name], trainer, splits.measured, output_dir=args.output_dir)
            runs += rows
            if name == texts.methods[-1] and seed == texts.seeds[0]:
                tuned.save_model()
    save_results(os.path.join(args.output_dir, "results.json"), runs, metric=tuned.metric.name, arguments=vars(texts))
    print(comparison_table(in_order(runs), REFERENCE, MEASURED[1:], args.greater_is_better))
    print(table_note(len(texts.seeds)))
    return runs


if __name__ == "__main__":
    run_script(main)
