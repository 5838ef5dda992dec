"""Post-processed predictions: the same in guidance and in `evaluate`, and its errors are failed calls."""

import datasets
import numpy as np
import pytest
import torch
from helpers import Texts
from test_trainer_semantics import make
from transformers import BertConfig, BertForQuestionAnswering, EvalPrediction

from metricopt_hf import ConfigurationError, MetricError, MetricOptTrainer
from metricopt_hf.evaluation import data

LENGTH, WINDOWS = 8, 2  # of a question; each has two features


def squad_like(size, seed):
    """Examples with text answers, and features of which an example has two, without positions."""
    ids = torch.randint(2, 8, (size, LENGTH), generator=torch.Generator().manual_seed(seed))
    names = [f"q{i}" for i in range(size)]
    examples = datasets.Dataset.from_dict(
        {"id": names, "answers": [f"{int(row.argmax())} {int(row.argmax())}" for row in ids]}
    )
    features = datasets.Dataset.from_dict(
        {
            "input_ids": ids.repeat_interleave(WINDOWS, 0).tolist(),
            "example_id": [name for name in names for _ in range(WINDOWS)],
            "offset": list(range(size * WINDOWS)),
        }
    )
    train = datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "start_positions": ids.argmax(1).tolist(), "end_positions": ids.argmax(1).tolist()}
    )
    return examples, features, train


def answer(examples, features, predictions):
    """As in transformers' example: the best of an example's features; an id for everything."""
    start, end = predictions
    assert len(start) == len(end) == len(features)
    best = {}
    for row, name in enumerate(features["example_id"]):
        score = start[row].max() + end[row].max()
        if name not in best or score > best[name][0]:
            best[name] = (score, f"{start[row].argmax()} {end[row].argmax()}")
    assert set(best) == set(examples["id"])  # each example with its features, and none without
    answers = [{"id": name, "prediction_text": best[name][1]} for name in examples["id"]]
    references = [{"id": row["id"], "answers": row["answers"]} for row in examples]
    return EvalPrediction(answers, references)


def exact_match(prediction):
    pairs = zip(prediction.predictions, prediction.label_ids, strict=True)
    return {"exact_match": sum(a["prediction_text"] == r["answers"] for a, r in pairs) / len(prediction.label_ids)}


def questions():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForQuestionAnswering(BertConfig(vocab_size=8, **sizes))


def test_post_processing_is_the_same_in_guidance_and_evaluation(tmp_path):
    examples, features, train = squad_like(41, 2)
    calls = []

    def post_process(examples, features, predictions):
        calls.append((len(examples), len(features)))
        return answer(examples, features, predictions)

    trainer = make(
        tmp_path, exact_match, questions(), features, train=squad_like(80, 1)[2], metric_for_best_model="exact_match",
        post_process_function=post_process, eval_examples=examples,
    )  # fmt: skip
    trainer.train()
    assert trainer.result.failed_calls == 0 and len(trainer.result.trajectory) > 0
    assert max(features for _, features in calls) == 41  # half of the features, for selection
    del calls[:]
    metrics = trainer.evaluate()
    assert calls == [(41, 82)] and 0 <= metrics["eval_exact_match"] <= 1 and "epoch" in metrics


class QuestionAnsweringTrainer(MetricOptTrainer):
    """That of transformers' example, with the base class changed."""

    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        eval_examples = self.eval_examples if eval_examples is None else eval_examples
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        try:
            loader = self.get_eval_dataloader(eval_dataset)
            output = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=False, ignore_keys=ignore_keys)
        finally:
            self.compute_metrics = compute_metrics
        processed = self.post_process_function(eval_examples, eval_dataset, output.predictions)
        return {f"{metric_key_prefix}_{k}": v for k, v in self.compute_metrics(processed).items()}


def test_the_trainer_of_transformers_example_works_as_it_is(tmp_path):
    examples, features, train = squad_like(41, 2)
    arguments = {"metric_for_best_model": "exact_match", "train": squad_like(80, 1)[2], "evaluation": features}
    trainer = make(
        tmp_path, exact_match, questions(), cls=QuestionAnsweringTrainer, eval_strategy="steps", eval_steps=4,
        post_process_function=answer, eval_examples=examples, **arguments,
    )  # fmt: skip
    trainer.train()
    assert trainer.result.failed_calls == 0 and len(trainer.result.trajectory) > 0
    assert 0 <= trainer.evaluate()["eval_exact_match"] <= 1
    with pytest.raises(MetricError, match="evaluate.. is overridden here.*post_process_function"):
        make(tmp_path, exact_match, questions(), cls=QuestionAnsweringTrainer, **arguments).train()


def test_errors_of_post_processing_are_failed_calls(tmp_path):
    calls = []

    def post_process(examples, features, predictions):
        calls.append(len(features))
        assert examples is features  # without eval_examples
        if len(calls) == 12:
            raise KeyError("offset_mapping")
        return EvalPrediction(predictions, np.zeros(len(predictions), int))

    trainer = make(tmp_path, post_process_function=post_process)
    trainer.train()
    assert trainer.result.failed_calls == 1 and len(calls) == sum(trainer.ledger.calls.values())


def test_examples_are_found_by_name_or_place_or_not_at_all():
    examples, features, _ = squad_like(6, 0)
    part = data.take(features, np.array([3, 2, 11]))
    assert data.examples_of(part, examples)["id"][:] == ["q1", "q5"]
    plain = data.take(Texts(6), np.array([4, 1]))
    assert data.examples_of(plain, examples)["id"][:] == ["q4", "q1"]
    with pytest.raises(ConfigurationError, match="2 rows, too few for features up to row 4"):
        data.examples_of(plain, [1, 2])
